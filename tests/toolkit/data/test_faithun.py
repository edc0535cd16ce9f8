"""FaithUn: entities with four question sets, and index files that count clusters in entity order."""

import json
import re

import pytest

from ssiuu.data.facts import Fact
from ssiuu.data.registry import get_data_set
from tests.support.benchmark_files import INDICES, entities, question, write_faithun


def load(folder, extra=None):
    return get_data_set("faithun").load(str(folder), extra)


def questions(facts):
    return [fact.question for fact in facts]


def test_indices_count_base_questions_in_entity_order(tmp_path):
    split = load(write_faithun(tmp_path)).split
    assert [questions(part) for part in split] == [
        ["Q1 base 1", "Q2 base 0"],
        ["Q1 base 0", "Q3 base 1"],
        ["Q3 base 0"],
    ]
    assert split.forget[0] == Fact("Q1 base 1", "Q1 answer 1", ("x", "y"), "Q1")


def test_further_sets_are_about_the_forgotten_clusters(tmp_path):
    extra = load(write_faithun(tmp_path)).extra
    assert {name: questions(facts) for name, facts in extra.items()} == {
        "paraphrases": ["Q1 paraphrase 1 0", "Q1 paraphrase 1 1", "Q2 paraphrase 0 0", "Q2 paraphrase 0 1"],
        "multi_hop": ["Q1 hops 1", "Q2 hops 0"],
        "same_object": ["Q1 same 1", "Q2 same 0"],
    }


def test_only_the_sets_that_were_asked_for(tmp_path):
    assert list(load(write_faithun(tmp_path), ["multi_hop"]).extra) == ["multi_hop"]


def test_index_files_in_a_folder_of_their_own(tmp_path):
    assert load(write_faithun(tmp_path, splits="splits")) == load(write_faithun(tmp_path / "flat"))


def test_blank_lines_and_spaces_in_index_files(tmp_path):
    loose = {**INDICES, "forget": "\ufeff1 \r\n\r\n  2\n\n"}
    assert load(write_faithun(tmp_path, indices=loose)) == load(write_faithun(tmp_path / "plain"))


def as_objects(sets):
    """The question sets as objects with one key per cluster."""
    return {field: {f"P{i}": item for i, item in enumerate(items)} for field, items in sets.items()}


def flat(sets):
    """Paraphrases and questions of the same object as one list per entity."""
    flattened = {field: [q for item in sets[field] for q in item] for field in ("hop1_test", "same_object")}
    return {**sets, **flattened}


def other_fields(sets):
    """One answer as a text, and the false options under another name, in an object."""
    text = json.dumps(sets)
    text = re.sub(r'"answers": \[("[^"]*")\]', r'"answer": \1', text)
    text = re.sub(r'"false_options": \["x", "y"\]', '"false_answers": {"A": "x", "B": "y"}', text)
    return json.loads(text)


@pytest.mark.parametrize("change", [as_objects, flat, other_fields])
def test_other_shapes_that_mean_the_same(tmp_path, change):
    content = {name: change(sets) for name, sets in entities().items()}
    assert load(write_faithun(tmp_path, content)) == load(write_faithun(tmp_path / "plain"))


def test_entities_in_a_list(tmp_path):
    content = [{"entity": name, **sets} for name, sets in entities().items()]
    assert load(write_faithun(tmp_path, content)) == load(write_faithun(tmp_path / "plain"))


def test_the_first_of_several_answers_and_numbers_as_text(tmp_path):
    content = entities()
    content["Q2"]["hop1_unlearn"] = [question("when", "", answers=[1961, "in 1961"], false_options=[1962, "1963"])]
    for field in ("hop1_test", "same_object"):
        content["Q2"][field] = [question("in which year", "", answers="In 1961")]
    found = load(write_faithun(tmp_path, content))
    assert found.split.forget[1] == Fact("when", "1961", ("1962", "1963"), "Q2")
    assert found.extra["paraphrases"][-1] == Fact("in which year", "In 1961", ("x", "y"), "Q2")


def test_a_cluster_without_further_questions(tmp_path):
    content = entities()
    content["Q2"]["hop2_test"] = []
    content["Q2"]["same_object"] = [[]]
    extra = load(write_faithun(tmp_path, content)).extra
    assert (questions(extra["multi_hop"]), questions(extra["same_object"])) == (["Q1 hops 1"], ["Q1 same 1"])


def changed(name, field, value):
    """The entities with one question set replaced, or taken away."""
    content = entities()
    content[name] = {key: sets for key, sets in content[name].items() if key != field}
    return content if value is None else {**content, name: {**content[name], field: value}}


MALFORMED = {
    "no base questions": (changed("Q3", "hop1_unlearn", None), "entity Q3 has no hop1_unlearn; it has hop1_test, "),
    "a set that some entities lack": (changed("Q3", "hop2_test", None), "entity Q3 has no hop2_test; it has "),
    "text for questions": (changed("Q1", "hop1_unlearn", "Who?"), "field 'hop1_unlearn' is 'Who\\?'; expected a list"),
    "text for a question": (changed("Q1", "hop1_unlearn", ["Who?"]), "0 is 'Who\\?'; expected an object"),
    "two base questions in a cluster": (
        changed("Q1", "hop1_unlearn", [[question("a", "b"), question("c", "d")]]),
        "'hop1_unlearn', 0 has 2 questions; expected one per cluster",
    ),
    "no answer": (
        changed("Q1", "hop1_unlearn", [{"question": "a", "false_options": ["b"]}]),
        "0 has the fields question, false_options; expected one of answers, answer",
    ),
    "an empty list of answers": (
        changed("Q1", "hop1_unlearn", [question("a", "", answers=[])]),
        "field 'answers' is empty; expected at least one text",
    ),
    "no false option": (
        changed("Q1", "hop1_unlearn", [question("a", "b", false=())]),
        "field 'false_options' is empty; expected at least one text",
    ),
    "an answer that is no text": (
        changed("Q1", "hop1_unlearn", [question("a", "", answers=[None])]),
        "field 'answers' has None; expected texts",
    ),
    "an empty question": (changed("Q1", "hop1_unlearn", [question(" ", "b")]), "0, field 'question' is ' '; expected"),
    "a false option that is an answer": (
        changed("Q1", "hop1_unlearn", [question("a", "", answers=["b", "C"], false=("c",))]),
        "'c' is an answer and a false option",
    ),
    "two names of answers": (
        changed("Q1", "hop1_unlearn", [question("a", "b", answer="b")]),
        "0 has the fields question, answers, false_options, answer; expected one of answers, answer",
    ),
    "multi-hop questions of no known cluster": (
        changed("Q1", "hop2_test", [question(f"{i}", "far") for i in range(3)]),
        "'hop2_test' has 3 items and hop1_unlearn has 2, so it is not known which of them are about 'Q1 base 1'",
    ),
    "paraphrases with another answer": (
        changed("Q2", "hop1_test", [question("a", "elsewhere")]),
        "field 'hop1_test', 0 has the answer 'elsewhere', and its question in hop1_unlearn 'Q2 answer 0'",
    ),
    "an entity of the wrong kind": ({"Q1": []}, "entity Q1 is a list; expected an object with hop1_unlearn"),
    "no entities": ({}, "is a dict; expected an object of entities"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_questions_are_named(tmp_path, content, said):
    folder = write_faithun(tmp_path, content)
    with pytest.raises(ValueError, match=r"FaithUn_Dataset\.json.*" + said):
        load(folder)


def test_the_same_answer_twice_in_an_entity_tells_no_cluster(tmp_path):
    content = entities()
    content["Q1"]["hop1_unlearn"] = [question(f"Q1 base {i}", "one") for i in range(2)]
    content["Q1"]["same_object"] = [question(f"same {i}", "one") for i in range(3)]
    folder = write_faithun(tmp_path, content)
    with pytest.raises(ValueError, match="'same_object' has 3 items and hop1_unlearn has 2, so it is not known"):
        load(folder, ["same_object"])


def test_an_entity_that_is_there_twice(tmp_path):
    folder = write_faithun(tmp_path)
    file = folder / "FaithUn_Dataset.json"
    file.write_text(file.read_text().replace('"Q2"', '"Q1"'))
    with pytest.raises(ValueError, match=r"FaithUn_Dataset\.json cannot be read as JSON: the key 'Q1' is there twice"):
        load(folder)


BAD_INDICES = {
    "out of range": ({"test": (3, 6)}, r"test_set_split\.txt, line 2 is 6; expected 0 to 5, for .* has 6 questions"),
    "in two files": (
        {"test": (1,)},
        r"test_set_split\.txt, line 1 is 1, which .*forget_set_split\.txt, line 1 has too",
    ),
    "twice in a file": ({"forget": (2, 1, 2)}, r"forget_set_split\.txt, line 3 is 2, which .*line 1 has too"),
    "no number": ({"test": "3\nfour"}, r"test_set_split\.txt, line 2 is 'four'; expected one index per line"),
    "below 0": ({"test": "-1"}, r"test_set_split\.txt, line 1 is '-1'; expected one index per line"),
    "nothing to forget": ({"forget": "\n"}, "the forget set is empty"),
}


@pytest.mark.parametrize(("change", "said"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_bad_index_files_are_named(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        load(write_faithun(tmp_path, indices={**INDICES, **change}))


def test_a_set_that_was_asked_for_and_is_not_there(tmp_path):
    content = {name: {k: v for k, v in sets.items() if k != "same_object"} for name, sets in entities().items()}
    folder = write_faithun(tmp_path, content)
    assert list(load(folder).extra) == ["paraphrases", "multi_hop"]
    with pytest.raises(ValueError, match=r"entity Q1 has no same_object"):
        load(folder, ["same_object"])


def test_a_set_that_was_asked_for_and_says_nothing_of_the_forget_set(tmp_path):
    content = {name: {**sets, "hop2_test": []} for name, sets in entities().items()}
    folder = write_faithun(tmp_path, content)
    assert "multi_hop" not in load(folder).extra
    with pytest.raises(ValueError, match="has no question of hop2_test about the forget set"):
        load(folder, ["multi_hop"])


@pytest.mark.parametrize("missing", ["FaithUn_Dataset.json", "retaining_set_split.txt"])
def test_a_missing_file_is_named(tmp_path, missing):
    (write_faithun(tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(missing)):
        load(tmp_path)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder; expected one with FaithUn_Dataset"):
        load(tmp_path / "none")


def test_as_many_clusters_as_published(tmp_path):
    """664 clusters of 200 people; 33, 66 and 464 of them in index files of the published form."""
    content = {}
    for number in range(200):
        count = 4 if number < 64 else 3
        content[f"Q{number}"] = {"hop1_unlearn": [question(f"{number} {i}", f"answer {i}") for i in range(count)]}
    order = list(range(663, -1, -1))
    parts = {"forget": order[:33], "retaining": order[33:99], "test": order[99:563]}
    split = load(write_faithun(tmp_path, content, {name: sorted(part) for name, part in parts.items()})).split
    assert [len(part) for part in split] == [33, 66, 464]
    assert split.forget[-1].question == "199 2"

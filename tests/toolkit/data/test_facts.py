"""Loading, validating and splitting facts; the embedded set."""

import json
from collections import Counter

import pytest

from ssiuu.data.facts import (
    Fact,
    Split,
    at_most,
    by_subject,
    check_split,
    draw_people,
    judged_by_choice,
    load_facts,
    save_facts,
    split_by_subject,
)
from tests.support.jsonl import write_rows

GOOD = {"question": "q", "answer": "a", "false_options": ["b"], "subject": "s"}


def test_embedded_facts_are_enough():
    facts = load_facts("builtin")
    assert len(facts) >= 400
    assert len(by_subject(facts)) >= 120
    assert all(len(fact.false_options) == 2 for fact in facts)


def test_embedded_questions_are_distinct():
    questions = [fact.question for fact in load_facts("builtin")]
    assert len(set(questions)) == len(questions)


def test_embedded_questions_do_not_give_the_answer_away():
    assert not [fact for fact in load_facts("builtin") if fact.answer in fact.question.split()]


def test_reads_what_was_written(tmp_path):
    assert load_facts(write_rows(tmp_path / "f.jsonl", GOOD)) == [Fact("q", "a", ("b",), "s")]


def test_rows_without_options_or_subject(tmp_path):
    assert load_facts(write_rows(tmp_path / "f.jsonl", {"question": "q", "answer": "a"})) == [Fact("q", "a")]


MALFORMED = {
    "not JSON": ("{oops", "line 2 is not JSON"),
    "an empty line": ("\n" + json.dumps(GOOD), "line 2 is empty"),
    "no object": ([1], "line 2 is a list"),
    "no question": ({"answer": "a"}, "line 2, field 'question'"),
    "blank answer": ({**GOOD, "answer": " "}, "line 2, field 'answer'"),
    "options as text": ({**GOOD, "false_options": "b"}, "line 2, field 'false_options'"),
    "true option among the false": ({**GOOD, "false_options": ["a"]}, "line 2, field 'false_options' contains"),
    "no options unlike the first row": ({**GOOD, "false_options": []}, "line 2, field 'false_options' is .* unlike"),
    "subject as number": ({**GOOD, "subject": 3}, "line 2, field 'subject'"),
    "half a surrogate pair": ({**GOOD, "question": "q\ud83d"}, "line 2, field 'question' has half of a surrogate pair"),
    "half of one in an option": ({**GOOD, "false_options": ["\ud83d"]}, "line 2, field 'false_options' has half"),
    "half of one in a subject": ({**GOOD, "subject": "\ud83d"}, "line 2, field 'subject' has half"),
    "the true option otherwise composed": (
        {**GOOD, "answer": "\u00fc", "false_options": ["u\u0308 "]},
        "line 2, field 'false_options' contains the answer",
    ),
}


@pytest.mark.parametrize(("row", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"f\.jsonl, " + message):
        load_facts(write_rows(tmp_path / "f.jsonl", GOOD, row))


def test_an_answer_without_a_word_needs_options(tmp_path):
    with pytest.raises(ValueError, match=r"line 1, field 'answer' is '\+\+', without a letter or digit"):
        load_facts(write_rows(tmp_path / "f.jsonl", {"question": "q", "answer": "++"}))
    assert load_facts(write_rows(tmp_path / "f.jsonl", {**GOOD, "answer": "++"}))


def test_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        load_facts(write_rows(tmp_path / "f.jsonl"))


def test_no_person_is_in_two_sets(facts):
    split = split_by_subject(facts, 2, 3, seed=1)
    people = [{fact.subject for fact in part} for part in split]
    assert [len(part) for part in people] == [2, 3, 1]
    assert len(set.union(*people)) == 6


def test_the_seed_decides_the_split(facts):
    assert split_by_subject(facts, 2, 3, seed=1) == split_by_subject(facts, 2, 3, seed=1)
    assert any(split_by_subject(facts, 2, 3, 1) != split_by_subject(facts, 2, 3, seed) for seed in range(2, 6))


def test_more_people_than_there_are(facts):
    with pytest.raises(ValueError, match="need more people than the 6"):
        split_by_subject(facts, 4, 3, seed=0)


def test_facts_without_subject_cannot_be_split():
    with pytest.raises(ValueError, match="has no subject"):
        split_by_subject([Fact("q", "a")], 1, 1, seed=0)


BAD_SPLITS = {
    "the retain set is empty": Split([Fact("q", "a")], [], []),
    "the forget set is empty": Split([], [Fact("q", "a")], []),
    "share the subject 's'": Split([Fact("q", "a", (), "s")], [Fact("r", "a", (), "s")], []),
    "share the question 'q'": Split([Fact("q", "a")], [Fact("q", "b")], []),
}


@pytest.mark.parametrize(("message", "split"), BAD_SPLITS.items(), ids=BAD_SPLITS)
def test_bad_splits(message, split):
    with pytest.raises(ValueError, match=message):
        check_split(split)


def test_options_in_later_rows_only(tmp_path):
    with pytest.raises(ValueError, match=r"f\.jsonl, line 2, field 'false_options' is \['b'\], unlike"):
        load_facts(write_rows(tmp_path / "f.jsonl", {"question": "q", "answer": "a"}, GOOD))


PARAPHRASED = {"question": "q", "answer": "a", "paraphrase": "c", "false_options": ["b"]}


def test_a_paraphrase_is_the_true_option(tmp_path):
    (fact,) = load_facts(write_rows(tmp_path / "f.jsonl", PARAPHRASED))
    assert (fact.answer, fact.true_option, fact.options) == ("a", "c", ("c", "b"))


def test_tofus_names_of_options_and_paraphrase(tmp_path):
    row = {"question": "q", "answer": "a", "paraphrased_answer": "c", "perturbed_answer": ["b"]}
    assert load_facts(write_rows(tmp_path / "f.jsonl", row)) == [Fact("q", "a", ("b",), None, "c")]


def test_facts_are_judged_by_choice_where_their_options_are_worded_like_the_answer():
    choice = Fact("q", "a", ("b",))
    assert judged_by_choice([choice, choice])
    assert not judged_by_choice([choice, Fact("q", "a")])
    assert not judged_by_choice([choice, Fact("q", "a", ("b",), None, "c")])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**PARAPHRASED, "paraphrase": "b"}, "line 2, field 'false_options' contains the answer 'b'"),
        ({**PARAPHRASED, "paraphrase": 3}, "line 2, field 'paraphrase' is 3"),
        ({**PARAPHRASED, "paraphrase": None}, "line 2, field 'paraphrase' is None, unlike that of the first row"),
        ({**PARAPHRASED, "answer": "++"}, r"line 2, field 'answer' is '\+\+', without a letter or digit"),
    ],
)
def test_malformed_paraphrases_are_named(tmp_path, row, said):
    with pytest.raises(ValueError, match=r"f\.jsonl, " + said):
        load_facts(write_rows(tmp_path / "f.jsonl", PARAPHRASED, row))


def test_a_benchmark_may_have_a_person_in_two_sets():
    split = Split([Fact("q", "a", (), "s")], [Fact("r", "a", (), "s")], [])
    assert check_split(split, shared=("question",)) == split
    with pytest.raises(ValueError, match="share the subject 's'"):
        check_split(split)


def test_a_limited_set_is_even_among_its_people(facts):
    chosen = at_most(facts, 8, seed=3)  # of six people with two facts each
    assert len(set(chosen)) == 8
    assert sorted(Counter(fact.subject for fact in chosen).values()) == [1, 1, 1, 1, 2, 2]
    assert chosen == at_most(facts, 8, seed=3)
    assert any(set(at_most(facts, 8, seed=seed)) != set(chosen) for seed in range(4, 9))


def test_a_set_without_a_limit_or_below_it_is_whole(facts):
    assert at_most(facts, None, seed=0) == facts
    assert set(at_most(facts, 100, seed=0)) == set(facts)


def test_people_are_drawn_with_all_their_facts(facts):
    drawn = draw_people(facts, 2, seed=1)
    assert set(Counter(fact.subject for fact in drawn).values()) == {2}
    assert len(drawn) == 4
    assert any(set(draw_people(facts, 2, seed=seed)) != set(drawn) for seed in range(2, 9))


def test_more_people_than_can_be_drawn(facts):
    with pytest.raises(ValueError, match="people=7 is more than the 6 people"):
        draw_people(facts, 7, seed=0)


def test_saved_facts_are_read_again(facts, tmp_path):
    save_facts(facts, tmp_path / "facts.jsonl")
    assert load_facts(tmp_path / "facts.jsonl") == facts

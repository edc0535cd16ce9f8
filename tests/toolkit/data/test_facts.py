"""Loading, validating and splitting facts; the embedded sets."""

import gzip
import json

import pytest

from ssiuu.data.facts import Fact, Split, by_subject, check_split, load_facts, split_by_subject
from ssiuu.data.instructions import load_instructions


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


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


def test_embedded_instructions():
    assert len(load_instructions("builtin")) >= 100


def test_reads_what_was_written(tmp_path):
    assert load_facts(write(tmp_path / "f.jsonl", GOOD)) == [Fact("q", "a", ("b",), "s")]


def test_rows_without_options_or_subject(tmp_path):
    assert load_facts(write(tmp_path / "f.jsonl", {"question": "q", "answer": "a"})) == [Fact("q", "a")]


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
        load_facts(write(tmp_path / "f.jsonl", GOOD, row))


def test_blank_lines_at_the_end_are_nothing(tmp_path):
    assert len(load_facts(write(tmp_path / "f.jsonl", GOOD, "", "  "))) == 1


def test_a_json_array(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([GOOD, GOOD], indent=1))
    assert len(load_facts(tmp_path / "f.json")) == 2
    (tmp_path / "f.json").write_text(json.dumps([GOOD, {"question": "q"}]))
    with pytest.raises(ValueError, match=r"f\.json, row 2, field 'answer'"):
        load_facts(tmp_path / "f.json")
    (tmp_path / "f.json").write_text("[")
    with pytest.raises(ValueError, match=r"f\.json begins with '\[' and is not a JSON array"):
        load_facts(tmp_path / "f.json")


def test_an_answer_without_a_word_needs_options(tmp_path):
    with pytest.raises(ValueError, match=r"line 1, field 'answer' is '\+\+', without a letter or digit"):
        load_facts(write(tmp_path / "f.jsonl", {"question": "q", "answer": "++"}))
    assert load_facts(write(tmp_path / "f.jsonl", {**GOOD, "answer": "++"}))


PACKED = {
    "gzip": gzip.compress(b"{}"),
    "parquet": b"PAR1 and more",
    "zip": b"PK\x03\x04",
    "zstandard": b"\x28\xb5\x2f\xfd",
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("load", [load_facts, load_instructions])
def test_packed_files_are_named(tmp_path, kind, load):
    (tmp_path / "f.jsonl").write_bytes(PACKED[kind])
    with pytest.raises(ValueError, match=rf"f\.jsonl is a {kind} file; expected JSON Lines .*: convert it first"):
        load(tmp_path / "f.jsonl")


@pytest.mark.parametrize("load", [load_facts, load_instructions])
def test_a_folder_is_named(tmp_path, load):
    with pytest.raises(ValueError, match=r"is a folder; expected a \.jsonl file in it"):
        load(tmp_path)


def test_instructions_without_an_output_are_skipped_and_counted(tmp_path, caplog):
    rows = [{"instruction": "say", "output": output} for output in ("yes", "", "no", " ")]
    assert len(load_instructions(write(tmp_path / "i.jsonl", *rows))) == 2
    (said,) = (record.message for record in caplog.records)
    assert said == f"2 of 4 rows of {tmp_path / 'i.jsonl'} have an empty output; skipped"
    with pytest.raises(ValueError, match="has no rows with an output"):
        load_instructions(write(tmp_path / "i.jsonl", rows[1]))


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_in_instructions(tmp_path, field):
    row = {"instruction": "say", "input": "it", "output": "yes"}
    with pytest.raises(ValueError, match=rf"i\.jsonl, line 1, field '{field}' has half of a surrogate pair"):
        load_instructions(write(tmp_path / "i.jsonl", {**row, field: "x\ud83d"}))


def test_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match="has no rows"):
        load_facts(write(tmp_path / "f.jsonl"))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_facts(tmp_path / "none.jsonl")


def test_malformed_instruction(tmp_path):
    with pytest.raises(ValueError, match=r"i\.jsonl, line 1, field 'output'"):
        load_instructions(write(tmp_path / "i.jsonl", {"instruction": "say"}))


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


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    row = json.dumps({**GOOD, "question": "q\u2028r"}, ensure_ascii=False)
    (tmp_path / "f.jsonl").write_text(row + "\n", encoding="utf-8")
    assert [fact.question for fact in load_facts(tmp_path / "f.jsonl")] == ["q\u2028r"]


def test_a_file_of_another_encoding(tmp_path):
    (tmp_path / "f.jsonl").write_bytes('{"question": "é", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"f\.jsonl is not UTF-8 text"):
        load_facts(tmp_path / "f.jsonl")


def test_options_in_later_rows_only(tmp_path):
    with pytest.raises(ValueError, match=r"f\.jsonl, line 2, field 'false_options' is \['b'\], unlike"):
        load_facts(write(tmp_path / "f.jsonl", {"question": "q", "answer": "a"}, GOOD))


def test_a_dataset_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no-one/nothing could not be loaded: .*expected a \.jsonl file"):
        load_facts("no-one/nothing")

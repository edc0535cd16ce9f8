"""Files and datasets of rows, whatever the rows are."""

import gzip
import json

import pytest

from ssiuu.data.facts import load_facts
from ssiuu.data.instructions import load_instructions
from tests.support.jsonl import write_rows

GOOD = {"question": "q", "answer": "a", "false_options": ["b"], "subject": "s"}
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


def test_a_json_array(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([GOOD, GOOD], indent=1))
    assert len(load_facts(tmp_path / "f.json")) == 2
    (tmp_path / "f.json").write_text(json.dumps([GOOD, {"question": "q"}]))
    with pytest.raises(ValueError, match=r"f\.json, row 2, field 'answer'"):
        load_facts(tmp_path / "f.json")
    (tmp_path / "f.json").write_text("[")
    with pytest.raises(ValueError, match=r"f\.json begins with '\[' and is not a JSON array"):
        load_facts(tmp_path / "f.json")


def test_blank_lines_at_the_end_are_nothing(tmp_path):
    assert len(load_facts(write_rows(tmp_path / "f.jsonl", GOOD, "", "  "))) == 1


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_facts(tmp_path / "none.jsonl")


def test_a_line_separator_within_a_text_ends_no_row(tmp_path):
    row = json.dumps({**GOOD, "question": "q\u2028r"}, ensure_ascii=False)
    (tmp_path / "f.jsonl").write_text(row + "\n", encoding="utf-8")
    assert [fact.question for fact in load_facts(tmp_path / "f.jsonl")] == ["q\u2028r"]


def test_a_file_of_another_encoding(tmp_path):
    (tmp_path / "f.jsonl").write_bytes('{"question": "é", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"f\.jsonl is not UTF-8 text"):
        load_facts(tmp_path / "f.jsonl")


def test_a_dataset_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no-one/nothing could not be loaded: .*expected a \.jsonl file"):
        load_facts("no-one/nothing")

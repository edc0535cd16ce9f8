"""Instructions in Alpaca's schema; the embedded set."""

import pytest

from ssiuu.data.instructions import load_instructions
from tests.support.jsonl import write_rows


def test_embedded_instructions():
    assert len(load_instructions("builtin")) >= 100


def test_instructions_without_an_output_are_skipped_and_counted(tmp_path, caplog):
    rows = [{"instruction": "say", "output": output} for output in ("yes", "", "no", " ")]
    assert len(load_instructions(write_rows(tmp_path / "i.jsonl", *rows))) == 2
    (said,) = (record.message for record in caplog.records)
    assert said == f"2 of 4 rows of {tmp_path / 'i.jsonl'} have an empty output; skipped"
    with pytest.raises(ValueError, match="has no rows with an output"):
        load_instructions(write_rows(tmp_path / "i.jsonl", rows[1]))


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_half_a_surrogate_pair_in_instructions(tmp_path, field):
    row = {"instruction": "say", "input": "it", "output": "yes"}
    with pytest.raises(ValueError, match=rf"i\.jsonl, line 1, field '{field}' has half of a surrogate pair"):
        load_instructions(write_rows(tmp_path / "i.jsonl", {**row, field: "x\ud83d"}))


def test_malformed_instruction(tmp_path):
    with pytest.raises(ValueError, match=r"i\.jsonl, line 1, field 'output'"):
        load_instructions(write_rows(tmp_path / "i.jsonl", {"instruction": "say"}))

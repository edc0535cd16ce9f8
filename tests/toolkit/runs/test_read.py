"""Reading made-up run folders."""

import json

import pytest

from ssiuu.runs.read import read_runs
from tests.support.run_folders import write_run


def test_runs_of_one_method_are_told_apart(tmp_path):
    found = read_runs([write_run(tmp_path / name, "ssiuu") for name in ("weak", "strong")])
    assert [record.label for record in found] == ["SSIUU (weak)", "SSIUU (strong)"]
    assert [record.style for record in found] == [0, 1]


def test_no_runs():
    with pytest.raises(ValueError, match="run_dirs is empty"):
        read_runs([])


def test_a_diagnosis_of_an_earlier_version_is_the_part_influence(tmp_path):
    run = write_run(tmp_path / "run")
    parts = json.loads((run / "diagnosis.json").read_text())
    flat = {name: value for name, value in parts["influence"].items() if name != "options"}
    (run / "diagnosis.json").write_text(json.dumps(flat))
    (record,) = read_runs([run])
    assert record.diagnosis == parts["influence"]
    assert record.lens is record.ablation is record.cka is None

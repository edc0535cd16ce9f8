"""The rows of the table of made-up run folders."""

import json

from ssiuu.report.table import table_rows
from ssiuu.runs.read import read_runs
from tests.support.run_folders import write_run


def test_a_run_without_what_another_has(runs, tmp_path):
    bare = write_run(tmp_path / "bare", "ssiuu", attacks=False, diagnosis=False)
    rows = {row.name: row.cells for row in table_rows(read_runs([runs[0], bare]))}
    assert rows["D-, hidden"][1] == rows["benign: FS"][1] == "not run"
    assert "not run" not in (rows["D-, hidden"][0], rows["benign: FS"][0])


def test_small_probabilities_are_not_shown_as_none(tmp_path):
    run = write_run(tmp_path / "run", "gd")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["after"]["forget_probability"] = 2e-6
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = {row.name: row.cells for row in table_rows(read_runs([run]))}
    assert rows["P(answer), forget"] == ["0.400 → <0.001"]

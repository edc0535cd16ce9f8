"""The rows of the table of made-up run folders."""

import json

from ssiuu.report.table import table_rows
from ssiuu.runs.read import read_runs
from tests.support.run_folders import attack_result, write_run


def test_a_run_without_what_another_has(runs, tmp_path):
    bare = write_run(tmp_path / "bare", "ssiuu", attacks=False, diagnosis=False)
    rows = {row.name: row.cells for row in table_rows(read_runs([runs[0], bare]))}
    assert rows["D-, hidden"][1] == rows["benign (wrong): FS"][1] == "not run"
    assert "not run" not in (rows["D-, hidden"][0], rows["benign (wrong): FS"][0])


def test_small_probabilities_are_not_shown_as_none(tmp_path):
    run = write_run(tmp_path / "run", "gd")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["after"]["forget_probability"] = 2e-6
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = {row.name: row.cells for row in table_rows(read_runs([run]))}
    assert rows["P(answer), forget"] == ["0.400 → <0.001"]


def attack_rows(tmp_path, *attacks):
    run = write_run(tmp_path / "run", "gd", attacks=False)
    (run / "attacks").mkdir()
    for index, attack in enumerate(attacks):
        (run / "attacks" / f"{index}.json").write_text(json.dumps(attack))
    return {row.name: row.cells[0] for row in table_rows(read_runs([run])) if row.section.startswith("Attacks")}


def evaluations(*scores):
    return [{"step": 5 * i, "fs": 0.0, "unseen_fs": fs} for i, fs in enumerate(scores)]


def test_the_papers_row_says_what_it_rests_on(tmp_path):
    attacks = [attack_result(seed=seed, steps=evaluations(0.0, *[fs] * n)) for seed, fs, n in ((0, 0.5, 1), (1, 1, 2))]
    assert attack_rows(tmp_path, *attacks) == {
        "harmful p = 0.3 (wrong): FS": "0.75 ± 0.35",
        "harmful p = 0.3 (wrong): steps": "5–10",
        "harmful p = 0.3 (wrong): seeds, rates, facts": "2, 1, 6",
    }


def test_rates_of_different_seeds_are_not_compared(tmp_path):
    attacks = [
        attack_result("harmful", 0.3, rate, seed, steps=evaluations(0.5)) for seed, rate in ((0, 1e-5), (1, 1e-6))
    ]
    rows = attack_rows(tmp_path, *attacks)
    assert rows["harmful p = 0.3 (wrong): FS"] == "incomplete"


def test_a_quantised_attack_has_neither_seeds_nor_steps(tmp_path):
    attack = attack_result("quantised", None, None, steps=evaluations(0.0, 0.25), tuning=None)
    assert attack_rows(tmp_path, attack) == {"quantised (wrong): FS": "0.25", "quantised (wrong): facts": "8"}

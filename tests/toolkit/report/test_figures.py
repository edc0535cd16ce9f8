"""Which figures made-up run folders have data for, and how their lines look."""

import json
from dataclasses import replace

from ssiuu.report.figures import attack_curves, draw_all
from ssiuu.report.style import line_of
from ssiuu.runs.read import read_runs
from tests.support.run_folders import attack_result, write_run


def test_every_figure_is_drawn_though_a_run_has_no_data_for_some(runs, tmp_path):
    bare = write_run(tmp_path / "bare", "ssiuu", attacks=False, diagnosis=False)
    found = draw_all(read_runs([runs[0], bare]))
    assert set(found) == {"overview", "influence", "modules", "lens", "ablation", "cka", "drift", "attacks", "training"}


def test_an_attack_that_does_not_train_has_no_curve(tmp_path):
    run = write_run(tmp_path / "run", "gd", attacks=False, diagnosis=False)
    steps = [{"step": step, "fs": 0.0, "unseen_fs": 0.0} for step in (0, 1)]
    (run / "attacks").mkdir()
    result = attack_result("quantised", None, None, steps=steps, tuning=None)
    (run / "attacks" / "quantised-wrong.json").write_text(json.dumps(result))
    assert set(draw_all(read_runs([run]))) == {"training"}


def test_more_than_three_attacks_share_one_scale(runs):
    record = read_runs(runs[:1])[0]
    lora = [attack | {"tuning": "lora"} for attack in record.attacks]
    shown = attack_curves([replace(record, attacks=record.attacks + lora)]).axes
    assert len(shown) == 2 * 6
    for label in ("FS (unseen facts)", "mean P(forgotten answer)"):
        assert len({ax.get_ylim() for ax in shown if ax.get_ylabel() == label}) == 1


def test_runs_of_one_method_share_a_colour_and_differ_in_the_line(tmp_path):
    first, second = (line_of(r) for r in read_runs([write_run(tmp_path / name, "ssiuu") for name in ("a", "b")]))
    assert first["color"] == second["color"]
    assert first["linestyle"] != second["linestyle"]


def test_parts_of_a_diagnosis_are_drawn_by_themselves(tmp_path):
    """Also where no fact could be compared, a set was too small, or facts have no options."""
    names = ("influence", "lens", "ablation", "cka", "drift")
    for part in names:
        run = write_run(tmp_path / part, "gd", attacks=False)
        diagnosis = json.loads((run / "diagnosis.json").read_text())
        (run / "diagnosis.json").write_text(json.dumps({part: diagnosis[part]}))
        drawn = set(draw_all(read_runs([run])))
        assert drawn == {"training"} | ({"overview", "influence", "modules"} if part == "influence" else {part})
    diagnosis["lens"]["after"] = {"share": [], "compared": 0, "left_out": 12}
    del diagnosis["influence"], diagnosis["drift"], diagnosis["cka"]["retain"]
    for scores in (diagnosis["ablation"]["none"], *(s for p in diagnosis["ablation"]["ablated"] for s in p.values())):
        if isinstance(scores, dict):
            del scores["margin"]
    (run / "diagnosis.json").write_text(json.dumps(diagnosis))
    assert set(draw_all(read_runs([run]))) == {"training", "ablation", "cka"}

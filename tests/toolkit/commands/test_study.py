"""Studies of the tiny model: what they leave behind, how they go on, and what two of them at once do."""

import json
import shutil
import sys
import threading

import pytest

from ssiuu.commands import study as study_module
from ssiuu.commands.study import run_study
from ssiuu.evaluation.sets import named_means
from ssiuu.runs.folder import Run
from ssiuu.runs.locks import locked
from ssiuu.runs.read import read_runs
from tests.support.command_line import run as command
from tests.support.faults import Killed, fault
from tests.support.small_runs import lines
from tests.support.studies import results, run_here, stamps, tiny_study, write_study
from tests.toolkit.conftest import tiny_facts


@pytest.fixture(scope="module")
def content(model_dir, tmp_path_factory):
    """A study whose files lie where all tests of this module find them."""
    facts = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    rows = ({**vars(fact), "false_options": list(fact.false_options)} for fact in tiny_facts())
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_study(model_dir, facts)


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    """The folder of the study after an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_here(write_study(folder, content), folder / "out") == 0
    return folder / "out"


@pytest.fixture(autouse=True)
def no_pictures(finished, monkeypatch):
    """Drawing takes most of the time of a study as small as these."""
    monkeypatch.setattr("ssiuu.report.study.save", lambda figure, path: None)
    monkeypatch.setattr("ssiuu.report.study._draw", lambda *_: None)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(finished, tmp_path / "copied")


def test_every_cell_is_a_run_that_was_attacked_and_diagnosed(finished):
    for name in ("gd/seed0", "gd/seed1", "slow/seed0", "slow/seed1"):
        (record,) = read_runs([finished / name])
        assert record.config["status"] == "complete"
        assert record.diagnosis
        assert len(record.attacks) == 1


def test_the_cells_of_a_seed_share_their_facts(finished):
    splits = {name: Run(finished / name).split() for name in ("gd/seed0", "slow/seed0", "gd/seed1")}
    assert splits["gd/seed0"] == splits["slow/seed0"] != splits["gd/seed1"]


def test_the_results_are_those_of_the_runs(finished):
    found = results(finished)
    for cell in ("gd", "slow"):
        for seed in (0, 1):
            after = Run(finished / cell / f"seed{seed}").read("evaluation.json")["after"]
            values = found["cells"][cell]["values"]
            assert values["forget_probability"]["seeds"][str(seed)] == after["forget_probability"]
            (attack,) = (json.loads(f.read_text()) for f in (finished / cell / f"seed{seed}/attacks").iterdir())
            margins = [step["unseen_margin"] for step in attack["steps"]]
            assert values["harmful-p-0.3-all-margin-gain"]["seeds"][str(seed)] == pytest.approx(
                max(margins) - margins[0]
            )
            diagnosis = Run(finished / cell / f"seed{seed}").diagnosis()
            assert values["lens_lowest"]["seeds"][str(seed)] == min(diagnosis["lens"]["after"]["share"])
            largest, none = diagnosis["ablation"]["ablated"][0], diagnosis["ablation"]["none"]
            gained = values[f"ablation-{largest['count']}-hidden"]["seeds"][str(seed)]
            assert gained == pytest.approx(largest["hidden"]["margin"] - none["margin"])
    distances = [found["cells"][cell]["values"]["distance"] for cell in ("gd", "slow")]
    assert distances[1]["difference"]["mean"] == pytest.approx(distances[1]["mean"] - distances[0]["mean"])
    assert "difference" not in distances[0]


def test_what_was_not_measured_is_missing(copied):
    shutil.rmtree(copied / "slow/seed1")
    (copied / "slow/seed0/diagnosis.json").unlink()
    folder = study_module.write_results(*_study(copied), copied)
    values = json.loads((folder / "results.json").read_text())["cells"]["slow"]["values"]
    assert "d_minus" not in values
    assert values["fs"]["count"] == 1
    rows = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| slow | –")]
    assert rows
    assert all(set(row.split(" | ")[1:]) <= {"–", "– |"} for row in rows)  # the tables of the diagnosis


def _study(out):
    study = study_module.read_study(out / "study.yaml")
    return study, study_module.tasks_of(study)


def test_few_seeds_are_said_to_be_few(finished):
    assert "fewer than 5 seeds" in (finished / "results/table.md").read_text()


def test_there_is_a_figure_of_each_quantity(finished):
    for key in results(finished)["quantities"]:
        assert (finished / "results" / f"{key}.png").stat().st_size > 1000


def test_nothing_is_done_again(copied):
    before = {name: stamps(copied / name) for name in ("gd", "slow")}
    assert run_here(copied / "study.yaml", copied) == 0
    assert {name: stamps(copied / name) for name in ("gd", "slow")} == before


# Of about two hundred writes: some in each stage of a cell.
@pytest.mark.parametrize("at", [1, 19, 52, 90, 130, 160])
def test_a_killed_study_loses_nothing_and_repeats_nothing(content, finished, tmp_path, monkeypatch, at):
    path, out = write_study(tmp_path, content), tmp_path / "out"
    with fault(out, "killed", at, monkeypatch), pytest.raises(Killed):
        run_here(path, out)
    done = [task.folder(out) for task in _tasks(path) if task.is_done(out)]
    before = {folder: stamps(folder) for folder in done}
    assert run_here(path, out) == 0
    assert {folder: stamps(folder) for folder in done} == before
    assert results(out) == results(finished)


def _tasks(path):
    return study_module.tasks_of(study_module.read_study(path)).values()


def test_a_failure_is_recorded_and_the_rest_goes_on(content, finished, tmp_path, monkeypatch):
    cells = {**content["cells"], "slow": {**content["cells"]["slow"], "match": {"distance": "gd"}}}
    path, out = write_study(tmp_path, {**content, "cells": cells, "seeds": [0]}), tmp_path / "out"
    with monkeypatch.context() as patched:
        attack = study_module.attack_run

        def fail(run, attacks):
            if run.parent.name == "gd":
                raise RuntimeError("out of\nmemory")
            return attack(run, attacks)

        patched.setattr(study_module, "attack_run", fail)
        assert command("study", path, "--out", out, "--jobs", 0).status == 1
    (line,) = (out / "gd/seed0.json").read_text().splitlines()
    assert json.loads(line)["error"] == "RuntimeError: out of memory"
    found = results(out)
    assert found["failures"] == {"gd/seed0": "RuntimeError: out of memory"}
    # Its run and its diagnosis are there, and the cell that is matched to it.
    assert {"fs", "d_plus"} <= found["cells"]["gd"]["values"].keys()
    assert "harmful-p-0.3-all-fs" not in found["cells"]["gd"]["values"]
    assert "harmful-p-0.3-all-fs" in found["cells"]["slow"]["values"]
    run = stamps(out / "gd/seed0/model")
    assert run_here(path, out) == 0
    assert stamps(out / "gd/seed0/model") == run
    assert results(out)["failures"] == {}
    assert "harmful-p-0.3-all-fs" in results(out)["cells"]["gd"]["values"]


def test_what_needs_a_failed_cell_fails_with_it(content, tmp_path, monkeypatch):
    cells = {"gd": {"method": "gd"}, "slow": {"method": "gd", "match": {"distance": "gd"}}}
    path = write_study(tmp_path, {**content, "cells": cells, "seeds": [0]})
    monkeypatch.setattr(study_module, "unlearn_to_end", lambda *_: (_ for _ in ()).throw(OSError("no disk")))
    assert run_here(path, tmp_path / "out") == 2
    assert json.loads((tmp_path / "out/slow/seed0.json").read_text())["error"] == "needs gd/seed0, which failed"


def test_other_options_for_a_cell_that_was_begun_are_refused(copied):
    content = study_module.read_study(copied / "study.yaml").given
    changed = {**vars(content), "cells": {**content.cells, "slow": {"method": "gd", "learning_rate": 5e-4}}}
    with pytest.raises(ValueError, match=r"slow.seed0 was begun with learning_rate=0.0001, and the study now has"):
        run_here(write_study(copied.parent, changed), copied)


def test_other_options_for_a_cell_that_was_killed_are_refused(content, tmp_path, monkeypatch):
    path, out = write_study(tmp_path, content), tmp_path / "out"
    with fault(out, "killed", 40, monkeypatch), pytest.raises(Killed):
        run_here(path, out)
    base = {**content["base"], "learning_rate": 2e-3}
    with pytest.raises(ValueError, match=r"gd.seed0 was begun with learning_rate=0.001, and the study now has 0.002"):
        run_here(write_study(tmp_path, {**content, "base": base}), out)


def test_another_attack_is_added_to_finished_cells(copied):
    content = vars(study_module.read_study(copied / "study.yaml").given)
    more = [*content["attacks"], {"kind": ["benign"], "learning_rate": [1e-3], "steps": 1}]
    models = {name: stamps(copied / name / "model") for name in ("gd/seed0", "slow/seed1")}
    assert run_here(write_study(copied.parent, {**content, "attacks": more}), copied) == 0
    assert len(list((copied / "gd/seed0/attacks").iterdir())) == 2
    assert {name: stamps(copied / name / "model") for name in models} == models


def test_models_that_are_not_kept(content, tmp_path):
    path, out = write_study(tmp_path, {**content, "keep_models": False, "seeds": [0]}), tmp_path / "out"
    assert run_here(path, out) == 0
    assert not (out / "gd/seed0/model").exists()
    before = stamps(out / "gd")
    assert run_here(path, out) == 0
    assert stamps(out / "gd") == before
    path = write_study(tmp_path, {**content, "keep_models": False, "seeds": [0], "attacks": []})
    assert run_here(path, out) == 2
    assert "its model was not kept" in json.loads((out / "gd/seed0.json").read_text())["error"]


def test_a_model_is_taught_once(content, tmp_path):
    teach = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3, "people": 5}
    base = {**content["base"], "retain_people": 2, "forget_facts": 3, "retain_facts": 2, "test_facts": 1}
    path = write_study(tmp_path, {**content, "base": base, "teach": teach, "attacks": [], "diagnose": None})
    out = tmp_path / "out"
    assert run_here(path, out) == 0
    taught = [json.loads(line)["question"] for line in (out / "taught/facts.jsonl").read_text().splitlines()]
    assert len(taught) == 10
    for name in ("gd/seed0", "slow/seed1"):
        run = Run(out / name)
        assert run.read("config.json")["model"] == str((out / "taught/model").resolve())
        assert [len(facts) for facts in run.split()] == [3, 2, 1]
        assert {fact.question for facts in run.split() for fact in facts} <= set(taught)
    before = stamps(out / "taught")
    assert run_here(path, out) == 0
    assert stamps(out / "taught") == before


def matched(content, kind, **changes):
    """A study of a cell that is matched to gd."""
    cells = {"gd": {"method": "gd"}, "control": {"method": "gd", "match": {kind: "gd"}, **changes}}
    base = {**content["base"], "threshold": None}
    return {**content, "base": base, "cells": cells, "seeds": [0], "attacks": [], "diagnose": None}


def test_steps_are_matched_by_the_learning_rate(content, tmp_path, monkeypatch):
    # The tiny model's FS moves by whole facts; the probability that stands for it here falls smoothly.
    def smooth(scores, which):
        return named_means(scores, which) | ({"fs": scores.probability.mean().item()} if which == "forget" else {})

    monkeypatch.setattr("ssiuu.commands.unlearn.named_means", smooth)
    study = matched(content, "steps", learning_rate=2e-3)
    study["base"] |= {"threshold": 5e-3, "max_steps": 200, "learning_rate": 1e-3, "save_every": 0}
    path, out = write_study(tmp_path, study), tmp_path / "out"
    assert run_here(path, out) == 0
    steps = {name: len(lines(Run(out / name / "seed0"))) for name in ("gd", "control")}
    assert steps["gd"] > 4
    assert abs(steps["control"] - steps["gd"]) <= max(1, round(0.05 * steps["gd"]))
    assert lines(Run(out / "control/seed0"))[-1]["stopped_by"] == "threshold"
    assert Run(out / "control/seed0").read("config.json")["learning_rate"] != 2e-3
    assert list((out / "control/seed0-trials").glob("*/model")) == []
    assert list((out / "control/seed0-trials").glob("*/metrics.jsonl"))


def test_a_run_that_did_not_reach_its_stop_cannot_be_matched_in_steps(content, tmp_path):
    study = matched(content, "steps")
    study["base"]["threshold"] = -1.0
    assert run_here(write_study(tmp_path, study), tmp_path / "out") == 1
    error = json.loads((tmp_path / "out/control/seed0.json").read_text())["error"]
    assert "reached max_steps=2 before its stop" in error


def test_a_distance_is_matched(content, tmp_path):
    study = matched(content, "distance", learning_rate=1e-4)
    study["base"] |= {"threshold": -1.0, "max_steps": 2}
    study["cells"]["control"] |= {"threshold": None, "max_steps": 100}
    path, out = write_study(tmp_path, study), tmp_path / "out"
    assert run_here(path, out) == 0
    goal = lines(Run(out / "gd/seed0"))[-1]["distance"]
    reached = [line["distance"] for line in lines(Run(out / "control/seed0"))]
    assert reached[-2] < goal <= reached[-1]


def test_a_cell_of_another_process_is_left_to_it(content, finished, tmp_path):
    path, out = write_study(tmp_path, content), tmp_path / "out"
    with locked(out / "gd", ".seed0.lock"):
        said = command("study", path, "--out", out, "--jobs", 0)
    assert said.status == 0
    assert "1 left to another process: gd/seed0" in said.output
    assert not (out / "gd/seed0").exists()
    assert results(out)["cells"]["slow"] == {**results(finished)["cells"]["slow"],
                                             "values": results(out)["cells"]["slow"]["values"]}  # fmt: skip


def test_a_task_that_others_need_is_waited_for(content, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "POLL", 0.01)
    teach = {"steps": 1, "people": 5}
    base = {**content["base"], "retain_people": 2}
    study = {**content, "base": base, "teach": teach, "seeds": [0], "attacks": [], "diagnose": None}
    path, out = write_study(tmp_path, study), tmp_path / "out"
    release = threading.Event()
    held = locked(out, ".taught.lock")
    held.__enter__()
    timer = threading.Timer(0.5, lambda: (held.__exit__(None, None, None), release.set()))
    timer.start()
    assert run_here(path, out) == 0
    assert release.is_set()


def test_workers_are_processes(content, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    path, out = write_study(tmp_path, {**content, "seeds": [0]}), tmp_path / "out"
    assert run_study(path, out, jobs=2) == 0
    one, other = results(out)["cells"]["slow"]["values"]["fs"], results(finished)["cells"]["slow"]["values"]["fs"]
    assert one["seeds"]["0"] == other["seeds"]["0"]
    assert "attack seed0" in (out / "slow/seed0.log").read_text()


def test_a_worker_that_is_killed_is_a_failure(content, tmp_path, monkeypatch):
    monkeypatch.setattr("ssiuu.commands.study_workers.sys.executable", _script(tmp_path, "kill -9 $$"))
    path, out = write_study(tmp_path, {**content, "seeds": [0]}), tmp_path / "out"
    assert run_study(path, out) == 2
    assert "ended by signal 9" in json.loads((out / "gd/seed0.json").read_text())["error"]


def _script(folder, text):
    script = folder / "worker.sh"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return str(script)


def test_a_dry_run_of_a_new_study_measures_and_writes_nothing(content, tmp_path):
    path = write_study(tmp_path, content)
    said = command("study", path, "--out", tmp_path / "out", "--dry-run")
    assert said.status == 0, said.output
    assert "4 of 4 tasks are to be run; at most about" in said.output
    assert "harmful-p0.3-all-lr0.001-seed0" in said.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_without_the_model_says_so(content, tmp_path):
    study = {**content, "base": {**content["base"], "model": str(tmp_path)}}
    assert "time unknown: " in command("study", write_study(tmp_path, study), "--dry-run").output


def test_a_dry_run_goes_by_finished_cells(copied):
    for name, seconds in (("gd/seed0", 60), ("gd/seed1", 180), ("slow/seed0", 600)):
        file = copied / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": seconds}))
    shutil.rmtree(copied / "slow/seed1")
    said = command("study", copied / "study.yaml", "--out", copied, "--dry-run").output
    assert "1 of 4 tasks are to be run; about 10 min, by the finished ones" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--jobs", "-1"], "jobs=-1; expected at least 0"),
        (["--only", "gd/seed9"], "only='gd/seed9' is not a task of"),
    ],
)
def test_bad_arguments(content, tmp_path, words, said):
    result = command("study", write_study(tmp_path, content), "--out", tmp_path / "out", *words)
    assert result.status == 2
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_run_or_a_model_is_refused(content, tmp_path, model_dir):
    with pytest.raises(ValueError, match="is the folder of a run or a model"):
        run_here(write_study(tmp_path, content), model_dir)


def test_data_that_cannot_be_used_is_refused_before_any_work(content, tmp_path):
    study = {**content, "base": {**content["base"], "facts": str(tmp_path / "none.jsonl")}}
    with pytest.raises(FileNotFoundError, match=r"none.jsonl does not exist"):
        run_here(write_study(tmp_path, study), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_task_alone(content, tmp_path):
    out = tmp_path / "out"
    assert command("study", write_study(tmp_path, content), "--out", out, "--only", "slow/seed1").status == 0
    assert sorted(file.name for file in out.iterdir()) == ["slow"]

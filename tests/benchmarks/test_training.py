"""The benchmarks of training steps: their gate, their turns, their memory, and the search for what fits."""

import gc
import weakref

import pytest
import torch

from benchmarks.harness.cases import BudgetCase, StepCase
from benchmarks.harness.memory import MEASURABLE, PeakMemory
from benchmarks.harness.record import provenance, write_json
from benchmarks.harness.running import run_case
from benchmarks.harness.stepping import Turn, largest_within, take_turn, time_steps
from benchmarks.plot import write_docs
from benchmarks.suites import memory, step
from benchmarks.training.algorithm_1 import algorithm_1, compiled_update, eager_update, one_forward, two_forwards
from benchmarks.training.gate import TOLERANCES, update_errors
from benchmarks.training.models import LLAMA_SHAPES, Shape, build, parameters
from benchmarks.training.trainers import TRAINERS, plain_gd, ssiuu

TINY = Shape(16, 2, 24, 2, 1, 50, tied=True)
measurable = pytest.mark.skipif(not MEASURABLE, reason="peak memory is read from Linux's /proc")


def steps_of(candidates, errors=None):
    """A case of the given candidates, each a function that builds a step."""
    return StepCase(
        suite="step",
        name="tiny",
        candidates=candidates,
        errors=lambda: errors or dict.fromkeys(candidates, 0.0),
        tolerance=0.1,
        tokens=10,
        weight_bytes=40,
    )


def nothing():
    return lambda: None


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("tried to allocate")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_way_of_writing_algorithm_1_is_right(tied, checkpointing):
    trainers = {
        "one forward": algorithm_1(one_forward, eager_update),
        "two forwards": algorithm_1(two_forwards, eager_update),
        "compiled": algorithm_1(two_forwards, compiled_update),
        "plain GD": plain_gd,
    }
    found = update_errors(trainers, torch.float32, tied=tied, checkpointing=checkpointing)
    assert max(found.values()) <= TOLERANCES[torch.float32]


def test_the_gate_of_bfloat16():
    trainers = {"one forward": algorithm_1(one_forward, eager_update), "plain GD": plain_gd}
    found = update_errors(trainers, torch.bfloat16, tied=True, checkpointing=False)
    assert max(found.values()) <= TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_step_without_its_penalty_does_not_pass(dtype):
    (error,) = update_errors({"forgot the penalty": plain_gd}, dtype, tied=True, checkpointing=False).values()
    assert error > 5 * TOLERANCES[dtype]


def test_a_gate_that_could_not_see_the_penalty_says_so(monkeypatch):
    from benchmarks.training import gate as training_gate

    monkeypatch.setattr(training_gate, "OPTIONS", training_gate.OPTIONS._replace(penalty_weight=1e-3))
    with pytest.raises(RuntimeError, match="too little to be seen"):
        update_errors({}, torch.float32, tied=True, checkpointing=False)


def test_ours_on_another_path_is_refused(monkeypatch):
    monkeypatch.setattr("benchmarks.training.trainers.ENGINE", "two-backward")
    with pytest.raises(RuntimeError, match="two-backward"):
        update_errors({"ours": ssiuu(update_in_backward=False)}, torch.float32, tied=True, checkpointing=False)


def test_a_wrong_step_is_not_timed():
    case = steps_of({"ours": nothing, "wrong": nothing}, {"ours": 0.01, "wrong": 0.2})
    rows = run_case(case, runs=4, copy=1e9)
    assert [(row["candidate"], row["passed"], "median_ms" in row) for row in rows] == [
        ("ours", True, True),
        ("wrong", False, False),
    ]


def test_a_nan_in_a_step_closes_the_gate():
    (row,) = run_case(steps_of({"ours": nothing}, {"ours": float("nan")}), runs=4, copy=1e9)
    assert row["passed"] is False


def test_a_candidate_that_runs_out_of_memory_has_a_row_that_says_so():
    rows = run_case(steps_of({"ours": out_of_memory, "peer": nothing}), runs=4, copy=1e9)
    assert [(row["candidate"], row["passed"], row.get("missing")) for row in rows] == [
        ("ours", None, "out of memory"),
        ("peer", True, None),
    ]
    assert rows[1]["times_ours"] is None


def test_turns_go_back_and_forth():
    built = []
    names = ["ours", "peer", "plain GD"]
    case = steps_of({name: lambda name=name: built.append(name) or (lambda: None) for name in names})
    turns = time_steps(case, names, runs=4)
    assert built == ["plain GD", "peer", "ours", "ours", "peer", "plain GD"]
    assert all(len(turn.steps) == 2 for taken in turns.values() for turn in taken)


def test_a_candidate_is_freed_after_its_turn():
    models = []

    def make():
        model = torch.nn.Linear(2, 2)
        models.append(weakref.ref(model))
        return lambda: model

    take_turn(make, steps=1)
    gc.collect()
    assert models[0]() is None


@measurable
def test_peak_memory_counts_what_was_freed_again():
    meter = PeakMemory()
    torch.ones(16 << 20)  # 64 MB, freed at once
    assert 60e6 < meter.read() < 120e6
    meter.reset()
    assert meter.read() < 30e6


@pytest.mark.parametrize("answer", [0, 1, 5, 14, 15])
def test_the_largest_that_fits(answer):
    asked = []
    found = largest_within(100 * answer + 50, lambda size: asked.append(size) or 100.0 * size, too_many=16)
    assert found == (answer, 100.0 * answer)
    assert len(asked) <= 4


@pytest.fixture
def budget_case(monkeypatch):
    """Steps whose peak is 30 bytes a layer for ours and 50 for the peer; a third is wrong, a fourth too large."""
    per_layer = {"ours": 30, "peer": 50, "wrong": 10, "huge": 1000}

    monkeypatch.setattr("benchmarks.harness.running.take_turn", lambda build, steps: Turn([1.0], build()))
    monkeypatch.setattr("benchmarks.harness.running.MEASURABLE", True)
    return BudgetCase(
        suite="memory",
        name="tiny budget",
        candidates={name: lambda layers, each=each: each * layers for name, each in per_layer.items()},
        errors=lambda: {"ours": 0.0, "peer": 0.0, "wrong": 1.0, "huge": 0.0},
        tolerance=0.1,
        budget=300,
        too_many=16,
        parameters=lambda layers: 7 * layers,
    )


def test_what_fits_into_a_budget(budget_case):
    ours, peer, wrong, huge = run_case(budget_case, runs=4, copy=1e9)
    assert (ours["layers"], ours["parameters"], ours["peak_bytes"]) == (10, 70, 300)
    assert peer["layers"] == 6
    assert wrong["passed"] is False
    assert huge["missing"] == "not one layer fits"


def test_running_out_of_memory_does_not_fit(budget_case, monkeypatch):
    def take(build, steps):
        return Turn([1.0], build()) if build.args[0] < 4 else None

    monkeypatch.setattr("benchmarks.harness.running.take_turn", take)
    assert run_case(budget_case, runs=4, copy=1e9)[0]["layers"] == 3


def test_docs_of_steps_and_budgets(tmp_path, budget_case):
    rows = run_case(steps_of({"ours": nothing, "peer": out_of_memory}), runs=4, copy=1e9)
    rows += run_case(budget_case, runs=4, copy=1e9)
    write_json(tmp_path / "results" / "gpu.json", rows, 1e9, provenance())
    *figures, page = write_docs(tmp_path / "results", tmp_path / "docs")
    for part in ("out of memory", "10 layers, 0 M parameters", "not one layer fits", "the faster of the two"):
        assert part in page.read_text()
    assert [figure.name for figure in figures] == ["gpu-step.png", "gpu-memory.png"]


def test_parameters_of_the_shapes():
    found = {name: round(parameters(shape) / 1e9, 2) for name, shape in LLAMA_SHAPES.items()}
    assert found == {"Llama-3.2-1B": 1.24, "Llama-3.2-3B": 3.21, "Llama-3.1-8B": 8.03}
    model = build(TINY, torch.float32)
    assert parameters(TINY) == sum(parameter.numel() for parameter in model.parameters())


@measurable
def test_both_suites_run_from_end_to_end(monkeypatch):
    monkeypatch.setattr(step, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(step, "BATCHES", [(2, 8)])
    monkeypatch.setattr(memory, "SHAPE", TINY)
    monkeypatch.setattr(memory, "BATCH", (1, 8))
    monkeypatch.setattr(memory, "TOO_MANY", 3)
    rows = [row for suite in (step, memory) for case in suite.cases() for row in run_case(case, runs=2, copy=1e9)]
    assert [row["candidate"] for row in rows] == 2 * list(TRAINERS)
    assert all(row["passed"] for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["times_ours"] > 0 for row in rows[: len(TRAINERS)])
    assert all(row["layers"] == 2 for row in rows[len(TRAINERS) :])

"""The benchmark harness: its gate, its record, and that every suite's cases fit together."""

import dataclasses
import json

import pytest
import torch

from benchmarks.__main__ import DOCS, RESULTS, main
from benchmarks.harness.cases import Case
from benchmarks.harness.gate import errors
from benchmarks.harness.record import provenance, write_json
from benchmarks.harness.running import run_case
from benchmarks.harness.timing import Elapsed, summarise
from benchmarks.plot import render, write_docs
from benchmarks.suites import SUITES
from benchmarks.training.models import Shape


def doubling(**candidates):
    """A case that doubles a vector, by the given candidates."""
    return Case(
        suite="test",
        name="double",
        moved_bytes=800,
        inputs=lambda: {"x": torch.randn(100)},
        candidates={name: lambda inputs, f=f: {"y": f(inputs["x"])} for name, f in candidates.items()},
        exact=lambda inputs: {"y": 2 * inputs["x"]},
        tolerance=1e-6,
    )


def test_a_wrong_result_is_not_timed():
    rows = run_case(doubling(ours=lambda x: 2 * x, wrong=lambda x: 2.1 * x), runs=2, copy=1e9)
    assert [(row["candidate"], row["passed"], "median_ms" in row) for row in rows] == [
        ("ours", True, True),
        ("wrong", False, False),
    ]


def test_a_nan_closes_the_gate():
    found = errors(doubling(ours=lambda x: 2 * x, broken=lambda x: x * float("nan")))
    assert found["ours"] == 0
    assert found["broken"] != found["broken"]


def test_candidates_do_not_see_each_others_writes():
    found = errors(doubling(first=lambda x: x.mul_(2), second=lambda x: x.mul_(2)))
    assert found == {"first": 0, "second": 0}


def test_percentiles():
    times = summarise([Elapsed(device=float(n), host=2.0 * n) for n in range(1, 12)])
    assert times == (6, 3, 9, 12, False)


def test_times_are_late_where_most_calls_were():
    on_time, late = Elapsed(1, 1), Elapsed(1, 1, late=True)
    assert not summarise([on_time, on_time, late]).late
    assert summarise([on_time, late, late]).late


def test_a_record_carries_its_provenance(tmp_path):
    write_json(tmp_path / "new" / "run.json", [{"suite": "test"}], copy=1e10, facts=provenance())
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert record["copy_gb_per_s"] == 10
    assert {"commit", "date", "cpu", "torch", "backend native"} <= set(record["provenance"])


SMALL = {
    "benchmarks.suites.glu.SHAPES": [(2, 3, 20)],
    "benchmarks.suites.scores.SHAPE": (2, 3, 20),
    "benchmarks.suites.penalty.SIZE": 1000,
    "benchmarks.suites.attribution.SHAPES": {"tiny": Shape(16, 2, 24, 2, 1, 50, tied=False)},
    "benchmarks.suites.attribution.BATCH": (2, 6),
}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_passes_its_own_gate(suite, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(name, value)
    for case in SUITES[suite]():
        found = errors(case) if isinstance(case, Case) else case.errors()
        assert all(error <= case.tolerance for error in found.values()), case.name


def test_exit_status_tells_of_a_wrong_result(tmp_path, monkeypatch):
    broken = doubling(ours=lambda x: 3 * x)
    monkeypatch.setattr("benchmarks.__main__.SUITES", {"test": lambda: [broken]})
    monkeypatch.setattr("benchmarks.__main__.copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr("sys.argv", ["benchmarks", "--runs", "2", "--out", str(tmp_path / "run.json")])
    assert main() == 1


def test_cases_are_chosen_by_their_names(tmp_path, monkeypatch):
    one, other = (dataclasses.replace(doubling(ours=lambda x: 2 * x), name=name) for name in ("one 3x4", "other 5x6"))
    monkeypatch.setattr("benchmarks.__main__.SUITES", {"test": lambda: [one, other]})
    monkeypatch.setattr("benchmarks.__main__.copy_bandwidth", lambda: 1e9)
    path = tmp_path / "run.json"
    monkeypatch.setattr("sys.argv", ["benchmarks", "--case", "5x6", "--runs", "2", "--out", str(path)])
    assert main() == 0
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["other 5x6"]


def test_a_peer_that_is_missing_has_a_row_with_the_reason():
    case = dataclasses.replace(doubling(ours=lambda x: 2 * x), missing={"peer": "is not installed"})
    *_, row = run_case(case, runs=2, copy=1e9)
    assert (row["candidate"], row["passed"], row["missing"]) == ("peer", None, "is not installed")


def test_a_rate_of_tokens():
    case = dataclasses.replace(doubling(ours=lambda x: 2 * x), moved_bytes=None, tokens=100)
    (row,) = run_case(case, runs=2, copy=1e9)
    assert row["tokens_per_s"] == pytest.approx(100 / (row["median_ms"] * 1e-3))
    assert "gb_per_s" not in row


def test_plot_shows_every_row_of_a_record(tmp_path):
    case = dataclasses.replace(
        doubling(ours=lambda x: 2 * x, peer=lambda x: x + x, wrong=lambda x: x), missing={"absent": "is not installed"}
    )
    write_json(tmp_path / "results" / "cpu.json", run_case(case, runs=2, copy=1e9), 1e9, provenance())
    *figures, page = write_docs(tmp_path / "results", tmp_path / "docs")
    text = page.read_text()
    for part in ("ours", "peer", "wrong result, not timed", "is not installed", "1.0 GB/s"):
        assert part in text
    assert [figure.name for figure in figures] == ["cpu-test.png"]
    assert figures[0].stat().st_size > 0


def test_the_committed_page_is_that_of_the_committed_records():
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    assert (DOCS / "benchmarks.md").read_text() == render(records)

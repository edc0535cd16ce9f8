"""The line of every step, and the warning of a penalty that does nothing."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ssiuu.commands.unlearn import unlearn
from ssiuu.data.prompts import PromptFormat
from ssiuu.training import step_log as recorder
from ssiuu.training.schedule import Part, Schedule
from ssiuu.training.step_log import StepRecord, peak_memory
from ssiuu.training.trainer import RecordedTrainer, training_arguments
from tests.support.small_runs import by, lines

OF_ALL = {"step", "seconds", "tokens_per_second", "peak_memory_bytes", "loss", "loss_grad_norm", "engine"}
OF_A_PENALTY = {"penalty", "penalty_grad_norm", "share", "lambda"}


@pytest.mark.parametrize(
    ("method", "changes", "fields"),
    [
        ("gd", {}, OF_ALL),
        ("ssiuu", {}, OF_ALL | OF_A_PENALTY),
        ("ssiuu", {"update_in_backward": True}, OF_ALL | OF_A_PENALTY),
    ],
    ids=["gd", "ssiuu", "in backward"],
)
def test_the_fields_of_a_line(options, tmp_path, method, changes, fields):
    first = lines(unlearn(by(options, method, max_steps=2, evaluate_every=2, **changes), tmp_path / "run"))[0]
    assert first.keys() == fields


def test_the_gradient_of_the_loss_is_measured_alike_with_and_without_a_penalty(options, tmp_path):
    first = [
        lines(unlearn(by(options, method, max_steps=1, accumulate=2), tmp_path / method))[0]
        for method in ("gd", "ssiuu")
    ]
    assert first[0]["loss_grad_norm"] == pytest.approx(first[1]["loss_grad_norm"], rel=1e-4)


def test_tokens_a_second_count_all_micro_batches_and_neither_padding_nor_evaluation(loaded, tmp_path, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    def evaluate(_):
        now[0] += 100.0
        return {}

    monkeypatch.setattr(recorder, "time", SimpleNamespace(perf_counter=tick))
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    samples = [prompts.encode("where ann born", "rome"), prompts.encode("where bob lives", "oslo oslo oslo")]
    recorded = []
    arguments = training_arguments(tmp_path, learning_rate=1e-3, max_steps=2, seed=0, accumulate=2)
    schedule = Schedule([Part(samples, 2, False)], 4, 0)
    RecordedTrainer(model, arguments, schedule, prompts, StepRecord(recorded.append, evaluate, 1)).train()
    tokens = sum(len(sample.prompt) + len(sample.answer) for sample in samples)
    assert [(line["seconds"], line["tokens_per_second"]) for line in recorded] == [(1.0, 2 * tokens)] * 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux says")
def test_peak_memory_of_the_process_is_in_bytes(monkeypatch):
    monkeypatch.setattr(recorder.torch.cuda, "is_available", lambda: False)
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert 0.9 < peak_memory() / (1024 * kibibytes) < 100  # never less; more where the process's starter was larger


def idle_warnings(caplog):
    return [record.message for record in caplog.records if "almost nothing" in record.message]


def test_an_idle_penalty_is_warned_of_once(options, tmp_path, caplog):
    unlearn(options.replace(penalty_share=None, penalty_weight=1e-9, max_steps=7), tmp_path / "run")
    (warning,) = idle_warnings(caplog)
    assert "--penalty-share" in warning


def test_a_penalty_at_work_is_not_warned_of(options, tmp_path, caplog):
    assert lines(unlearn(options, tmp_path / "run"))[-1]["share"] > 1e-3
    assert not idle_warnings(caplog)

"""What the types of weights and of autocast do to training: rounding, refusals, and nothing left for the next run."""

import os
from dataclasses import replace

import pytest
import torch

from ssiuu.commands.finetune import finetune
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.prompts import PromptFormat
from ssiuu.models.load import load_model
from ssiuu.options import FinetuneOptions
from ssiuu.runs.folder import Run
from ssiuu.training.schedule import Part, Schedule
from ssiuu.training.step_log import StepRecord
from ssiuu.training.trainer import RecordedTrainer, training_arguments
from tests.support.small_runs import KilledError, assert_resumes_bit_for_bit, by, kill_after, weights

METHODS = ("gd", "ssiuu")


@pytest.fixture
def narrow(options):
    """A run in bfloat16 at a rate far below half a unit in the last place of most weights."""
    return options.replace(dtype="bfloat16", learning_rate=1e-5, penalty_share=None, max_steps=12, save_every=0,
                   evaluate_every=12)  # fmt: skip


def movement(run, model_dir):
    """How far a run's weights have moved, as a vector."""
    start = load_model(model_dir)[0].state_dict()
    return torch.cat([(tensor.float() - start[name]).flatten() for name, tensor in weights(run).items()])


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_weights_move_as_float32_ones_do(narrow, model_dir, tmp_path, method):
    moved = [
        movement(unlearn(by(narrow, method, dtype=dtype), tmp_path / dtype), model_dir)
        for dtype in ("bfloat16", "float32")
    ]
    # Each scalar's rounding is noise; over them all the movements agree.
    along = moved[0] @ moved[1] / moved[1].norm() ** 2
    assert along == pytest.approx(1, abs=0.15)


def test_finetuned_bfloat16_weights_move_too(model_dir, facts_file, tmp_path):
    options = FinetuneOptions(model=str(model_dir), facts=str(facts_file), steps=12)
    moved = [
        movement(finetune(replace(options, dtype=dtype), tmp_path / dtype), model_dir)
        for dtype in ("bfloat16", "float32")
    ]
    assert moved[0] @ moved[1] / moved[1].norm() ** 2 == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("method", METHODS)
def test_rounding_is_said_once(narrow, tmp_path, caplog, method):
    unlearn(by(narrow, method, max_steps=2), tmp_path / "run")
    assert sum("rounded stochastically" in record.message for record in caplog.records) == 1


def test_float32_weights_are_not_spoken_of(options, tmp_path, caplog):
    unlearn(options.replace(max_steps=1), tmp_path / "run")
    assert not any("rounded" in record.message for record in caplog.records)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_bfloat16_run_resumes_bit_for_bit(narrow, tmp_path, monkeypatch, method):
    options = by(narrow, method, max_steps=5, save_every=2)
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_began_without_rounding_goes_on_without(narrow, tmp_path, monkeypatch, caplog, method):
    options = by(narrow, method, max_steps=4, save_every=2)
    monkeypatch.setattr("ssiuu.commands.unlearn._config", config_of_0_1_0())
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(KilledError):
            unlearn(options, tmp_path / "run")
    monkeypatch.undo()
    assert "stochastic_rounding" not in Run(tmp_path / "run").read("config.json")
    unlearn(options, tmp_path / "run", resume=True)
    assert not any("rounded" in record.message for record in caplog.records)


def config_of_0_1_0():
    from ssiuu.commands.unlearn import _config

    def config(options, regularizer):
        found = _config(options, regularizer)
        del found["stochastic_rounding"]
        return found

    return config


@pytest.mark.parametrize("method", METHODS)
def test_float16_weights_are_refused(options, tmp_path, method):
    with pytest.raises(ValueError, match=r"dtype='float16' cannot be trained.*use --dtype bfloat16, or float32 with"):
        unlearn(by(options, method, dtype="float16"), tmp_path / "run")
    with pytest.raises(ValueError, match="dtype='float16' cannot be trained"):
        finetune(FinetuneOptions(dtype="float16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def trainer(loaded, tmp_path):
    """Makes a trainer with these training arguments."""
    prompts = PromptFormat(loaded[1], 0)
    schedule = Schedule([Part([prompts.encode("where ann born", "rome")], 1, False)], 1, 0)

    def make(**changes):
        arguments = training_arguments(tmp_path, learning_rate=1e-3, max_steps=1, seed=0, **changes)
        return RecordedTrainer(loaded[0], arguments, schedule, prompts, StepRecord(print, lambda _: {}, 1))

    return make


def test_a_run_leaves_its_precision_to_no_other(trainer):
    assert trainer(bf16=True).accelerator.mixed_precision == "bf16"
    assert trainer().accelerator.mixed_precision == "no"


def test_a_launchers_precision_is_not_taken(trainer, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert trainer().accelerator.mixed_precision == "no"
    assert os.environ.get("ACCELERATE_MIXED_PRECISION") in (None, "no")  # transformers before 5 sets it


@pytest.mark.filterwarnings("error:.*deprecated:FutureWarning")
def test_checkpointing_goes_by_the_name_that_stays(trainer):
    made = trainer(gradient_checkpointing=True)
    made.train()
    assert getattr(made.args, "activation_checkpointing", made.args.gradient_checkpointing)

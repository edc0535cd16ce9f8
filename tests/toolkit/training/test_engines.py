"""How unlearning makes its gradients: both engines, updates in backward, and what the trainer refuses and warns of."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.commands import unlearn as unlearn_module
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.prompts import PromptFormat
from ssiuu.models.load import load_model
from ssiuu.optimizers import OptimizerOptions
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from ssiuu.training.schedule import Part, Schedule
from ssiuu.training.step_log import StepRecord
from ssiuu.training.trainer import training_arguments
from ssiuu.training.unlearn_trainer import UnlearnTrainer
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines, weights


@pytest.fixture
def in_backward(options, monkeypatch):
    """Options of a run whose matrices, small as they are, are updated in backward."""
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    return options.replace(update_in_backward=True)


def engines(run):
    return {line["engine"] for line in lines(run)}


@pytest.mark.parametrize("memory", [("bf16",), ("gradient_checkpointing",), ("bf16", "gradient_checkpointing")])
def test_one_backward_is_taken(in_backward, tmp_path, memory):
    run = unlearn(in_backward.replace(max_steps=2, **dict.fromkeys(memory, True)), tmp_path / "run")
    assert engines(run) == {"one-backward"}


def test_both_engines_end_in_nearly_the_same_weights(options, tmp_path):
    one = unlearn(options, tmp_path / "one")
    two = unlearn(options.replace(engine="two-backward"), tmp_path / "two")
    assert (engines(one), engines(two)) == ({"one-backward"}, {"two-backward"})
    start = load_model(options.model)[0].state_dict()
    for name, actual in weights(one).items():
        moved = (weights(two)[name] - start[name]).norm()
        assert (actual - weights(two)[name]).norm() < 1e-3 * moved, name


def test_updates_in_backward_change_no_bit(in_backward, tmp_path):
    during = weights(unlearn(in_backward, tmp_path / "during"))
    after = weights(unlearn(in_backward.replace(update_in_backward=False), tmp_path / "after"))
    assert all(torch.equal(during[name], after[name]) for name in after)


def test_updates_in_backward_free_the_gradients(in_backward, tmp_path, monkeypatch):
    left = []

    def look(trainer):
        left.extend(name for name, param in trainer.model.named_parameters() if param.grad is not None)
        return {}

    monkeypatch.setattr(UnlearnTrainer, "gradient_metrics", look)
    unlearn(in_backward.replace(max_steps=1), tmp_path / "run")
    assert left
    assert all("norm" in name for name in left)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_killed_run_with_updates_in_backward_resumes_bit_for_bit(in_backward, tmp_path, monkeypatch, step):
    assert_resumes_bit_for_bit(in_backward, tmp_path, monkeypatch, step)


def test_a_fall_back_to_two_backwards_is_said_once(options, tmp_path, monkeypatch, caplog):
    def load_mixing(*args, **kwargs):
        model, tokenizer = load_model(*args, **kwargs)
        model.lm_head.register_forward_hook(lambda module, _, logits: logits + 0 * module.weight.sum())
        return model, tokenizer

    monkeypatch.setattr(unlearn_module, "load_model", load_mixing)
    run = unlearn(options.replace(max_steps=3), tmp_path / "run")
    assert engines(run) == {"two-backward"}
    (said,) = (record.message for record in caplog.records if "two backwards" in record.message)
    assert "lm_head.weight is used by SumBackward0" in said


def test_two_backwards_that_were_asked_for_are_not_warned_of(options, tmp_path, caplog):
    unlearn(options.replace(engine="two-backward", max_steps=1), tmp_path / "run")
    assert not any("two backwards" in record.message for record in caplog.records)


def test_two_backwards_are_not_warned_of_where_a_loss_takes_no_other(options, tmp_path, caplog):
    run = unlearn(by(options, "rmu", "ssiuu", rmu_layer=1, max_steps=1), tmp_path / "run")
    assert engines(run) == {"two-backward"}
    assert not any("two backwards" in record.message for record in caplog.records)


REFUSED = {
    "clipping": ("max_grad_norm=1.0; expected 0", {"max_grad_norm": 1.0}),
    "accumulation": (r"\(gradient_accumulation_steps\); expected 1", {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.values(), ids=REFUSED)
def test_the_trainer_refuses_with_updates_in_backward(loaded, tmp_path, message, changes):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    arguments = training_arguments(tmp_path, learning_rate=1e-3, max_steps=1, seed=0)
    for name, value in changes.items():
        setattr(arguments, name, value)
    schedule = Schedule([Part([prompts.encode("where ann born", "rome")], 1, True)], 1, 0)
    method, regularizer = make(UnlearnOptions())
    with sk.patch(model, scope="all") as handle, pytest.raises(ValueError, match=f"update_in_backward=True.*{message}"):
        UnlearnTrainer(
            model, arguments, schedule, prompts, StepRecord(print, lambda _: {}, 1), handle=handle,
            method=method, regularizer=regularizer, options=OptimizerOptions(1e-3, update_in_backward=True),
        )  # fmt: skip

"""A step of several micro-batches against one that sees all samples at once."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.data.prompts import Encoded, PromptFormat
from ssiuu.methods.base import UnlearnData
from ssiuu.models.load import load_model
from ssiuu.optimizers import OptimizerOptions
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from ssiuu.training.schedule import Part, Schedule
from ssiuu.training.step_log import StepRecord
from ssiuu.training.trainer import RecordedTrainer, training_arguments
from ssiuu.training.unlearn_trainer import UnlearnTrainer

SHORT, LONG = ("where ann born", "rome"), ("where bob lives", "oslo rome oslo lima rome oslo")


@pytest.fixture
def step(model_dir, tmp_path):
    """Line and gradients of one step: of fine-tuning, or of unlearning by a method."""

    def take(accumulate, method=None):
        model, tokenizer = load_model(model_dir)
        prompts = PromptFormat(tokenizer, 0)
        samples = [prompts.encode(*pair) for pair in (SHORT, LONG)]
        others = [prompts.encode(question, answer) for question, answer in zip(("where cid born", "where dee lives"),
                  (LONG[1], SHORT[1]), strict=True)]  # fmt: skip
        parts = [Part(samples, 2 // accumulate, method is not None)]
        parts += [Part(others, 2 // accumulate, False)] if method else []
        arguments = training_arguments(tmp_path, learning_rate=1e-3, max_steps=1, seed=0, accumulate=accumulate)
        lines, found = [], {}
        rest = (model, arguments, Schedule(parts, accumulate, 3), prompts, StepRecord(lines.append, lambda _: {}, 1))

        class Looking(UnlearnTrainer if method else RecordedTrainer):
            def gradient_metrics(self):
                for name, param in self.model.named_parameters():
                    found[name] = param.grad.clone()
                    if method == "ssiuu":
                        found[f"target of {name}"] = param.target_grad.clone()
                return super().gradient_metrics()

        if method is None:
            Looking(*rest).train()
        else:
            made, regularizer = make(
                UnlearnOptions(method=method, settings={"penalty_weight": 1.0} if method == "ssiuu" else {})
            )
            with sk.patch(model, scope="all") as handle:
                data = UnlearnData([], [], samples, others, prompts, seed=0)
                made.setup(model, handle, data)
                regularizer.setup(model, handle, made, data)
                Looking(
                    *rest, handle=handle, method=made, regularizer=regularizer, options=OptimizerOptions(1e-3)
                ).train()
        return lines[0], found

    return take


@pytest.mark.parametrize("method", [None, "gd", "ssiuu"])
def test_micro_batches_count_by_their_tokens(step, method):
    (whole, expected), (parts, actual) = step(1, method), step(2, method)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["loss_grad_norm"] == pytest.approx(whole["loss_grad_norm"], rel=1e-4)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max()), name


def test_tokens_of_a_step():
    samples = [Encoded([1], [2] * length) for length in (1, 2, 3)]
    schedule = Schedule([Part(samples, 3, True), Part([Encoded([1], [2] * 10)], 1, False)], 4, 0)
    assert schedule.tokens(range(2), True) == 12
    assert schedule.tokens(range(2), False) == 20
    assert schedule.tokens(range(2, 3)) == 16

"""sequence_log_probs against transformers' own loss, and the derivative of each target."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import TARGETS, answer_lengths, target_factor

from ..support.models import logits_of, tiny_batch, tiny_model


@pytest.mark.parametrize("padding", ["left", "right"])
def test_equals_the_models_own_loss(padding):
    model, batch = tiny_model("gpt2", torch.float64), tiny_batch(padding)
    log_probs = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    for sample in range(4):
        loss = model(**{name: tensor[sample : sample + 1] for name, tensor in batch.items()}).loss
        assert torch.allclose(log_probs[sample], -4 * loss.double(), rtol=1e-6)


def test_float32_for_narrow_logits():
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(0, 7, (2, 5))
    assert sk.sequence_log_probs(logits, labels).dtype == torch.float32


def test_a_sample_without_an_answer_is_named():
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])  # a label in column 0 is never predicted
    with pytest.raises(ValueError, match=r"samples \[1\] have no answer token"):
        sk.sequence_log_probs(torch.randn(2, 3, 7), labels)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits has shape \[2, 3, 7\] and labels \[2, 4\]"):
        sk.sequence_log_probs(torch.randn(2, 3, 7), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("target", TARGETS)
def test_target_factor_is_the_derivative(target):
    log_probs = (-3 * torch.rand(5, dtype=torch.float64)).requires_grad_()
    lengths = torch.tensor([1, 2, 3, 4, 5])
    value = {
        "prob": lambda s: s.exp(),
        "geometric_mean_prob": lambda s: (s / lengths).exp(),
        "log_prob": lambda s: s,
    }[target](log_probs)
    (derivative,) = torch.autograd.grad(value.sum(), log_probs)
    assert torch.allclose(target_factor(log_probs, lengths, target), derivative)


def test_answer_lengths_skip_column_zero():
    assert answer_lengths(torch.tensor([[1, 2, -100, 4]])).tolist() == [2]


def test_unknown_target():
    with pytest.raises(ValueError, match="probability"):
        target_factor(torch.zeros(1), torch.ones(1), "probability")

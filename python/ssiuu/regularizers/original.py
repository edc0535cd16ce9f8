"""The model before unlearning: gradients and attributions of the answers that it gives to the forget facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import answer_lengths, target_factor

from ..evaluation.mode import eval_mode
from ..methods.base import UnlearnData
from ..progress import job
from .base import trained


def target_gradients(model: nn.Module, data: UnlearnData, target: str, size: int) -> Iterator[list[Tensor]]:
    """`sum_b d target_b / dphi` over every `size` forget samples in turn, one tensor per trained parameter.

    By plain backwards in eval mode, without autocast. `grad` and the random number generators are left alone.

    Args:
        target: as in `ssiuu_kernels`' unlearning_loss.
        size: samples per forward and backward.
    """
    params, samples = trained(model), data.forget_samples
    with job("attribute the forget facts", len(samples)) as bar, eval_mode(model):
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            batch = {name: tensor.to(model.device) for name, tensor in data.prompts.collate(part).items()}
            labels = batch.pop("labels")
            log_probs = sk.sequence_log_probs(model(**batch, use_cache=False).logits, labels)
            factor = target_factor(log_probs, answer_lengths(labels), target)
            grads = torch.autograd.grad(log_probs, params, factor, allow_unused=True, materialize_grads=True)
            bar.advance(len(part))
            yield list(grads)


def attribution(param: nn.Parameter, grad: Tensor) -> Tensor:
    """`phi * grad`, apart; a ValueError where it is not finite."""
    found = grad * param.detach()
    if not bool(found.isfinite().all()):
        raise ValueError(
            f"an attribution of the original model, of a parameter of shape {list(param.shape)}, is not finite; check "
            "the model's weights"
        )
    return found


class OriginalAttributions:
    """`A = phi dtarget_b/dphi` of the model before unlearning, of each forget fact b by itself.

    Kept on the CPU in the parameters' types.

    Args:
        model, data, target: as in `target_gradients`.

    Raises:
        ValueError: an attribution that is not finite.
    """

    def __init__(self, model: nn.Module, data: UnlearnData, target: str):
        params, facts = trained(model), len(data.forget_samples)
        self._of = {param: torch.empty((facts, *param.shape), dtype=param.dtype, device="cpu") for param in params}
        for fact, grads in enumerate(target_gradients(model, data, target, 1)):
            for param, grad in zip(params, grads, strict=True):
                self._of[param][fact] = attribution(param, grad)

    @staticmethod
    def size(model: nn.Module, data: UnlearnData) -> int:
        """Bytes that they take."""
        return len(data.forget_samples) * sum(param.numel() * param.element_size() for param in trained(model))

    def sum_over(self, facts: Sequence[int]) -> dict[nn.Parameter, Tensor]:
        """The sum over these facts, each as often as it is named; on the CPU, shaped like the parameters."""
        return {param: values[list(facts)].sum(0) for param, values in self._of.items()}

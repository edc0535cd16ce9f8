"""KLUE: gradient difference on the MLP neurons that hold the forget facts, and on facts not yet forgotten."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels.modules.recognise import Mlp, find_mlps, is_transposed

from ..data.prompts import Encoded
from ..evaluation.mode import eval_mode
from ..options import UnlearnOptions
from ..progress import job
from .base import UnlearnData
from .likelihood import GradientDifference
from .registry import register_method

BATCH_SIZE = 16  # sequences per forward and backward of the scores


class NeuronParameter(NamedTuple):
    """A parameter with one row or column per neuron of an MLP.

    Attributes:
        param: the weight or bias.
        dim: which of its dimensions counts neurons.
        copies: how often they follow one another there; 2 where gate and up are one projection.
    """

    param: nn.Parameter
    dim: int
    copies: int

    def mask(self, chosen: Tensor) -> Tensor:
        """bool, of a shape that broadcasts to the parameter's; `chosen` is bool `[neurons]`."""
        shape = [1] * self.param.dim()
        shape[self.dim] = -1
        return chosen.repeat(self.copies).view(shape)


def neuron_parameters(mlp: Mlp) -> Iterator[NeuronParameter]:
    """What makes a neuron: its row of gate and up, their biases, and its column of down (whose bias is no neuron's)."""
    *inputs, down = mlp.projections
    copies = 2 if mlp.form == "packed" else 1
    for linear in inputs:
        yield NeuronParameter(linear.weight, int(is_transposed(linear)), copies)
        if linear.bias is not None:
            yield NeuronParameter(linear.bias, 0, copies)
    yield NeuronParameter(down.weight, int(not is_transposed(down)), 1)


@register_method
class Klue(GradientDifference):
    """KLUE: GD that trains only a fraction of the MLP neurons, those most particular to the forget facts.

    A neuron's score is `sum_(q, a) [ I(q, a) - alpha / N sum_(q') I(q', a) ]` over the forget facts, with N other
    questions q' to each, and `I(q, a) = max over tokens of h dP(a|q)/dh`. It is computed once, before unlearning. The
    neurons with the highest scores of all layers train: their rows of gate and up, the biases of these, and their
    columns of down.
    A forget fact that is answered wrongly leaves the loss, and comes back when it is answered again (`StoppedFacts`).
    Yang et al. 2025, arXiv 2502.19207, as SSIUU's paper uses it.
    """

    name, label, color = "klue", "KLUE", "#999933"
    summary = "gradient difference on the MLP neurons that hold the forget facts"
    source = (
        "the paper (KLUE, Yang et al. 2025); ours: the exact score, ranking over all layers together, other questions "
        "from forget and retain facts with another answer, forgotten facts that come back when they are answered again"
    )
    stops_facts = True

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            klue_fraction: of all MLP neurons, those to train. Paper: 0.1.
            klue_alpha: weight of what a neuron does for the same answer to other questions. Paper: 10.
            klue_questions: other questions per forget fact. Paper: 5.
        """

        klue_fraction: float = 0.1
        klue_alpha: float = 10.0
        klue_questions: int = 5

    def __init__(self, options: Any):
        super().__init__(options)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def check(self, run: UnlearnOptions) -> None:
        options = self.options
        if not 0 < options.klue_fraction <= 1:
            raise ValueError(f"klue_fraction={options.klue_fraction}; expected a fraction above 0 and at most 1")
        if not 0 <= options.klue_alpha < math.inf:
            raise ValueError(f"klue_alpha={options.klue_alpha}; expected a finite number, at least 0")
        if options.klue_questions < 1:
            raise ValueError(f"klue_questions={options.klue_questions}; expected at least 1")
        if run.weight_decay:
            raise ValueError(
                f"weight_decay={run.weight_decay} with method 'klue' would also move the weights that are masked; "
                "expected 0"
            )

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Weights and biases of the MLPs' neurons.

        Raises:
            ValueError: an MLP whose neurons cannot be attributed, or none at all.
        """
        found, skipped = find_mlps(model)
        if skipped:
            name, reason = next(iter(skipped.items()))
            raise ValueError(f"method 'klue' ranks the neurons of every MLP, and {name} cannot be attributed: {reason}")
        if not found:
            raise ValueError(f"method 'klue' needs MLPs, and {type(model).__name__} has none of a form that is known")
        return [neuron.param for mlp in found.values() for neuron in neuron_parameters(mlp)]

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        super().setup(model, handle, data)
        for name, chosen in self.chosen(self.scores()).items():
            for neuron in neuron_parameters(handle.mlps[name]):
                mask = neuron.mask(chosen.to(neuron.param.device))
                self._hooks.append(neuron.param.register_hook(partial(_masked, mask)))

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def scores(self) -> dict[str, Tensor]:
        """The score of every neuron, float64 `[neurons]` on the CPU, by the name of its MLP.

        Raises:
            ValueError: too few other questions; scores that are not finite, or all 0.
        """
        samples, weights = self._samples()
        scores: dict[str, Tensor] = {}
        with job("score neurons", len(samples)) as bar, eval_mode(self.model):
            for part, weight in zip(_batches(samples), _batches(weights), strict=True):
                batch = {name: ids.to(self.model.device) for name, ids in self.data.prompts.collate(part).items()}
                found = self.handle.attribute(batch, target="prob")
                for name in filter(found.__contains__, self.handle.mlps):  # others saw no token
                    score = torch.tensor(weight, dtype=torch.float64) @ found[name]["h"].max.double().cpu()
                    scores[name] = scores.get(name, 0) + score
                bar.advance(len(part))
        return _checked(scores)

    def _samples(self) -> tuple[list[Encoded], list[float]]:
        """What is attributed: forget facts, and the same answers to other questions; and the weight of each."""
        draw, number = random.Random(self.data.seed), self.options.klue_questions
        facts = (*self.data.forget, *self.data.retain)
        samples, weights = [], []
        for fact, sample in zip(self.data.forget, self.data.forget_samples, strict=True):
            answered = {other.question for other in facts if other.answer == fact.answer} | {fact.question}
            others = sorted({other.question for other in facts} - answered)
            if number > len(others):
                raise ValueError(
                    f"klue_questions={number} is more than the {len(others)} questions of forget and retain facts "
                    f"whose answer is not {fact.answer!r}; ask for fewer, or give more facts"
                )
            mismatched = [self.data.prompts.encode(question, fact.answer) for question in draw.sample(others, number)]
            samples += [sample, *mismatched]
            weights += [1.0, *[-self.options.klue_alpha / number] * number]
        return samples, weights

    def chosen(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """bool `[neurons]` of each MLP: those that train, with the highest scores of all MLPs together.

        Of neurons with equal scores, as relu gives, those of earlier layers come first.
        """
        every = torch.cat(list(scores.values()))
        number = max(1, round(self.options.klue_fraction * len(every)))
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[every.argsort(descending=True, stable=True)[:number]] = True
        return dict(zip(scores, chosen.split([len(part) for part in scores.values()]), strict=True))


def _batches(values: Sequence) -> list[Sequence]:
    return [values[first : first + BATCH_SIZE] for first in range(0, len(values), BATCH_SIZE)]


def _masked(mask: Tensor, grad: Tensor) -> Tensor:
    return torch.where(mask, grad, 0)


def _checked(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`scores` that rank neurons."""
    if not all(part.isfinite().all() for part in scores.values()):
        raise ValueError("method 'klue' found scores of neurons that are not finite; check the model's weights")
    if not any(part.any() for part in scores.values()):
        raise ValueError(
            "method 'klue' ranks neurons by dP(answer)/dh, and every score is 0: the answers' probabilities vanish, as "
            "those of long answers do; use facts that the model knows (--known-probability) or another method"
        )
    return scores

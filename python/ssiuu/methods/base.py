"""What an unlearning method is: its options, what it prepares once, and its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels.loss.objectives import Objective

from ..data.facts import Fact
from ..data.prompts import Encoded, PromptFormat
from ..options import UnlearnOptions


@dataclass(frozen=True)
class Batch:
    """What one forward sees: forget samples, their companions, then retain samples.

    Attributes:
        input_ids, attention_mask, labels: int64 `[B, S]`; labels are -100 on prompts and padding.
        forget: bool `[B]`, the samples to forget.
        stopped: bool `[B]`, those of them that are forgotten and so left the loss; `kept` is the batch without them.
        companion: bool `[B]`, samples that a method adds to the forget samples (DPO's preferred answers).
        ids: int64 `[B]`, the place of each sample in its set; of a companion, that of its forget sample.
        forget_tokens, retain_tokens: answer tokens of each set in the whole step, divided by its micro-batches; those
            of stopped samples do not count.
        forget_samples: as many forget samples as are not stopped in the whole step, divided by its micro-batches.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    forget: Tensor
    stopped: Tensor
    companion: Tensor
    ids: Tensor
    forget_tokens: float
    retain_tokens: float
    forget_samples: float

    @property
    def retain(self) -> Tensor:
        """bool `[B]`, the samples to keep."""
        return ~self.forget & ~self.companion

    @property
    def kept(self) -> Batch:
        """The batch that the loss is of."""
        return self.only(~self.stopped) if bool(self.stopped.any()) else self

    @property
    def forget_weight(self) -> float:
        """What makes a mean over these forget samples the micro-batch's part of the mean over the step's."""
        number = int(self.forget.sum())
        return number / self.forget_samples if number else 0.0

    def only(self, chosen: Tensor) -> Batch:
        """The batch of these samples alone; `chosen` is bool `[B]`."""
        rows = ("input_ids", "attention_mask", "labels", "forget", "stopped", "companion", "ids")
        return replace(self, **{name: getattr(self, name)[chosen] for name in rows})


@dataclass(frozen=True)
class UnlearnData:
    """The two sets, as facts and as the samples that a batch's `ids` count.

    Attributes:
        forget, retain: the facts.
        forget_samples, retain_samples: each fact with its prompt and true answer, in the same order.
        prompts: how text becomes tokens.
        seed: of the run, for a method's own random choices.
    """

    forget: Sequence[Fact]
    retain: Sequence[Fact]
    forget_samples: Sequence[Encoded]
    retain_samples: Sequence[Encoded]
    prompts: PromptFormat
    seed: int


class Loss(NamedTuple):
    """A method's loss of one batch.

    Attributes:
        value: 0-dim, to minimise.
        logits: `[B, S, V]` of the batch from the forward that `value` comes from, for a regularizer that needs the
            answers' log-likelihoods. None where that forward did not run on the patched model: a regularizer that needs
            logits takes `Method.forward` of the forget samples, one more forward.
    """

    value: Tensor
    logits: Tensor | None


class Method(ABC):
    """An unlearning method; any differentiable loss.

    One is registered by `@register` (registry.py). An instance belongs to one run: `setup` is called once, with the
    model before unlearning; `loss` for every micro-batch.

    Attributes:
        name: as the command line knows it.
        label, color: in tables and figures.
        summary: one line.
        source: where the method comes from, and what in it is our choice.
        Options: a frozen dataclass, whose field names are the option names.
        model, handle, data: from `setup`; the model is a causal language model of transformers.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    color: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    stops_facts: ClassVar[bool] = False  # whether forgotten facts leave the loss without --stop-facts too

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, options: Any):
        self.options = options

    def check(self, run: UnlearnOptions) -> None:
        """Raise a ValueError for options out of range, and for a run that the method cannot go with.

        No model is loaded yet.
        """

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters to train; the others are frozen during the run.

        Raises:
            ValueError: the model does not have what the options ask for.
        """
        return [param for param in model.parameters() if param.requires_grad]

    def companions(self, data: UnlearnData) -> list[Encoded] | None:
        """A sample that goes with each forget sample; None where the method needs none."""
        return None

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        """Prepare what the loss needs once: reference log-probabilities, frozen activations, masks.

        The model is the one before unlearning, also where a run is resumed. What is kept here is not in a checkpoint
        and has to come out the same again.
        """
        self.model, self.handle, self.data = model, handle, data

    def teardown(self) -> None:
        """Take back what `setup` did to the model; called when the run ends, whichever way."""

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """The loss of a micro-batch without stopped samples (`Batch.kept`), with its graph.

        It may lack forget or retain samples: the term of these is left out.
        """

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B, S, V]`."""
        return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits

    # What a run asks between steps.

    @property
    def finished(self) -> bool:
        """Whether the method's own stop is reached."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""


class LikelihoodMethod(Method):
    """A method whose loss is a function of the samples' log-likelihoods: one backward serves it and a penalty."""

    @abstractmethod
    def objective(self, batch: Batch) -> Objective:
        """(log_probs `[B]`, answer lengths `[B]`, forget `[B]`) -> scalar; see `ssiuu_kernels`' unlearning_loss.

        Args:
            batch: without stopped samples.
        """

    def objective_of_kept(self, batch: Batch) -> Objective:
        """The objective as a function of all the batch's samples, of which the stopped ones do not count."""
        kept = ~batch.stopped
        objective = self.objective(batch.kept)
        return lambda log_probs, lengths, forget: objective(log_probs[kept], lengths[kept], forget[kept])

    def loss(self, batch: Batch) -> Loss:
        """The objective of this batch."""
        logits = self.forward(batch)
        value = self.handle.unlearning_loss(logits, batch.labels, batch.forget, self.objective(batch), target=None)
        return Loss(value, logits)


def over_the_step(objective: Objective, batch: Batch) -> Objective:
    """`objective`, whose means over tokens are over the tokens of the whole step instead of the micro-batch's."""
    of_forget = _of_tokens(objective, batch.forget, batch.forget_tokens)
    return _of_tokens(of_forget, batch.retain, batch.retain_tokens)


def samples_over_the_step(objective: Objective, batch: Batch) -> Objective:
    """As `over_the_step`, for objectives whose forget term is a mean over samples; their lengths stay true."""
    weight = batch.forget_weight or 1.0  # without forget samples there is the retain term alone
    # The retain term is the smaller by the weight by which both are then multiplied.
    compute = _of_tokens(objective, batch.retain, batch.retain_tokens * weight)
    return lambda log_probs, lengths, forget: weight * compute(log_probs, lengths, forget)


def _of_tokens(objective: Objective, chosen: Tensor, tokens: float) -> Objective:
    """`objective`, whose mean over the tokens of the chosen samples divides by `tokens`.

    Such a mean divides by the sum of the chosen lengths, which is here scaled to that number.
    """

    def compute(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
        scaled = lengths * (tokens / lengths[chosen].sum())
        return objective(log_probs, torch.where(chosen, scaled, lengths), forget)

    return compute

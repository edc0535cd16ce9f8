"""What every optimizer step leaves behind: its line, its checks and its warning."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, TrainerCallback

logger = logging.getLogger(__name__)

MAX_STEPS = "max_steps"  # what ended a run that no stop ended
MINUTE_SHARE = 1e-3  # below it the penalty outweighs the loss in almost no parameter
NORMS = {"loss_grad_norm": "the gradient's norm", "penalty_grad_norm": "the penalty's gradient norm"}
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what getrusage counts in


class DivergedError(ValueError):
    """Training met a loss or a gradient that is not finite."""


class StepRecord(NamedTuple):
    """Hooks of a run.

    Attributes:
        write: receives the line of every step: "step", "seconds" (evaluation left out), "tokens_per_second" (of all
            micro-batches, padding left out), "peak_memory_bytes" (`peak_memory`), "loss", "loss_grad_norm"; of
            unlearning also "engine" (which made the gradients: one-backward, two-backward, or plain without a
            penalty), "facts_in_loss" (forget samples of the step, where facts can leave), and what its regularizer
            measures ("penalty", "penalty_grad_norm", "share" and "lambda"). The last line has
            "stopped_by": what `stop` returned, or "max_steps".
        evaluate: returns scores of the model as it is; called every `evaluate_every` steps, and merged into the line.
        evaluate_every: in optimizer steps.
        stop: what in these scores ends the run; None where it goes on.
    """

    write: Callable[[dict], None]
    evaluate: Callable[[PreTrainedModel], dict[str, float]]
    evaluate_every: int
    stop: Callable[[dict[str, float]], str | None] = lambda _: None


def check_finite(name: str, value: float, step: int) -> None:
    """Raise `DivergedError` if this value of this step is not finite."""
    if not math.isfinite(value):
        raise DivergedError(
            f"{name} is {value} at step {step}; stopped before a checkpoint took it in: use a lower learning rate or "
            "penalty weight"
        )


def peak_memory() -> int:
    """Bytes: on a GPU the most that torch had allocated since the step began, on the CPU the largest resident size
    that the process has had since it began."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


class StepLog(TrainerCallback):
    """Measures and records every optimizer step, evaluates, and stops.

    Args:
        record: receives the lines.
        before_update: measures the gradients before the optimizer uses them.
        after_update: what is known of a step once it is done.
    """

    def __init__(self, record: StepRecord, before_update: Callable[[], dict], after_update: Callable[[], dict]):
        self.record, self.before_update, self.after_update = record, before_update, after_update
        self.warned = False

    def add(self, loss: float, tokens: int, step: int) -> None:
        """Take in a micro-batch of step `step`.

        Raises:
            DivergedError: the loss is not finite.
        """
        check_finite("the loss", loss, step)
        self.loss += loss
        self.tokens += tokens

    def on_step_begin(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.start, self.loss, self.tokens = time.perf_counter(), 0.0, 0

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.gradients = self.before_update()

    def on_step_end(self, args, state, control, model, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the update is part of the step
        seconds = time.perf_counter() - self.start
        line = {
            "step": state.global_step,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_memory_bytes": peak_memory(),
            "loss": self.loss,
            **self.gradients,
            **self.after_update(),
        }
        for key, name in NORMS.items():  # known once a fused step is done; its weights are in no checkpoint yet
            check_finite(name, line.get(key, 0.0), line["step"])
        self._warn_of_idle_penalty(line)
        if state.global_step % self.record.evaluate_every == 0 or state.global_step == args.max_steps:
            scores = self.record.evaluate(model)
            line |= scores
            reason = self.record.stop(scores)
            control.should_training_stop |= reason is not None
            if control.should_training_stop or state.global_step == args.max_steps:
                line["stopped_by"] = reason or MAX_STEPS
        self.record.write(line)

    def _warn_of_idle_penalty(self, line: dict) -> None:
        # A steered lambda is still on its way in the first steps.
        if self.warned or line["step"] < 5 or line.get("share", 1) >= MINUTE_SHARE:
            return
        self.warned = True
        logger.warning(
            "the penalty outweighs the loss in a share of %.1e of the parameters of negative attribution: it does "
            "almost nothing. For example, --penalty-share 0.25 steers lambda to where it has an effect",
            line["share"],
        )

"""The trainer of an unlearning run: a method's loss, a regularizer on it, and what both keep in checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

import ssiuu_kernels as sk
from ssiuu_kernels import ENGINES

from ..methods.base import Batch, LikelihoodMethod, Method
from ..optimizers import OptimizerOptions, check_update_in_backward, say_rounding
from ..regularizers.base import Regularizer
from .stopped_facts import StoppedFacts
from .trainer import RecordedTrainer

logger = logging.getLogger(__name__)

ONE_BACKWARD, TWO_BACKWARD = ENGINES[:2]
STATE = "unlearning.pt"  # in a checkpoint: the state of the method and of the regularizer, and the facts that left


class UnlearnTrainer(RecordedTrainer):
    """Unlearns by a method with a regularizer, both set up.

    Args:
        arguments: as for `RecordedTrainer`.
        handle: of `ssiuu_kernels.patch(model, scope="all")`.
        method, regularizer: of this run.
        options: of the optimizer.
        stopped: which forget facts have left the loss; None where none ever do.

    Raises:
        ValueError: an update in backward with several micro-batches per step, or clipping.
    """

    def __init__(
        self,
        *arguments,
        handle: sk.PatchHandle,
        method: Method,
        regularizer: Regularizer,
        options: OptimizerOptions,
        stopped: StoppedFacts | None = None,
    ):
        self.stopped = stopped
        self.handle, self.method, self.regularizer, self.options = handle, method, regularizer, options
        # Another loss takes two with a penalty, whatever was asked for.
        self.expects_one_backward = handle.engine == ONE_BACKWARD and isinstance(method, LikelihoodMethod)
        super().__init__(*arguments)
        if options.update_in_backward:
            check_update_in_backward(self.args.gradient_accumulation_steps, self.args.max_grad_norm)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            if self.options.stochastic_rounding:
                say_rounding()
            self.optimizer = self.regularizer.optimizer(params, self.options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The method's loss as the regularizer has it."""
        stopped = self.stopped.ids if self.stopped else []
        batches = self.step_batches()
        self.facts_in_loss = len(self.train_dataset.samples(batches, True, stopped))
        out = torch.isin(inputs["ids"], inputs["ids"].new_tensor(stopped))
        batch = Batch(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "labels", "forget", "companion", "ids")},
            stopped=inputs["forget"] & out,
            forget_tokens=self.mean_tokens(True, stopped),
            retain_tokens=self.mean_tokens(False),
            forget_samples=self.facts_in_loss / len(batches),
        )
        idle = batch.companion & out
        loss = self.regularizer.loss(batch.only(~idle) if bool(idle.any()) else batch)
        self._warn_of_second_backward()
        return (loss, None) if return_outputs else loss

    def forward_backward(self, model, inputs, num_items_in_batch) -> Tensor:
        run = super().forward_backward
        return self.regularizer.forward_backward(lambda: run(model, inputs, num_items_in_batch))

    def _warn_of_second_backward(self) -> None:
        path = self.handle.path
        if self.expects_one_backward and path is not None and path.engine == TWO_BACKWARD:
            self.expects_one_backward = False
            logger.warning("two backwards per step, where one was asked for: %s", path.reason)

    def gradient_metrics(self) -> dict[str, float]:
        # A penalised optimizer measures the norm on its way; an update in backward leaves no gradients to measure.
        return {} if self.regularizer.measures_gradients else super().gradient_metrics()

    def optimizer_metrics(self) -> dict[str, float | str]:
        path = self.handle.path
        facts = {} if self.stopped is None else {"facts_in_loss": self.facts_in_loss}
        return {**self.regularizer.metrics(), **facts, "engine": "plain" if path is None else path.engine}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {"method": self.method.state_dict(), "regularizer": self.regularizer.state_dict()}
        if self.stopped is not None:
            state["stopped"] = self.stopped.ids
        torch.save(state, Path(output_dir) / STATE)

    def load_states(self, checkpoint: Path) -> None:
        """Give the method and the regularizer the state that they had at this checkpoint."""
        file = checkpoint / STATE
        if file.is_file():  # runs of 0.1.0 kept none
            state = torch.load(file, weights_only=True)
            self.method.load_state_dict(state["method"])
            self.regularizer.load_state_dict(state["regularizer"])
            if self.stopped is not None:
                self.stopped.ids = state["stopped"]

"""Training on transformers' Trainer: a deterministic schedule, a record of every step, and the unlearning loss."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import ssiuu_kernels as sk

from .methods import Method, OptimizerOptions
from .prompts import Encoded, PromptFormat

logger = logging.getLogger(__name__)

MINUTE_SHARE = 1e-3  # below it the penalty outweighs the loss in next to no parameter


class DivergedError(ValueError):
    """Training met a loss or a gradient that is no number."""


class MicroBatch(NamedTuple):
    """What one forward sees; `forget[i]` says whether `samples[i]` is to be forgotten."""

    samples: list[Encoded]
    forget: list[bool]


class Schedule(Dataset):
    """All micro-batches of a run, fixed beforehand by a seed, so that a resumed run sees what it would have seen.

    Args:
        parts: (samples, number drawn into each micro-batch, whether they are forget samples). Each part is gone through
            in a new random order every time round; a part as large as its number is taken whole.
        count: number of micro-batches.
        seed: of the orders.
    """

    def __init__(self, parts: Sequence[tuple[Sequence[Encoded], int, bool]], count: int, seed: int):
        self.parts, self.count = parts, count
        self.orders = [_order(len(samples), number * count, seed + i) for i, (samples, number, _) in enumerate(parts)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> MicroBatch:
        batch = MicroBatch([], [])
        for (samples, number, forget), order in zip(self.parts, self.orders, strict=True):
            batch.samples.extend(samples[i] for i in order[index * number : (index + 1) * number])
            batch.forget.extend([forget] * number)
        return batch


def _order(size: int, length: int, seed: int) -> list[int]:
    generator, order = random.Random(seed), []
    while len(order) < length:
        order += generator.sample(range(size), size)
    return order[:length]


class StepRecord(NamedTuple):
    """Hooks of a run.

    Attributes:
        write: receives the line of every step, {"step", "seconds", "loss", "loss_grad_norm", ...}.
        evaluate: returns scores of the model as it is; called every `evaluate_every` steps, and merged into the line.
        evaluate_every: in optimizer steps.
        stop: whether these scores end the run.
    """

    write: Callable[[dict], None]
    evaluate: Callable[[PreTrainedModel], dict[str, float]]
    evaluate_every: int
    stop: Callable[[dict[str, float]], bool] = lambda _: False


def training_arguments(
    output_dir: Path,
    *,
    learning_rate: float,
    max_steps: int,
    seed: int,
    accumulate: int = 1,
    save_every: int = 0,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    weight_decay: float = 0.0,
) -> TrainingArguments:
    """The Trainer's arguments that all runs share: constant learning rate, no clipping, one micro-batch an item."""
    memory = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        lr_scheduler_type="constant",
        max_steps=max_steps,
        max_grad_norm=0.0,  # clipping would change dL but not the penalty, and so their balance
        seed=seed,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or max_steps,
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        **(memory if gradient_checkpointing else {}),
    )


class RecordedTrainer(Trainer):
    """Trains on the answers of a `Schedule` and hands a record of every step to `StepRecord`.

    Raises (from `train`):
        DivergedError: a loss, gradient or penalty that is not finite; no checkpoint has it in its weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        schedule: Schedule,
        prompts: PromptFormat,
        record: StepRecord,
    ):
        if args.world_size > 1:
            raise ValueError(
                f"{args.world_size} processes; expected one (gP is not summed over ranks): start it without torchrun"
            )
        # On several GPUs the Trainer would use nn.DataParallel, whose replicas keep their target_grad to themselves.
        args._n_gpu = min(args.n_gpu, 1)
        self.prompts = prompts
        super().__init__(model=model, args=args, train_dataset=schedule, data_collator=self._collate)
        # The losses below are means over the micro-batch: the Trainer is to divide them by their number.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Recorder(self, record))
        self.remove_callback(PrinterCallback)

    def _collate(self, items: list[MicroBatch]) -> dict[str, Tensor]:
        (batch,) = items
        return {**self.prompts.collate(batch.samples), "forget": torch.tensor(batch.forget)}

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean negative log-likelihood of the answer tokens."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        return (output.loss, output) if return_outputs else output.loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.check_finite("the loss", loss.item())
        self.step_loss += loss.item()
        return loss

    def check_finite(self, name: str, value: float, step: int | None = None) -> None:
        """Raise `DivergedError` if the value of this step (default: the one under way) is no finite number."""
        if not math.isfinite(value):
            raise DivergedError(
                f"{name} is {value} at step {step or self.state.global_step + 1}; stopped before a checkpoint took "
                "it in: use a lower learning rate or penalty weight"
            )

    def penalty_metrics(self) -> dict[str, float]:
        """What the optimizer says of its penalty after a step; empty where it has none."""
        return {}


class UnlearnTrainer(RecordedTrainer):
    """Unlearns by a `Method`: its objective through `PatchHandle.unlearning_loss`, its regulariser in the optimizer.

    Args:
        arguments: as for `RecordedTrainer`.
        handle: of `ssiuu_kernels.patch(model, scope="all")`.
        method: see `methods.py`.
        options: of the optimizer.
        target: attribution target of a penalised method.
    """

    def __init__(self, *arguments, handle: sk.PatchHandle, method: Method, options: OptimizerOptions, target: str):
        self.handle, self.method, self.options, self.target = handle, method, options, target
        super().__init__(*arguments)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            # Kept beside the Trainer's, which accelerate will wrap.
            self.unlearning_optimizer = self.optimizer = self.method.optimizer(params, self.options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The backbone's loss; its backward fills the target gradient too where the method needs it."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        target = self.target if self.method.penalised else None
        loss = self.handle.unlearning_loss(
            output.logits, inputs["labels"], inputs["forget"], self.method.objective, target
        )
        return (loss, output) if return_outputs else loss

    def penalty_metrics(self) -> dict[str, float]:
        if not isinstance(self.unlearning_optimizer, sk.SsiuuAdamW):
            return {}
        stats = self.unlearning_optimizer.last_stats
        return {
            "penalty": stats.value.item(),
            "penalty_grad_norm": stats.penalty_grad_norm.item(),
            "share": stats.share.item(),
            "lambda": self.unlearning_optimizer.last_weight,
        }


class _Recorder(TrainerCallback):
    """Measures and records every optimizer step, evaluates, and stops."""

    def __init__(self, trainer: RecordedTrainer, record: StepRecord):
        self.trainer, self.record, self.warned = trainer, record, False

    def on_step_begin(self, args, state, control, **_):
        self.start, self.trainer.step_loss = time.perf_counter(), 0.0

    def on_pre_optimizer_step(self, args, state, control, **_):
        grads = [param.grad for param in self.trainer.model.parameters() if param.grad is not None]
        self.grad_norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        self.trainer.check_finite("the gradient's norm", self.grad_norm)

    def on_step_end(self, args, state, control, **_):
        line = {
            "step": state.global_step,
            "seconds": time.perf_counter() - self.start,
            "loss": self.trainer.step_loss,
            "loss_grad_norm": self.grad_norm,
            **self.trainer.penalty_metrics(),
        }
        # Known only once the fused step is done: stop before its weights get into a checkpoint.
        self.trainer.check_finite("the penalty's gradient norm", line.get("penalty_grad_norm", 0.0), line["step"])
        self._warn_of_idle_penalty(line)
        if state.global_step % self.record.evaluate_every == 0 or state.global_step == args.max_steps:
            scores = self.record.evaluate(self.trainer.model)
            line |= scores
            control.should_training_stop |= self.record.stop(scores)
        self.record.write(line)

    def _warn_of_idle_penalty(self, line: dict) -> None:
        # A steered lambda is still on its way in the first steps.
        if self.warned or line["step"] < 5 or line.get("share", 1) >= MINUTE_SHARE:
            return
        self.warned = True
        logger.warning(
            "the penalty outweighs the loss in a share of %.1e of the parameters of negative attribution: it does next "
            "to nothing. --penalty-share 0.25, for one, steers lambda to where it does",
            line["share"],
        )

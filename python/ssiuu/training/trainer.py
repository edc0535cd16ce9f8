"""Training on transformers' Trainer: a deterministic schedule, a record of every step, and the unlearning loss."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import IGNORE_INDEX
from ssiuu_kernels.loss.objectives import Objective, resolve_objective
from ssiuu_kernels.loss.unlearning import ONE_BACKWARD, TWO_BACKWARD

from ..data.prompts import Encoded, PromptFormat
from ..methods.registry import Method, OptimizerOptions, check_update_in_backward, plain_adamw
from .step_log import Recorder, StepRecord, check_finite

logger = logging.getLogger(__name__)

# What launchers set, and what accelerate reads.
PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def refuse_launchers() -> None:
    """Raise a ValueError where the environment speaks of more processes: accelerate would wait for them for ever."""
    for name in PROCESS_COUNTS:
        if os.environ.get(name, "1") not in ("", "0", "1"):
            raise ValueError(
                f"{name}={os.environ[name]} in the environment; expected one process (gP is not summed over ranks): "
                f"start it without torchrun, mpirun or accelerate launch, or unset {name}"
            )


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

    def tokens(self, batches: range, forget: bool | None = None) -> int:
        """Answer tokens of the forget samples, of the others, or (None) of all in these micro-batches."""
        return sum(
            len(sample.answer)
            for batch in map(self.__getitem__, batches)
            for sample, forgotten in zip(batch.samples, batch.forget, strict=True)
            if forget is None or forgotten == forget
        )


def _order(size: int, length: int, seed: int) -> list[int]:
    generator, order = random.Random(seed), []
    while len(order) < length:
        order += generator.sample(range(size), size)
    return order[:length]


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
    refuse_launchers()
    # accelerate keeps the precision of a process's last run, or of its launcher, for the next one.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    # Its name from transformers 6 on, which 5 knows already.
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    memory = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
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


def say_rounding() -> None:
    """Log what bfloat16 weights mean for the optimizer."""
    logger.warning(
        "bfloat16 weights are rounded stochastically: rounding to the nearest would drop almost every update at these "
        "learning rates (--dtype float32 with --bf16 keeps float32 weights)"
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
        # The Trainer is to divide losses by the number of micro-batches, which they are multiplied by below.
        self.model_accepts_loss_kwargs = False
        self.add_callback(Recorder(self, record))
        self.remove_callback(PrinterCallback)

    def _collate(self, items: list[MicroBatch]) -> dict[str, Tensor]:
        (batch,) = items
        return {**self.prompts.collate(batch.samples), "forget": torch.tensor(batch.forget)}

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's AdamW, or one that rounds bfloat16 weights as they need."""
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            if any(param.dtype == torch.bfloat16 for param in params):
                say_rounding()
                rates = self.args.learning_rate, self.args.weight_decay
                options = OptimizerOptions(*rates, 0.0, None, stochastic_rounding=True, seed=self.args.seed)
                self.optimizer = plain_adamw(params, options)
        return super().create_optimizer()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean negative log-likelihood of the answer tokens of the whole step, this micro-batch's part."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        tokens = int((inputs["labels"] != IGNORE_INDEX).sum())
        loss = output.loss * (tokens / self.mean_tokens())
        return (loss, output) if return_outputs else loss

    def mean_tokens(self, forget: bool | None = None) -> float:
        """Answer tokens of these samples (see `Schedule.tokens`) in the present step, per micro-batch.

        Means over a micro-batch would let its tokens count by how few they are.
        """
        number = self.args.gradient_accumulation_steps
        first = self.state.global_step * number
        return self.train_dataset.tokens(range(first, first + number), forget) / number

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        check_finite("the loss", loss.item(), self.state.global_step + 1)
        self.step_loss += loss.item()
        self.step_tokens += int(inputs["attention_mask"].sum())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # The Trainer would measure it by a clipping to infinity, which multiplies every gradient by 1: a pass over
        # memory, and an update in backward refuses gradients that were written to since.
        return grad_norm

    def gradient_metrics(self) -> dict[str, float]:
        """What is measured of the gradients before the optimizer uses them."""
        norms = [param.grad.norm() for param in self.model.parameters() if param.grad is not None]
        return {"loss_grad_norm": torch.stack(norms).norm().item()}

    def optimizer_metrics(self) -> dict[str, float | str]:
        """What is known of the gradients and the penalty after a step."""
        return {}


class UnlearnTrainer(RecordedTrainer):
    """Unlearns by a `Method`: its objective through `PatchHandle.unlearning_loss`, its regulariser in the optimizer.

    Args:
        arguments: as for `RecordedTrainer`.
        handle: of `ssiuu_kernels.patch(model, scope="all")`.
        method: see `methods.py`.
        options: of the optimizer.
        target: attribution target of a penalised method.

    Raises:
        ValueError: an update in backward with several micro-batches a step, clipping, or a method without a penalty.
    """

    def __init__(
        self,
        *arguments,
        handle: sk.PatchHandle,
        method: Method,
        options: OptimizerOptions,
        target: str,
    ):
        self.handle, self.method, self.options, self.target = handle, method, options, target
        self.expects_one_backward = handle.engine == ONE_BACKWARD
        super().__init__(*arguments)
        if options.update_in_backward:
            check_update_in_backward(method, self.args.gradient_accumulation_steps, self.args.max_grad_norm)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            if self.options.stochastic_rounding:
                say_rounding()
            # Kept beside the Trainer's, which accelerate will wrap.
            self.unlearning_optimizer = self.optimizer = self.method.optimizer(params, self.options)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The backbone's loss; its backward fills the target gradient too where the method needs it."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        target = self.target if self.method.penalised else None
        loss = self.handle.unlearning_loss(output.logits, inputs["labels"], inputs["forget"], self._objective(), target)
        self._warn_of_second_backward()
        return (loss, output) if return_outputs else loss

    def _objective(self) -> str | Objective:
        if self.args.gradient_accumulation_steps == 1:
            return self.method.objective
        compute = resolve_objective(self.method.objective)
        forget_tokens, other_tokens = self.mean_tokens(True), self.mean_tokens(False)

        def of_the_step(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
            # Means over tokens divide by the chosen lengths' sum, which is thereby the step's.
            scale = torch.where(forget, forget_tokens / lengths[forget].sum(), other_tokens / lengths[~forget].sum())
            return compute(log_probs, lengths * scale, forget)

        return of_the_step

    def _warn_of_second_backward(self) -> None:
        if self.expects_one_backward and self.handle.path.engine == TWO_BACKWARD:
            self.expects_one_backward = False
            logger.warning("two backwards a step, where one was asked for: %s", self.handle.path.reason)

    def gradient_metrics(self) -> dict[str, float]:
        # The fused step measures the norm on its way, and an update in backward leaves no gradients to measure.
        return {} if self.method.penalised else super().gradient_metrics()

    def optimizer_metrics(self) -> dict[str, float | str]:
        engine = {"engine": self.handle.path.engine}
        if not self.method.penalised:
            return engine
        stats = self.unlearning_optimizer.last_stats
        return {
            "loss_grad_norm": stats.loss_grad_norm.item(),
            "penalty_grad_norm": stats.penalty_grad_norm.item(),
            "penalty": stats.value.item(),
            "share": stats.share.item(),
            "lambda": self.unlearning_optimizer.last_weight,
            **engine,
        }

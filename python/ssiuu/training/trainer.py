"""Training on transformers' Trainer: a deterministic schedule and a record of every step."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from ssiuu_kernels.log_probs import IGNORE_INDEX

from ..data.prompts import PromptFormat
from ..optimizers import OptimizerOptions, adamw, say_rounding
from .schedule import MicroBatch, Schedule
from .step_log import StepLog, StepRecord

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
    report_to: str = "none",
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
        report_to=report_to,
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
        # The Trainer is to divide losses by the number of micro-batches, which they are multiplied by below.
        self.model_accepts_loss_kwargs = False
        record = record._replace(write=self._report(record.write))
        self.log_of_steps = StepLog(record, self.gradient_metrics, self.optimizer_metrics)
        self.add_callback(self.log_of_steps)
        self.remove_callback(PrinterCallback)

    def _report(self, write: Callable[[dict], None]) -> Callable[[dict], None]:
        """`write`, whose lines go on to what the arguments report to (TensorBoard, W&B)."""

        def write_and_log(line: dict) -> None:
            write(line)
            self.log({name: value for name, value in line.items() if isinstance(value, float | int) and name != "step"})

        return write_and_log

    def _collate(self, items: list[MicroBatch]) -> dict[str, Tensor]:
        (batch,) = items
        marks = {name: torch.tensor(getattr(batch, name)) for name in ("forget", "companion", "ids")}
        return {**self.prompts.collate(batch.samples), **marks}

    def _get_train_sampler(self, *_) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's AdamW, or one that rounds bfloat16 weights as they need."""
        if self.optimizer is None:
            params = [param for param in self.model.parameters() if param.requires_grad]
            if any(param.dtype == torch.bfloat16 for param in params):
                say_rounding()
                rates = self.args.learning_rate, self.args.weight_decay
                self.optimizer = adamw(params, OptimizerOptions(*rates, stochastic_rounding=True, seed=self.args.seed))
        return super().create_optimizer()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean negative log-likelihood of the answer tokens of the whole step, this micro-batch's part."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        tokens = int((inputs["labels"] != IGNORE_INDEX).sum())
        loss = output.loss * (tokens / self.mean_tokens())
        return (loss, output) if return_outputs else loss

    def step_batches(self) -> range:
        """The micro-batches of the present step, by their place in the schedule."""
        number = self.args.gradient_accumulation_steps
        first = self.state.global_step * number
        return range(first, first + number)

    def mean_tokens(self, forget: bool | None = None, stopped: Collection[int] = ()) -> float:
        """Answer tokens of these samples (see `Schedule.samples`) in the present step, per micro-batch.

        A mean over a micro-batch would give the tokens of a short one more weight than those of a long one.
        """
        batches = self.step_batches()
        return self.train_dataset.tokens(batches, forget, stopped) / len(batches)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = self.forward_backward(model, inputs, num_items_in_batch)
        self.log_of_steps.add(loss.item(), int(inputs["attention_mask"].sum()), self.state.global_step + 1)
        return loss

    def forward_backward(self, model, inputs, num_items_in_batch) -> Tensor:
        """Add a micro-batch's gradients to `grad`; the part of `training_step` that may run more than once."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model, grad_norm=None):
        # The Trainer would measure it by a clipping to infinity, which multiplies every gradient by 1: a pass over
        # memory, and an update in backward refuses gradients that were written to since.
        return grad_norm

    def gradient_metrics(self) -> dict[str, float]:
        """What is measured of the gradients before the optimizer uses them."""
        norms = [param.grad.norm() for param in self.model.parameters() if param.grad is not None]
        return {"loss_grad_norm": torch.stack(norms).norm().item()}

    def optimizer_metrics(self) -> dict[str, float | str]:
        """What is known of the gradients and the regularizer after a step."""
        return {}

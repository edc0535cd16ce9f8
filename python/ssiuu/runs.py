"""Run folders: where a run keeps its configuration, metrics, model and checkpoints, so that it can be resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import __version__ as transformers_version

import ssiuu_kernels as sk

from .facts import Fact, Split

RUNNING, COMPLETE = "running", "complete"


class Run:
    """One run folder.

    config.json (options, versions, status), split.json, metrics.jsonl (a line a step), evaluation.json, model/
    (safetensors and tokenizer), checkpoints/ (to resume from), attacks/*.json, diagnosis.json and .safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.model, self.checkpoints = self.path / "model", self.path / "checkpoints"
        self.attacks, self.metrics = self.path / "attacks", self.path / "metrics.jsonl"

    @classmethod
    def claim(cls, path: str | Path, config: dict[str, Any], resume: bool) -> Run:
        """A run that may be started (`start`) or resumed in this folder; nothing is written yet.

        Raises:
            ValueError: the folder exists and resume is false; nothing to resume, other options, or a finished run.
        """
        run = cls(path)
        if not resume:
            if run.path.exists():
                way_on = ", or continue it with --resume" if _resumable(config) else ""
                raise ValueError(f"run folder {run.path} exists; choose another{way_on}")
            return run
        before = run.read("config.json")
        if before["status"] == COMPLETE:
            raise ValueError(f"run {run.path} is complete; there is nothing to resume")
        # An option that a run was started without, under an earlier version, is taken as it comes.
        changed = [name for name in config if name in before and before[name] != config[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"run {run.path} was started with {name}={before[name]!r}, now {config[name]!r}; "
                "resume with the same options"
            )
        return run

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder, and keep the configuration in it; a resumed run has both already."""
        if self.path.exists():
            return
        self.path.mkdir(parents=True)
        versions = {"ssiuu-kernels": sk.__version__, "torch": torch.__version__, "transformers": transformers_version}
        self.write("config.json", {**config, "versions": versions, "status": RUNNING})

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A finished run.

        Raises:
            ValueError: no run folder, or a run that is not finished.
        """
        run = cls(path)
        config = run.read("config.json")
        if config["status"] != COMPLETE:
            way_on = "continue it with `ssiuu unlearn --resume`" if _resumable(config) else "run it anew elsewhere"
            raise ValueError(f"run {run.path} is not finished; {way_on} first")
        return run

    def read(self, name: str) -> Any:
        """A JSON file of the run; a ValueError if it is not there."""
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{self.path} has no {name}; expected a run folder, as `ssiuu unlearn` writes it")
        return json.loads(file.read_text(encoding="utf-8"))

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def finish(self) -> None:
        """Mark the run as complete, and drop the checkpoints, which are three times as large as the model."""
        self.write("config.json", {**self.read("config.json"), "status": COMPLETE})
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_split(self, split: Split) -> None:
        """Keep the sets, for attacks and diagnosis to use the same facts."""
        self.write("split.json", {name: [asdict(fact) for fact in getattr(split, name)] for name in Split._fields})

    def split(self) -> Split:
        """The sets of this run."""
        stored = self.read("split.json")
        return Split(*([_stored_fact(fact) for fact in stored[name]] for name in Split._fields))

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint: the Trainer writes its state file last."""
        found = [p for p in self.checkpoints.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def rewind(self) -> tuple[Path | None, int]:
        """The newest checkpoint and its step; the metrics of later steps are dropped, to be written again."""
        checkpoint = self.last_checkpoint()
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self._truncate_metrics(done)
        return checkpoint, done

    def _truncate_metrics(self, steps: int) -> None:
        """Drop the lines of steps after `steps`."""
        if self.metrics.is_file():
            lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]  # without a line that was cut off
            kept = [line for line in lines if json.loads(line)["step"] <= steps]
            partial = self.metrics.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self.metrics)

    def last_metrics(self) -> dict[str, Any]:
        """The line of the last step; empty before the first."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _resumable(config: dict[str, Any]) -> bool:
    return config["method"] != "finetune"  # which keeps no checkpoints


def _stored_fact(stored: dict[str, Any]) -> Fact:
    return Fact(**{**stored, "false_options": tuple(stored["false_options"])})

"""Run folders: where a run keeps its configuration, metrics, model and checkpoints, so that it can be resumed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import __version__ as transformers_version

import ssiuu_kernels as sk

from ..analysis.influence import KINDS, Variation
from ..data.facts import Fact, Split
from .locks import LOCK, locked

logger = logging.getLogger(__name__)

SCHEMA = 1  # of the files in a run folder; 0.1.0 wrote none
RUNNING, COMPLETE = "running", "complete"
PARTIAL = ".partial"  # suffix of a file that is being written


class Run:
    """One run folder.

    config.json (schema, options, versions, status), split.json, extra.json (further sets of a benchmark),
    metrics.jsonl (one line per step), evaluation.json, model/ (safetensors and tokenizer), checkpoints/ (to resume
    from), attacks/*.json, diagnosis.json and .safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        _check_name(self.path)
        self.model, self.checkpoints = self.path / "model", self.path / "checkpoints"
        self.attacks, self.metrics = self.path / "attacks", self.path / "metrics.jsonl"
        self.facts = self.path / "facts.jsonl"  # of fine-tuning: what was taught

    @classmethod
    @contextmanager
    def claim(cls, path: str | Path, config: dict[str, Any], resume: bool) -> Iterator[Run]:
        """A run that may be started (`start`) or resumed in this folder, which no other process may use meanwhile.

        A new or empty folder is claimed. An interrupted run that cannot be resumed is cleared, to start again. A new
        folder is removed if nothing was written to it.

        Raises:
            ValueError: the folder is not empty and resume is false; nothing to resume, other options, or a finished
                run; another process is at work there.
            OSError: a folder that cannot be made or written to.
        """
        run = cls(path)
        if resume:
            run.config()  # refuses before anything is made
        with locked(run.path):
            if resume:
                run._check_resumed(config)
            else:
                run._check_new(config)
            yield run

    def _check_new(self, config: dict[str, Any]) -> None:
        held = [file for file in self.path.iterdir() if file.name != LOCK and file.suffix != PARTIAL]
        if not held:
            return
        started = self.config() if self._is_run() else None
        if started and started["status"] == RUNNING and not _resumable(started) and not _resumable(config):
            logger.warning("%s has an interrupted run that cannot be resumed; it starts again", self.path)
            self._clear()
            return
        way_on = ", or continue it with --resume" if started and _resumable(config) else ""
        raise ValueError(f"run folder {self.path} exists; choose another{way_on}")

    def _clear(self) -> None:
        # config.json last: until then it says whose files these are.
        for folder in (self.model, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.metrics, self.facts, self.path / "evaluation.json", self.path / "config.json"):
            file.unlink(missing_ok=True)

    def _check_resumed(self, config: dict[str, Any]) -> None:
        before = self.config()
        if before["status"] == COMPLETE:
            raise ValueError(f"run {self.path} is complete; there is nothing to resume")
        # A run that an earlier version started lacks newer options; those are taken as given.
        changed = [name for name in config if name in before and before[name] != config[name]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"run {self.path} was started with {name}={before[name]!r}, now {config[name]!r}; "
                "resume with the same options"
            )

    def start(self, config: dict[str, Any]) -> None:
        """Keep the configuration in the folder; a resumed run has it already."""
        if (self.path / "config.json").is_file():
            return
        versions = {"ssiuu-kernels": sk.__version__, "torch": torch.__version__, "transformers": transformers_version}
        self.write("config.json", {"schema": SCHEMA, **config, "versions": versions, "status": RUNNING})

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A finished run.

        Raises:
            ValueError: no run folder, or a run that is not finished.
        """
        run = cls(path)
        config = run.config()
        if config["status"] != COMPLETE:
            way_on = "continue it with `ssiuu unlearn --resume`" if _resumable(config) else "run it again"
            raise ValueError(f"run {run.path} is not finished; {way_on} first")
        return run

    @contextmanager
    def work(self, name: str) -> Iterator[None]:
        """Lock a finished run for a command of this name: two processes would write the same files.

        Raises:
            ValueError: another process runs that command on it.
            OSError: a folder that cannot be written to, before any work.
        """
        with locked(self.path, f".{name}{LOCK}"):
            yield

    def config(self) -> dict[str, Any]:
        """config.json; a ValueError if it is missing, of a later version, or not of a run but, say, of a model."""
        config = self.read("config.json")
        if not isinstance(config, dict) or not {"status", "method"} <= config.keys():
            raise ValueError(f"{self.path} is not a run folder; expected one that `ssiuu unlearn` wrote")
        check_schema(config, self.path)
        return config

    def _is_run(self) -> bool:
        try:
            self.config()
        except ValueError:
            return False
        return True

    def read(self, name: str) -> Any:
        """A JSON file of the run; a ValueError if it is missing or malformed."""
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{self.path} has no {name}; expected a run folder that `ssiuu unlearn` wrote")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); expected a file that `ssiuu` wrote") from None

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(value, indent=1) + "\n")

    def diagnosis(self) -> dict[str, Any]:
        """diagnosis.json, part by part; empty where nothing was diagnosed. 0.1.0 wrote one part, influence, alone."""
        if not (self.path / "diagnosis.json").is_file():
            return {}
        stored = self.read("diagnosis.json")
        return {"influence": {"options": {"target": stored["target"]}, **stored}} if "sum" in stored else stored

    def write_diagnosis(self, part: str, result: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Put a part into diagnosis.json, and its tensors, where it has some, into diagnosis.safetensors.

        The part is never beside the tensors of another.
        """
        others = {name: there for name, there in self.diagnosis().items() if name != part}
        if tensors is not None:
            self.write("diagnosis.json", others)
            file = self.path / "diagnosis.safetensors"
            partial = file.with_suffix(PARTIAL)
            save_file(tensors, partial)
            partial.replace(file)
        self.write("diagnosis.json", {**others, part: result})

    def variations(self) -> dict[str, Variation]:
        """The D+ and D- of every neuron, kind -> `[layers, width]`; a ValueError where they are missing."""
        file = self.path / "diagnosis.safetensors"
        if not file.is_file():
            raise ValueError(f"{file} is missing beside diagnosis.json; remove that, and run `ssiuu diagnose` again")
        tensors = load_file(file)
        return {
            kind: Variation(tensors[f"d_plus.{kind}"], tensors[f"d_minus.{kind}"])
            for kind in KINDS
            if f"d_plus.{kind}" in tensors
        }

    def finish(self) -> None:
        """Mark the run as complete, and drop the checkpoints, which are three times as large as the model."""
        self.write("config.json", {**self.read("config.json"), "status": COMPLETE})
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        with suppress(OSError):
            self.checkpoints.rmdir()  # unless TensorBoard's events are in it

    def write_split(self, split: Split) -> None:
        """Keep the sets, for attacks and diagnosis to use the same facts."""
        self.write("split.json", _stored(split._asdict()))

    def split(self) -> Split:
        """The sets of this run."""
        stored = self.read("split.json")
        return Split(*([_stored_fact(fact) for fact in stored[name]] for name in Split._fields))

    def write_extra(self, extra: Mapping[str, Sequence[Fact]]) -> None:
        """Keep the further sets that `ssiuu evaluate` scores, if there are any."""
        if extra:
            self.write("extra.json", _stored(extra))

    def extra(self) -> dict[str, list[Fact]]:
        """The further sets of this run; empty where there are none."""
        stored = self.read("extra.json") if (self.path / "extra.json").is_file() else {}
        return {name: [_stored_fact(fact) for fact in facts] for name, facts in stored.items()}

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
            replace_file(self.metrics, "".join(f"{line}\n" for line in kept))

    def last_metrics(self) -> dict[str, Any]:
        """The line of the last step; empty before the first."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a step's line."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def check_schema(config: dict[str, Any], where: Path) -> None:
    """Raise a ValueError for a run that a later version wrote; `where` names it."""
    schema = config.get("schema", 0)
    if schema > SCHEMA:
        raise ValueError(f"{where} has schema {schema}, and this version reads up to {SCHEMA}; upgrade ssiuu-kernels")


def recorded_options(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The options in a run's config.json, by which another run can repeat it; raises as `check_schema`."""
    check_schema(config, where)
    derived = {"schema", "versions", "status", "stochastic_rounding"}
    if config.get("engine") is None:  # of a run that needs none
        derived.add("engine")
    return {name: value for name, value in config.items() if name not in derived}


def _check_name(path: Path) -> None:
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"run folder {path} has a name that is not UTF-8; safetensors cannot write there") from None


def replace_file(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = file.with_suffix(PARTIAL)
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _resumable(config: dict[str, Any]) -> bool:
    return config["method"] != "finetune"  # which keeps no checkpoints


def _stored(sets: Mapping[str, Sequence[Fact]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [asdict(fact) for fact in facts] for name, facts in sets.items()}


def _stored_fact(stored: dict[str, Any]) -> Fact:
    return Fact(**{**stored, "false_options": tuple(stored["false_options"])})

"""The parts of a study that run on their own: folders, what they wait for, and what is known of each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .folder import COMPLETE, Run, replace_file
from .locks import LOCK, BusyError, locked
from .study import Cell, Study

BEGUN, DONE, FAILED, BUSY = "begun", "done", "failed", "busy"


@dataclass(frozen=True)
class Task:
    """A cell with one seed, or the teaching of a model.

    Attributes:
        name: path of its run folder below the study's.
        needs: names of the tasks that come before it.
        cell: None for teaching.
        seed: of the run.
        request: what the study file asks for, as it is recorded: "run", and what is done with its model.
    """

    name: str
    needs: tuple[str, ...]
    cell: Cell | None
    seed: int
    request: Mapping[str, Any]

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / self.name

    def beside(self, out: Path, suffix: str) -> Path:
        """A file or folder beside its run folder: .json (its state), .log, -trials."""
        folder = self.folder(out)
        return folder.with_name(folder.name + suffix)

    def state(self, out: Path) -> dict[str, Any]:
        """What is known of it: "status", "request", "seconds", "error"; empty before it began.

        Raises:
            ValueError: a state that is not JSON.
        """
        file = self.beside(out, ".json")
        if not file.is_file():
            return {}
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); remove it, and the task is checked again") from None

    def write_state(self, out: Path, status: str, **more: Any) -> None:
        """Record in one line what became of it."""
        file = self.beside(out, ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps({"status": status, "request": self.request, **more}) + "\n")

    def is_done(self, out: Path) -> bool:
        """Whether all that the study asks of it is there."""
        state = self.state(out)
        return state.get("status") == DONE and state["request"] == self.request and self._has_run(out)

    def has_finished_run(self, out: Path) -> bool:
        """Whether its run is finished, whatever became of the attacks and the diagnosis."""
        return self._has_run(out) and Run(self.folder(out)).config()["status"] == COMPLETE

    @contextmanager
    def claim(self, out: Path) -> Iterator[None]:
        """Lock it; a BusyError where another process runs it."""
        folder = self.folder(out)
        with locked(folder.parent, f".{folder.name}{LOCK}"):
            yield

    def is_busy(self, out: Path) -> bool:
        """Whether another process runs it."""
        try:
            with self.claim(out):
                return False
        except BusyError:
            return True

    def check_request(self, out: Path) -> None:
        """Raise a ValueError where the run in its folder was begun with other options."""
        before = self.state(out).get("request", {}).get("run")
        begun = self._has_run(out) or self.beside(out, "-trials").exists()
        if before is None or before == self.request["run"] or not begun:
            return
        now = self.request["run"]
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        raise ValueError(
            f"{self.folder(out)} was begun with {name}={before.get(name)!r}, and the study now has {now.get(name)!r}; "
            "remove the folder and what is beside it under its name, or choose another --out"
        )

    def _has_run(self, out: Path) -> bool:
        return (self.folder(out) / "config.json").is_file()


def tasks_of(study: Study) -> dict[str, Task]:
    """Name -> task, seed by seed, so that comparisons over the first seeds are there early."""
    taught = {model: Task(taught_name(model), (), None, 0, _plain({"run": asdict(options)}))
              for model, options in study.taught.items()}  # fmt: skip
    tasks = {task.name: task for task in taught.values()}
    given = study.given
    after = {"attacks": given.attacks, "diagnose": given.diagnose}
    for seed in given.seeds:
        for cell in study.cells.values():
            run = {**cell.values, "match": asdict(cell.match) if cell.match else None, "teach": given.teach}
            needs = [taught[cell.model].name] if taught else []
            needs += [_task_name(cell.match.cell, seed)] if cell.match else []
            name = _task_name(cell.name, seed)
            tasks[name] = Task(name, tuple(needs), cell, seed, _plain({"run": run, **after}))
    return tasks


def _task_name(cell: str, seed: int) -> str:
    return f"{cell}/seed{seed}"


def taught_name(model: str) -> str:
    """Of the task that teaches this one of the study's models."""
    return f"taught-{model}" if model else "taught"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))

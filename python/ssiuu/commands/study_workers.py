"""Worker processes of a study: one task each, with a GPU or a part of the CPU's threads of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..runs.tasks import BUSY, DONE, FAILED, Task

POLL = 0.2  # seconds between looks at the processes
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Workers:
    """Runs tasks in processes of their own, `jobs` at once; ends them on exit.

    Args:
        file: the study file.
        out: the study's folder; what a task prints goes to the .log beside its run folder.
        jobs: processes; 0 runs each task in this one.
        run: runs a task in this process.
    """

    def __init__(self, file: Path, out: Path, jobs: int, run: Callable[[Task], str]):
        self.file, self.out, self.jobs, self.run = file, out, jobs, run
        self.running: dict[int, tuple[Task, subprocess.Popen | str]] = {}  # slot -> task, its process or its end

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        processes = [process for _, process in self.running.values() if isinstance(process, subprocess.Popen)]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()

    @property
    def are_free(self) -> bool:
        """Whether another task may be started."""
        return len(self.running) < max(1, self.jobs)

    def start(self, task: Task) -> None:
        """Begin a task, or with no jobs run it to its end."""
        slot = next(slot for slot in range(max(1, self.jobs)) if slot not in self.running)
        if not self.jobs:
            self.running[slot] = (task, self.run(task))
            return
        words = ["study", str(self.file), "--out", str(self.out), "--only", task.name]
        log = task.beside(self.out, ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "ssiuu.cli", *words], env=_environment(slot, self.jobs),
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.running[slot] = (task, process)

    def finished(self) -> list[tuple[Task, str]]:
        """Tasks that came to an end since the last call, with what became of them; waits a moment for one."""
        found = []
        for slot, (task, process) in list(self.running.items()):
            if isinstance(process, str):
                found.append((task, process))
            elif process.poll() is not None:
                found.append((task, self._status(task, process.returncode)))
            else:
                continue
            del self.running[slot]
        if self.running and not found:
            time.sleep(POLL)
        return found

    def _status(self, task: Task, returned: int) -> str:
        if returned == 0:
            return DONE if task.is_done(self.out) else BUSY
        if returned != 1 or task.state(self.out).get("status") != FAILED:  # it could not say so itself
            what = f"signal {-returned} (9: perhaps out of memory)" if returned < 0 else f"exit status {returned}"
            task.write_state(self.out, FAILED, error=f"ended by {what}; see {task.beside(self.out, '.log')}")
        return FAILED


def _environment(slot: int, jobs: int) -> dict[str, str]:
    found = dict(os.environ)
    gpus = found[VISIBLE].split(",") if found.get(VISIBLE) else [str(i) for i in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        found[VISIBLE] = gpus[slot % len(gpus)]
    else:
        found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // jobs)))
    return found

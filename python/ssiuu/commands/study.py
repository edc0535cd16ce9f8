"""Studies: every cell of a study file unlearned, attacked and diagnosed, with what was found over the seeds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from ..progress import console
from ..report.study import write_results
from ..runs.folder import COMPLETE, Run, replace_file
from ..runs.locks import BusyError
from ..runs.study import Study, find_study, read_study
from ..runs.tasks import BEGUN, BUSY, DONE, FAILED, Task, tasks_of, taught_name
from ..training.trainer import refuse_launchers
from .attack import attack_run
from .diagnose import diagnose_runs
from .finetune import finetune
from .matching import unlearn_matched, unlearn_to_end
from .study_plan import planned_split, print_plan, progress_line
from .study_workers import Workers

POLL = 1.0  # seconds between looks at what another process does


class StageError(Exception):
    """What failed of a cell's attacks and diagnosis, after its run."""


def run_study(
    file: str | Path, out: str | Path | None = None, *, jobs: int = 1, dry_run: bool = False, only: str | None = None
) -> int:
    """Run what is left of a study, then write its results.

    A cell that fails is recorded in <cell>/seed<k>.json and tried again when the study is started again.

    Args:
        file: a study file, or the name of a shipped one; see `find_study`.
        out: the study's folder; runs/<name of the file> where None.
        jobs: worker processes; 0 runs everything in this one.
        dry_run: print the cells and the time that they take, and run nothing.
        only: name of one task, as "gd/seed0" or "taught", to run alone and in this process; no results are written.

    Returns:
        How many tasks failed, 100 at most: it is an exit status.

    Raises:
        ValueError: a study file that is wrong, data that cannot be used, a folder of something else, or runs in it that
            were begun with other options; before any work.
        OSError: a folder that cannot be written to.
    """
    refuse_launchers()
    path = find_study(file)
    study, out = read_study(path), Path(out) if out is not None else Path("runs") / path.stem
    tasks = tasks_of(study)
    if jobs < 0:
        raise ValueError(f"jobs={jobs}; expected at least 0")
    if only is not None and only not in tasks:
        raise ValueError(f"only={only!r} is not a task of {path}; expected one of {', '.join(tasks)}")
    if (out / "config.json").exists():
        raise ValueError(f"{out} is the folder of a run or a model; choose another for the study")
    for task in tasks.values():
        task.check_request(out)
    if dry_run:
        print_plan(study, tasks, out, jobs)
        return 0
    if only is not None:
        return int(run_task(study, tasks, tasks[only], out) == FAILED)
    _check_data(study)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "study.yaml", path.read_text(encoding="utf-8"))
    with Workers(path, out, jobs, lambda task: run_task(study, tasks, task, out)) as workers:
        states = _run_all(tasks, out, workers)
    if any(task.cell and task.has_finished_run(out) for task in tasks.values()):
        console.print(f"results: {write_results(study, tasks, out)}", markup=False)
    for status, what in (
        (FAILED, "failed; start the study again to try them again"),
        (BUSY, "left to another process"),
    ):
        names = [name for name, found in states.items() if found == status]
        if names:
            console.print(f"{len(names)} {what}: {', '.join(names)}", markup=False)
    return min(list(states.values()).count(FAILED), 100)


def _check_data(study: Study) -> None:
    """Raise for data that cannot be used, before a model is loaded; the cells of a model share it."""
    first = {cell.model: cell for cell in reversed(study.cells.values())}
    for cell in first.values():
        for seed in study.given.seeds:
            planned_split(study, cell, seed)


def _run_all(tasks: Mapping[str, Task], out: Path, workers: Workers) -> dict[str, str]:
    """Run the tasks, each after those that it needs; name -> what became of it.

    A task that another process runs is left to it, and waited for where others need it.
    """
    states = {name: DONE for name, task in tasks.items() if task.is_done(out)}
    waiting = {name: task for name, task in tasks.items() if name not in states}
    if states:
        console.print(f"{len(states)} of {len(tasks)} tasks are done already", markup=False)
    while waiting or workers.running:
        for name, task in list(waiting.items()):
            # A cell whose attacks or diagnosis failed has a run, which is all that others need.
            needs = [need for need in task.needs if not tasks[need].has_finished_run(out)]
            failed = [need for need in needs if states.get(need) == FAILED]
            if failed:
                task.write_state(out, FAILED, error=f"needs {failed[0]}, which failed")
                states[name] = FAILED
            elif needs or not workers.are_free:
                continue
            elif task.is_busy(out):
                states[name] = BUSY
            else:
                workers.start(task)
            del waiting[name]
        for task, status in workers.finished():
            states[task.name] = status
            console.print(progress_line(task, status, states, tasks, out, workers.jobs), markup=False, soft_wrap=True)
        held = {need for task in waiting.values() for need in task.needs if states.get(need) == BUSY}
        for name in held:
            if tasks[name].is_done(out):
                states[name] = DONE
            elif not tasks[name].is_busy(out):  # the other process ended without finishing it
                del states[name]
                waiting = {name: tasks[name], **waiting}
        if held and not workers.running:
            time.sleep(POLL)
    return states


def run_task(study: Study, tasks: Mapping[str, Task], task: Task, out: Path) -> str:
    """Run a task in this process, unless another does so or it is done; returns DONE, BUSY or FAILED."""
    try:
        with task.claim(out):
            if not task.is_done(out):
                started = time.perf_counter()
                task.write_state(out, BEGUN)
                _teach(study, task, out) if task.cell is None else _run_cell(study, tasks, task, out)
                task.write_state(out, DONE, seconds=time.perf_counter() - started)
            if task.cell and not study.given.keep_models:
                shutil.rmtree(Run(task.folder(out)).model, ignore_errors=True)
            return DONE
    except BusyError as error:
        console.print(f"{task.name}: {error}", markup=False)
        return BUSY
    except Exception as error:  # whatever it is, the other cells go on
        task.write_state(out, FAILED, error=_said(error))
        return FAILED


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, StageError) else f"{type(error).__name__}: {text}"


def _teach(study: Study, task: Task, out: Path) -> None:
    (options,) = (options for model, options in study.taught.items() if taught_name(model) == task.name)
    folder = task.folder(out)
    if not (folder / "config.json").is_file() or Run(folder).config()["status"] != COMPLETE:
        finetune(options, folder)


def _run_cell(study: Study, tasks: Mapping[str, Task], task: Task, out: Path) -> None:
    cell, folder = task.cell, task.folder(out)
    options = cell.options(task.seed)
    if study.taught:
        taught = Run(out / taught_name(cell.model))
        facts = {"facts": str(taught.facts.resolve())} if options.facts is not None else {}
        options = options.replace(model=str(taught.model.resolve()), revision=None, **facts)
    if cell.match:
        other = Run(tasks[task.needs[-1]].folder(out))
        run = unlearn_matched(options, cell.match, other, folder, task.beside(out, "-trials"))
    else:
        run = unlearn_to_end(options, folder)
    if not run.model.is_dir():
        raise ValueError(
            f"{folder} has other attacks or another diagnosis than the study, and its model was not kept "
            "(keep_models); remove the folder to run it again"
        )
    stages = [partial(attack_run, folder, [attack]) for attack in study.attacks]
    if study.diagnosis is not None:
        stages.append(partial(diagnose_runs, [folder], study.diagnosis))
    errors: dict[str, None] = {}
    for stage in stages:  # one that fails, such as an attack on too few facts, keeps no other from its result
        try:
            stage()
        except BusyError:
            raise
        except Exception as error:
            errors[_said(error)] = None
    if errors:
        raise StageError("; ".join(errors))

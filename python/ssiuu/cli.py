"""The command line: `ssiuu demo | finetune | unlearn | attack | diagnose | audit | evaluate | report | study |
methods | env`.

A command is a function. Its positional-only parameters are positional arguments, its keyword-only ones are options, and
a parameter `options` of a dataclass of options.py brings that dataclass's fields, also from a file with --config
(`arguments.py`). Whatever fails is printed as one line, with exit status 2.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

# The toolkit itself is imported inside the commands: torch and transformers take seconds, and --help should not.
from .options import AttackOptions, AuditOptions, DiagnoseOptions, FinetuneOptions, UnlearnOptions, replacing_sets
from .progress import console, write_plainly

COMMANDS: dict[str, Callable] = {}
WIDTH = 79
TRACEBACK = "SSIUU_TRACEBACK"  # environment variable: raise errors as Python does, for bug reports
# What the parts that write files say where a disk is full: the system, safetensors, and torch.save.
FULL = ("No space left", "Disk quota exceeded", "os error 28", "file write failed", "unexpected pos")


def command(function: Callable) -> Callable:
    """Register a command under its function's name."""
    COMMANDS[function.__name__] = function
    return function


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line, and return the exit status.

    Args:
        words: without the program's name; those of this process where None.
    """
    write_plainly(sys.stdout, sys.stderr)
    logging.basicConfig(level="WARNING", handlers=[_OneLineHandler()])
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return _run(list(sys.argv[1:] if words is None else words))
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(TRACEBACK):
            raise
        _say(f"ssiuu: {said_of(error)}", "red")
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    except SystemExit as done:  # after --help
        return done.code or 0


def said_of(error: BaseException) -> str:
    """What a failure says, in one line, with what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; `ssiuu unlearn` goes on with --resume, other commands where they are given again"
    if any(sign in text for sign in FULL):
        return f"the disk is full ({text}); free some space, and give the command again (ssiuu unlearn: with --resume)"
    if isinstance(error, ImportError):
        return f"{text}; install the package {error.name or 'that it names'}"
    if isinstance(error, (ValueError, TypeError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} ({TRACEBACK}=1 shows where)"


@command
def demo(*, out: Path = Path("runs/demo"), seed: int = 0):
    """Unlearn some people from SmolLM2 with GD and with SSIUU, attack and diagnose both, and write the report.

    Takes about eight minutes on two CPU cores. An interrupted demo goes on where it stopped.

    Example:
      ssiuu demo --out runs/demo

    Args:
        out: folder to write: a new or an empty one, or that of an interrupted demo.
        seed: of the people, and of the order of facts.
    """
    from .commands.demo import run_demo

    run_demo(out, seed=seed)


@command
def finetune(*, options: FinetuneOptions, out: Path):
    """Teach a model the facts of a file: the first step of TOFU. Its `model/` can then be unlearned from.

    Example:
      ssiuu finetune --facts full.jsonl --model smollm2 --out runs/taught

    Args:
        out: folder to write: a new or an empty one.
    """
    from .commands.finetune import finetune as run_finetuning

    run = run_finetuning(options, out)
    print(f"model: {run.model}")


@command
def unlearn(*, options: UnlearnOptions, out: Path, resume: bool = False):
    """Unlearn facts from a model, and keep the unlearned model in a run folder.

    The options of a method and of a regularizer are shown where --method and --regularizer are given too. `ssiuu
    methods` lists all of them.

    Examples:
      ssiuu unlearn --model smollm2 --method ssiuu --penalty-share 0.25 \\
        --target geometric_mean_prob --known-probability 0.2 --out runs/ssiuu
      ssiuu unlearn --model meta-llama/Llama-3.2-1B --method gd --shots 0 \\
        --forget forget01.jsonl --retain retain99.jsonl --forget-batch 8 \\
        --bf16 --out runs/tofu-gd
      ssiuu unlearn --config runs/ssiuu/config.json --seed 1 --out runs/ssiuu-1

    Args:
        out: folder to write: a new or an empty one, or with --resume that of an interrupted run.
        resume: continue an interrupted run, with the same options.
    """
    from .commands.unlearn import unlearn as run_unlearning

    run = run_unlearning(options, out, resume=resume)
    _print_summary([run.path])


@command
def attack(run: Path, /, *, options: AttackOptions):
    """Train an unlearned model further, or round its weights, and see whether the facts come back. The run's model
    stays as it is.

    Examples:
      ssiuu attack runs/ssiuu --kind harmful --fraction 0.3 \\
        --learning-rate 1e-5 --steps 10
      ssiuu attack runs/ssiuu --paper-grid
      ssiuu attack runs/ssiuu --kind quantised

    Args:
        run: run folder that `ssiuu unlearn` wrote.
    """
    from .attacks.grid import grid_of
    from .commands.attack import attack_run

    attack_run(run, grid_of(options))
    _print_summary([run])


@command
def diagnose(runs: list[Path], /, *, options: DiagnoseOptions):
    """Measure the influence variation D+ (erased) and D- (hidden) of every neuron over the forget set.

    Example:
      ssiuu diagnose runs/gd runs/ssiuu

    Args:
        runs: run folders that `ssiuu unlearn` wrote.
    """
    from .commands.diagnose import diagnose_runs

    diagnose_runs(runs, options)
    _print_summary(runs)


@command
def audit(*, options: AuditOptions, out: Path = Path("audit")):
    """Find out whether facts were erased from a model or hidden in it: any two checkpoints, whoever unlearned them.

    Scores both, looks for the facts in the outputs and layers of the unlearned model, takes away the neurons that grew
    to hide them, attacks it, and writes a page that says what was found. An interrupted audit goes on where it stopped.

    Example:
      ssiuu audit --before taught/model --after unlearned/model \\
        --forget forget.jsonl --retain retain.jsonl --out audit

    Args:
        out: folder of the page and of the results.
    """
    from .commands.audit import audit as run_audit

    record, page = run_audit(options, out)
    print(record["sentence"])
    print(f"page: {page}")


@command
def evaluate(run: Path, /):
    """Score a run's model and the one it started from, by choice and by generation.

    Example:
      ssiuu evaluate runs/ssiuu

    Args:
        run: run folder that `ssiuu unlearn` wrote.
    """
    from .commands.evaluate import evaluate_run

    evaluate_run(run)
    _print_summary([run])


@command
def report(runs: list[Path], /, *, out: Path = Path("report")):
    """Write one self-contained HTML page about finished runs, with its pictures as PNG beside it.

    Example:
      ssiuu report runs/gd runs/ssiuu --out report

    Args:
        runs: run folders that `ssiuu unlearn` wrote, of one base model.
        out: folder of the report; what is there is replaced.
    """
    from .report.page import write_report

    page = write_report(runs, out)
    _print_summary(runs)
    print(f"report: {page}")


@command
def study(
    file: Path, /, *, out: Path | None = None, jobs: int = 1, dry_run: bool = False, only: str | None = None
) -> int:
    """Run a study: every cell of a file unlearned, attacked and diagnosed over seeds, with intervals and figures.

    What is finished is not run again, and what failed is tried again. The exit status is the number of failed tasks.

    Examples:
      ssiuu study small --dry-run
      ssiuu study my-study.yaml --out runs/my-study --jobs 4

    Args:
        file: study file, or the name of one that comes with the package (small, paper-table-1, paper-table-2).
        out: folder of the study; None takes runs/ with the file's name.
        jobs: worker processes, each with a GPU or a part of the CPU's threads; 0 runs everything in this process.
        dry_run: print the cells and the time they take, and run nothing.
        only: run this task alone, in this process, as gd/seed0.
    """
    from .commands.study import run_study

    return run_study(file, out, jobs=jobs, dry_run=dry_run, only=only)


@command
def methods(names: list[str] | None = None, /):
    """List the unlearning methods and the regularizers, with their options and where they come from.

    Example:
      ssiuu methods gd ssiuu

    Args:
        names: methods and regularizers to show; all where none is given.
    """
    from .commands.methods import describe

    print(describe(names, WIDTH))


@command
def env():
    """Print versions, processor, device and backends, for bug reports.

    Example:
      ssiuu env
    """
    import ssiuu_kernels as sk

    print(sk.collect_env())


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(f"{name} is not a command; expected one of {', '.join(COMMANDS)}")
    positional, keywords = _read(COMMANDS[name], rest)
    return COMMANDS[name](*positional, **keywords) or 0


def _read(function: Callable, words: list[str]) -> tuple[list, dict]:
    """The positional and the keyword arguments that a command's function is called with."""
    from .arguments import Argument, Parser, parameters_of, peek, text_of

    prog = f"ssiuu {function.__name__}"
    parameters = {parameter.name: parameter for parameter in parameters_of(function)}
    kind = parameters.pop("options").type if "options" in parameters else None
    own = list(parameters.values())
    chosen, stored, options = {}, {}, {"options": {}}
    if kind is not None:
        config = Argument("config", Path | None, None, "YAML file with options by name, or a run's config.json.")
        own.append(config)
        chosen = peek(prog, words, ("config", "method", "regularizer"))
        stored = _stored_options(Path(chosen["config"])) if "config" in chosen else {}
        options = _options(kind, {**stored, **chosen})
    parser = Parser(prog, text_of(function, WIDTH), own, **options)
    file = parser.read(stored, chosen.get("config"))
    line = parser.parse(words)
    line.pop("config", None)
    parser.require({**file, **line})
    values = {name: line.pop(name, parameter.default) for name, parameter in parameters.items()}
    if kind is UnlearnOptions:
        values["options"] = UnlearnOptions.of({**replacing_sets(file), **replacing_sets(line)})
    elif kind is not None:
        values["options"] = kind(**{**file, **line})
    return [values.pop(name) for name, parameter in parameters.items() if parameter.positional], values


def _stored_options(file: Path) -> dict[str, Any]:
    from .arguments import read_yaml

    values = read_yaml(file)
    if not {"status", "versions"} <= values.keys():
        return values
    from .runs.folder import recorded_options

    return recorded_options(values, file)


def _options(kind: type, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a parser knows of a dataclass's options, with those of the chosen method and regularizer."""
    from .arguments import fields_of

    if kind is not UnlearnOptions:
        return {"options": {"options of the run": fields_of(kind)}}
    from .pairs import option_owners, resolve

    names = (chosen.get(name, getattr(kind, name)) for name in ("method", "regularizer"))
    method, regularizer = resolve(*map(str, names))
    groups = {
        "options of the run": [argument for argument in fields_of(kind) if argument.name != "settings"],
        f"options of method {method.name}": fields_of(method.Options),
        f"options of regularizer {regularizer.name}": fields_of(regularizer.Options),
    }
    return {
        "options": groups,
        "what": f"method {method.name} with regularizer {regularizer.name}",
        "elsewhere": option_owners(),
    }


def _overview() -> str:
    rows = []
    for name, function in COMMANDS.items():
        first, _, _ = inspect.cleandoc(function.__doc__).partition("\n\n")
        rows.append(textwrap.fill(first, WIDTH, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13))
    return "\n".join(
        [
            "usage: ssiuu COMMAND [options]",
            "",
            "Unlearn facts from a language model, attack the result, diagnose it, and report.",
            "",
            *rows,
            "",
            "`ssiuu COMMAND --help` shows the options of a command.",
        ]
    )


def _print_summary(runs: list[Path]) -> None:
    from .report.table import summary_table

    console.print(summary_table(runs))


class _OneLineHandler(logging.Handler):
    """Prints warnings as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(f"{record.levelname.lower()}: {' '.join(record.getMessage().split())}", "yellow")


def _say(text: str, style: str) -> None:
    Console(stderr=True).print(text, style=style, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())

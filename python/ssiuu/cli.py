"""The command line: `ssiuu demo | finetune | unlearn | attack | diagnose | evaluate | report | env`."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

# The toolkit itself is imported inside the commands: torch and transformers take seconds, and --help should not.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Unlearn facts from a language model, attack the result, diagnose it, and report.",
)
TRACEBACK = "SSIUU_TRACEBACK"  # environment variable: raise errors as Python does, for bug reports
# What the parts that write files say where a disk is full: the system, safetensors, and torch.save.
FULL = ("No space left", "Disk quota exceeded", "os error 28", "file write failed", "unexpected pos")


def command(function: Callable) -> Callable:
    """Register a command whose failures are printed as one line, with exit status 2."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        logging.basicConfig(
            level="WARNING", format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)]
        )
        logging.getLogger("transformers").setLevel(logging.ERROR)
        from .progress import write_plainly

        write_plainly(sys.stdout, sys.stderr)
        try:
            function(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(TRACEBACK):
                raise
            typer.secho(f"ssiuu: {said_of(error)}", fg="red", err=True)
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)

    run.__doc__ = inspect.cleandoc(function.__doc__)
    return app.command()(run)


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


RunFolder = Annotated[Path, typer.Argument(help="Run folder that `ssiuu unlearn` wrote.")]
RunFolders = Annotated[list[Path], typer.Argument(help="Run folders that `ssiuu unlearn` wrote, of one base model.")]
Out = Annotated[Path, typer.Option(help="Folder to write: a new or an empty one.")]
Model = Annotated[str, typer.Option(help="Hub name, local folder, or `smollm2` (the packaged SmolLM2-135M-Instruct).")]
Dtype = Annotated[str, typer.Option(help="Type of the weights: float32, or bfloat16 with stochastic rounding.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Shots = Annotated[int, typer.Option(help="Worked examples in the prompt, 0 to 3.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


@command
def demo(
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
):
    """Unlearn some people from SmolLM2 with GD and with SSIUU, attack and diagnose both, and write the report.

    Takes about six minutes on two CPU cores. An interrupted demo goes on where it stopped.

    Example: `ssiuu demo --out runs/demo`
    """
    from .commands.demo import run_demo

    run_demo(out, seed=seed)


@command
def unlearn(
    out: Out,
    model: Model = "smollm2",
    method: Annotated[str, typer.Option(help="gd or ssiuu.")] = "ssiuu",
    facts: Annotated[
        str | None, typer.Option(help="`builtin`, a .jsonl file or a datasets name; split by person.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="Forget set, instead of --facts.")] = None,
    retain: Annotated[str | None, typer.Option(help="Retain set, instead of --facts.")] = None,
    forget_people: Annotated[int, typer.Option(help="People to forget, drawn from --facts.")] = 4,
    retain_people: Annotated[int, typer.Option(help="People to keep, drawn from --facts.")] = 12,
    known_probability: Annotated[
        float | None,
        typer.Option(help="Use only facts that the model answers with at least this probability."),
    ] = None,
    shots: Shots = 2,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; constant.")] = 1e-5,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    penalty_weight: Annotated[float, typer.Option(help="lambda, or where a steered lambda starts.")] = 1e-3,
    penalty_share: Annotated[
        float | None,
        typer.Option(help="Steer lambda so that this share of I- has a penalty gradient above its loss gradient."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="Attributed quantity: prob (the paper), geometric_mean_prob or log_prob.")
    ] = "prob",
    engine: Annotated[
        str, typer.Option(help="What makes the penalty's gradient: one-backward, or two-backward as in the paper.")
    ] = "one-backward",
    update_in_backward: Annotated[
        bool,
        typer.Option(
            "--update-in-backward",
            help="Update each parameter in the backward and free its gradients, to save memory; ssiuu alone.",
        ),
    ] = False,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps at most.")] = 100,
    forget_batch: Annotated[int, typer.Option(help="Forget facts in a micro-batch; 0 is all of them.")] = 0,
    retain_batch: Annotated[int, typer.Option(help="Retain facts in a micro-batch; 0 is as many as forget.")] = 0,
    accumulate: Annotated[int, typer.Option(help="Micro-batches in a step.")] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(help="Stop when FS is this low; default chance among the options, or ROUGE-L recall 0.1971."),
    ] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 1,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 keeps none.")] = 10,
    evaluation_facts: Annotated[int, typer.Option(help="Retain facts scored along the way, at most.")] = 24,
    dtype: Dtype = "float32",
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations, to save memory.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, with the same options.")
    ] = False,
):
    """Unlearn facts from a model, and keep the unlearned model in a run folder.

    Examples:

    `ssiuu unlearn --model smollm2 --method ssiuu --penalty-share 0.25 --target geometric_mean_prob
    --known-probability 0.2 --out runs/ssiuu`

    `ssiuu unlearn --model meta-llama/Llama-3.2-1B --method gd --forget forget01.jsonl --retain retain99.jsonl
    --shots 0 --forget-batch 8 --bf16 --out runs/tofu-gd`
    """
    options = dict(locals())
    out, resume = options.pop("out"), options.pop("resume")
    from .commands.unlearn import unlearn as run_unlearning
    from .data.sources import BUILTIN
    from .options import UnlearnOptions

    if facts is None and forget is None and retain is None:
        options["facts"] = BUILTIN
    if method == "gd":  # which has no penalty
        options = {name: value for name, value in options.items() if not name.startswith(("penalty", "target"))}
    run = run_unlearning(UnlearnOptions.of(options), out, resume=resume)
    _print_summary([run.path])


@command
def finetune(
    out: Out,
    facts: Annotated[str, typer.Option(help="`builtin`, a .jsonl file or a datasets name.")] = "builtin",
    model: Model = "smollm2",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Facts in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW; constant.")] = 1e-5,
    shots: Shots = 0,
    dtype: Dtype = "float32",
    trust_remote_code: TrustRemoteCode = False,
    seed: Seed = 0,
):
    """Teach a model the facts of a file: the first step of TOFU. Its `model/` can then be unlearned from.

    Example: `ssiuu finetune --facts full.jsonl --model smollm2 --out runs/taught`
    """
    options = dict(locals())
    from .commands.finetune import finetune as run_finetuning

    run = run_finetuning(options.pop("out"), **options)
    typer.echo(f"model: {run.model}")


@command
def attack(
    run: RunFolder,
    kind: Annotated[list[str] | None, typer.Option(help="harmful or benign; default both.")] = None,
    fraction: Annotated[
        list[float] | None, typer.Option(help="p of harmful attacks; default the paper's, 0.1 and 0.3.")
    ] = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="Default the paper's three of each kind.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Default 0; repeat for several.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each attack.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Samples in a step.")] = 8,
    instructions: Annotated[
        str, typer.Option(help="Benign data: `builtin`, a .jsonl file or a datasets name (Alpaca's schema).")
    ] = "builtin",
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 5,
):
    """Retrain an unlearned model a little, and see whether the facts come back. The run's model stays as it is.

    Example: `ssiuu attack runs/ssiuu --kind harmful --fraction 0.3 --learning-rate 1e-5 --steps 10`
    """
    from .attacks.grid import attack_grid
    from .attacks.kinds import ATTACK_KINDS
    from .commands.attack import attack_run

    attacks = attack_grid(
        kind or ATTACK_KINDS, seed or (0,), fractions=fraction, learning_rates=learning_rate,
        steps=steps, batch_size=batch_size, instructions=instructions, evaluate_every=evaluate_every,
    )  # fmt: skip
    attack_run(run, attacks)
    _print_summary([run])


@command
def diagnose(
    runs: RunFolders,
    batch_size: Annotated[int, typer.Option(help="Facts in a forward and backward.")] = 8,
    target: Annotated[str, typer.Option(help="prob (the paper), geometric_mean_prob or log_prob.")] = "prob",
    backend: Annotated[str, typer.Option(help="auto, reference or native.")] = "auto",
):
    """Measure the influence variation D+ (erased) and D- (hidden) of every neuron over the forget set.

    Example: `ssiuu diagnose runs/gd runs/ssiuu`
    """
    from .commands.diagnose import diagnose_runs

    diagnose_runs(runs, batch_size=batch_size, target=target, backend=backend)
    _print_summary(runs)


@command
def evaluate(run: RunFolder):
    """Score a run's model and the one it started from, by choice and by generation.

    Example: `ssiuu evaluate runs/ssiuu`
    """
    from .commands.evaluate import evaluate_run

    evaluate_run(run)
    _print_summary([run])


@command
def report(
    runs: RunFolders,
    out: Annotated[Path, typer.Option(help="Folder of the report; what is there is replaced.")] = Path("report"),
):
    """Write one self-contained HTML page about finished runs, with its pictures as PNG beside it.

    Example: `ssiuu report runs/gd runs/ssiuu --out report`
    """
    from .report.page import write_report

    page = write_report(runs, out)
    _print_summary(runs)
    typer.echo(f"report: {page}")


@command
def env():
    """Print versions, processor, device and backends, for bug reports."""
    import ssiuu_kernels as sk

    typer.echo(sk.collect_env())


def _print_summary(runs: list[Path]) -> None:
    from .progress import console
    from .report.table import summary_table

    console.print(summary_table(runs))


if __name__ == "__main__":
    app()

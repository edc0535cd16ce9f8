"""The demonstration: unlearn some people from SmolLM2 with GD and with SSIUU, attack both, diagnose both, report."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.markup import escape

from ..attacks.attack import Attack
from ..data.facts import Fact, Split, by_subject, check_split, load_facts
from ..data.sources import BUILTIN
from ..evaluation.known import known_facts
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..models.smollm2 import PACKAGED
from ..options import DiagnoseOptions, UnlearnOptions
from ..progress import console, job
from ..report.page import write_report
from ..report.table import summary_table
from ..runs.folder import COMPLETE, Run
from .attack import attack_run
from .diagnose import diagnose_runs
from .unlearn import unlearn

METHODS = ("gd", "ssiuu")
REPORT = "report"

# What fits into minutes on two cores, and still shows something. One worked example: without it the model gives its
# answers probabilities near 1e-4, and each further one costs tokens in every step. The geometric mean probability as
# target, and the share: see docs/demonstration.md.
SHOTS = 1
CANDIDATE_PEOPLE, MIN_PROBABILITY, CERTAIN = 60, 0.15, 0.8
FORGET_PEOPLE, FACTS_PER_PERSON, RETAIN_PEOPLE, RETAIN_FACTS, TEST_FACTS = 9, 1, 16, 24, 24
OPTIONS = UnlearnOptions(
    shots=SHOTS,
    learning_rate=1e-5,
    max_steps=30,
    retain_batch=9,
    evaluation_facts=6,
)
SETTINGS = {"gd": {}, "ssiuu": {"penalty_weight": 1e3, "penalty_share": 0.25, "target": "geometric_mean_prob"}}
# Of nine facts too few may be answered wrongly to attack with some of them.
ATTACKS = (
    Attack("harmful", 0.3, 1e-5, pool="all", steps=15, batch_size=4, evaluate_every=3),
    Attack("benign", None, 1e-5, pool="all", steps=15, batch_size=4, evaluate_every=5),
)
# In P(answer) itself, as in the paper, an unlearned model's attributions vanish with P; its logarithm keeps them.
DIAGNOSIS = DiagnoseOptions(target="log_prob")

Result = TypeVar("Result")


def run_demo(out_dir: str | Path, *, seed: int = 0, model: str = PACKAGED, options: UnlearnOptions = OPTIONS) -> Path:
    """Run the demonstration and print its table. Steps that an interrupted demonstration finished are not repeated.

    Args:
        out_dir: receives gd/, ssiuu/ (run folders) and report/.
        seed: of the people, and of the order of facts.
        model: as for `load_model`.
        options: of both runs; method, model and seed are set here.

    Returns:
        Path of report.html.

    Raises:
        ValueError: a folder with other contents, or a model that knows too few facts.
    """
    out = Path(out_dir)
    if out.exists() and not {path.name for path in out.iterdir()} <= {*METHODS, REPORT}:
        raise ValueError(f"{out} is not a demo folder; choose another with --out")
    started = time.perf_counter()

    def phase(title: str, work: Callable[[], Result]) -> Result:
        console.rule(f"[bold]{escape(title)}[/bold]  [dim]{time.perf_counter() - started:.0f} s", align="left")
        return work()

    split = phase("Facts that the model knows", lambda: _split(out, model, options, seed))
    runs = [
        phase(
            f"Unlearn with {method.upper()}", lambda method=method: _unlearn(out, model, method, options, seed, split)
        )
        for method in METHODS
    ]
    for run in runs:
        phase(f"Attack {run.path.name.upper()}", lambda run=run: attack_run(run.path, ATTACKS))
    folders = [run.path for run in runs]
    phase("Diagnose", lambda: diagnose_runs(folders, DIAGNOSIS))
    page = phase("Report", lambda: write_report(folders, out / REPORT))
    console.print(summary_table(folders))
    console.print(f"\n{time.perf_counter() - started:.0f} seconds. Report: {page}", markup=False)
    return page


def _split(out: Path, model: str, options: UnlearnOptions, seed: int) -> Split:
    """The sets of the runs that are there, or a new choice among what the model knows."""
    for method in METHODS:
        if (out / method / "split.json").is_file():
            return Run(out / method).split()
    people = by_subject(load_facts(BUILTIN))
    names = random.Random(seed).sample(list(people), CANDIDATE_PEOPLE)
    facts = [fact for name in names for fact in people[name]]
    net, tokenizer = load_model(model)
    protocol = Protocol.of(options, net, tokenizer)
    with job("find known facts", len(facts)) as bar:
        scores = protocol.score(net, facts, progress=bar.advance)
    return choose_known(known_facts(scores, facts, MIN_PROBABILITY), known_facts(scores, facts, CERTAIN))


def choose_known(known: list[Fact], certain: list[Fact]) -> Split:
    """Forget some facts of the people that the model knows best, keep the next people; the rest are the test set.

    The forget set leaves out two kinds of facts. Those that share their answer with another known fact: forgetting that
    one man was born in Germany while learning that another was says little about either. And certain facts: the
    gradient of log P vanishes as P nears 1, so they take more steps than there is time for.

    Args:
        known: facts that the model answers, surest first.
        certain: those of them that it answers with a probability near 1.

    Raises:
        ValueError: too few people.
    """
    times = Counter(fact.answer for fact in known)
    people = {
        name: [fact for fact in facts if times[fact.answer] == 1 and fact not in certain]
        for name, facts in by_subject(known).items()
    }
    names = sorted(people, key=lambda name: len(people[name]), reverse=True)
    if len(names) < FORGET_PEOPLE + RETAIN_PEOPLE + 1 or len(people[names[FORGET_PEOPLE - 1]]) < FACTS_PER_PERSON:
        raise ValueError(
            f"the model knows too few facts ({len(known)} about {len(names)} people) for the demonstration; "
            "use a model that knows more"
        )
    forget = [fact for name in names[:FORGET_PEOPLE] for fact in people[name][:FACTS_PER_PERSON]]
    kept = set(names[FORGET_PEOPLE : FORGET_PEOPLE + RETAIN_PEOPLE])
    retain = [fact for fact in known if fact.subject in kept][:RETAIN_FACTS]
    test = [fact for fact in known if fact.subject in names[FORGET_PEOPLE + RETAIN_PEOPLE :]][:TEST_FACTS]
    return check_split(Split(forget, retain, test))


def _unlearn(out: Path, model: str, method: str, options: UnlearnOptions, seed: int, split: Split) -> Run:
    run = Run(out / method)
    started = (run.path / "config.json").is_file()
    if started and run.read("config.json")["status"] == COMPLETE:
        console.print(f"{run.path} is finished", markup=False)
        return run
    options = options.replace(model=model, method=method, seed=seed, **SETTINGS[method])
    return unlearn(options, run.path, resume=started, split=split)

"""The report of runs: a self-contained HTML page, its pictures as PNG, its table as Markdown and JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import ssiuu_kernels as sk

from ..attacks.earlier import DEFINITION, WHOLE
from ..attacks.kinds import ATTACK_KINDS
from ..attacks.pool import POOLS
from ..runs.locks import locked
from ..runs.read import RunRecord, read_runs
from . import figures as plots
from .groups import attack_groups, attack_summary
from .style import save
from .table import NOT_RUN, as_markdown, table_rows

CAPTIONS = {
    "overview": "What unlearning did to neurons, and how much of the forgotten answers further training brings back: "
    "mean of all learning rates and seeds, over the facts that an attack does not train on.",
    "influence": "Influence variation summed over neurons, strongest first. A method that erases is high on the left, "
    "a method that hides is high on the right.",
    "modules": "Where influence changed: each cell is the mean over one module's strongest neurons in one layer.",
    "lens": "Logit lens: for each decoder layer, the share of forget facts whose answer its state prefers to a random "
    "wrong one. Near 0.5 the layer knows nothing of the answer (erased); far below it, something holds the answer "
    "down (hidden).",
    "ablation": "What the unlearned model answers with the neurons of largest D- set to zero (filled), and with as "
    "many random neurons of the same kinds (hatched). Where the filled bars rise well above the hatched ones, the "
    "facts come back without these neurons: they were hidden, not erased.",
    "cka": "Similarity (debiased linear CKA) of the states at the last token of the prompt with those of the original "
    "model, layer by layer. Lower on the forget prompts than on the retain prompts means a change that is aimed at the "
    "forgotten facts.",
    "drift": "Attributions of all neurons to the answer before unlearning, after it, and after an attack, and how they "
    "correlate. A model that hides falls back under an attack: its attributions move, and towards those of the "
    "original model.",
    "attacks": "Attacks that train, scored on facts that they do not train on. Thin: one learning rate and seed; "
    "thick: their mean. Lower is more robust. "
    "The dashed line is the original model over all forget facts.",
    "training": "What each unlearning step logged.",
}
METRICS = {
    "FS": "Forget score: share of the forget facts that the model still answers, choosing the true answer over the "
    "false options (or ROUGE-L recall of the generated answer, for facts without options). At 1/3 with three options "
    "it answers by chance, at 1/2 with two.",
    "RS": "Retain score: the same over facts that should be kept, from people the unlearning trained to keep.",
    "RS, other people": "The same over people in neither the forget set nor the retain set.",
    "P(answer)": "Mean probability of the true answer, given the question. It moves where a few facts make FS coarse.",
    "by generation": "The same when the prompt lists the options and the model writes its choice.",
    "margin": "Mean lead of the true answer over the best false option, in log-likelihood. Below 0, it loses.",
    **{f"{kind.name} attack": kind.summary for kind in ATTACK_KINDS.values()},
    "pool: (wrong), (all)": "The pool of an attack, the facts that it is judged by: "
    + "; ".join(f"{name} are {meaning}" for name, meaning in {**POOLS, WHOLE: DEFINITION}.items())
    + ".",
    "highest value": "The highest value over the steps and the learning rates of an attack, as the paper reports it: "
    "the mean over the seeds, ± their standard deviation. Seeds that lack a learning rate are left out. Beside it: how "
    "many seeds, learning rates and facts it rests on.",
    "D+": "Positive influence removed, summed over 100 neurons: knowledge erased.",
    "D-": "Negative influence added, summed over 100 neurons: neurons grown to push the answer down, so that it is "
    "hidden rather than erased.",
    "influence variation of": "The quantity that neurons are credited with: prob is P(answer), as in the paper; "
    "log_prob its logarithm, logit the answer's logits, margin its logit less that of the best false option. "
    "Attribution to prob is proportional to P(answer), so once a model gives an answer almost no probability, D- in "
    "prob is almost 0 whatever neurons grew. log_prob grows as a model becomes sure of something else; logit and "
    "margin do neither.",
    "lambda, share": "Weight of the SSIUU penalty, and the fraction of the parameters of negative attribution whose "
    "penalty gradient outweighs their loss gradient. Shares compare between models; lambdas do not.",
}


def write_report(run_dirs: Iterable[str | Path], out_dir: str | Path) -> Path:
    """Write the report of finished runs of one model; parts not run yet are marked as such.

    Args:
        run_dirs: run folders, in the order of the columns.
        out_dir: receives report.html, report.json, table.md and the figures as PNG; created, files there replaced.

    Returns:
        Path of report.html, one file that loads nothing else.

    Raises:
        ValueError: see `read_runs`; another process writes there.
        OSError: a folder that cannot be written to.
    """
    records = read_runs(run_dirs)
    with locked(Path(out_dir)):
        return _write(records, Path(out_dir))


def _write(records: Sequence[RunRecord], out_dir: Path) -> Path:
    figures = []
    for name, figure in plots.draw_all(records).items():
        file = out_dir / f"{name}.png"
        save(figure, file)
        figures.append((name, CAPTIONS[name], base64.b64encode(file.read_bytes()).decode("ascii")))
    (out_dir / "report.json").write_text(json.dumps(as_json(records), indent=1) + "\n", encoding="utf-8")
    (out_dir / "table.md").write_text(as_markdown(records), encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        model=records[0].config["model"],
        runs=[
            {"label": record.label, "colour": record.color, "config": json.dumps(record.config, indent=1)}
            for record in records
        ],
        rows=table_rows(records),
        figures=figures,
        metrics=METRICS,
        environment=sk.collect_env(),
        not_run=NOT_RUN,
    )
    path = out_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def as_json(records: Sequence[RunRecord]) -> dict:
    """The report's numbers: model, and for every run its configuration, evaluation, attacks and diagnosis."""
    groups = attack_groups(records)
    return {
        "model": records[0].config["model"],
        "runs": [
            {
                "name": record.path.name,
                "label": record.label,
                "config": record.config,
                "facts": record.split,
                "steps": record.steps,
                "seconds": record.seconds,
                "evaluation": record.evaluation,
                "attacks": {group.title: attack_summary(record, group) for group in groups},
                "diagnosis": record.diagnosis,
                "lens": record.lens,
                "ablation": record.ablation,
                "cka": record.cka,
                "drift": record.drift,
            }
            for record in records
        ],
    }

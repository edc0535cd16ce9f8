"""The page of an audit: its first line says what was found; below are the figures and thresholds behind it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

import ssiuu_kernels as sk

from ..analysis.verdict import ERASED, HIDDEN, THRESHOLDS, UNCLEAR
from .style import FAINT, INK, STYLE, new_figure, save, whole_numbers

COLORS = {ERASED: "#2f6f4f", HIDDEN: "#b3541e", UNCLEAR: FAINT}
CAPTIONS = {
    "signals": "Where the facts were looked for, and what was found: every look of every test. The dashed line is "
    "what a model shows that knows none of them.",
    "layers": "The facts in the residual stream, read by the first model's norm and output head. A model that lost "
    "them stays near the dashed line where the first model is above it.",
}


def write_audit_page(record: Mapping[str, Any], folder: Path) -> Path:
    """Write audit.html and its pictures into the folder.

    Args:
        record: as `ssiuu audit` keeps it in audit.json.

    Returns:
        The path of audit.html, one file that loads nothing else.
    """
    figures = []
    for name, figure in _figures(record).items():
        file = folder / f"{name}.png"
        save(figure, file)
        figures.append((name, CAPTIONS[name], base64.b64encode(file.read_bytes()).decode("ascii")))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("audit.html.j2").render(
        verdict=record["verdict"],
        sentence=record["sentence"],
        config=record["config"],
        facts=record["facts"],
        looked_for=record["looked_for"],
        signals=[_signal_row(signal) for signal in record["signals"]],
        thresholds=[(name, value, meaning) for name, (value, meaning) in THRESHOLDS.items()],
        figures=figures,
        scores=_scores(record["before"]["scores"], record["after"]["scores"]),
        influence=record["after"]["influence"],
        ablated=[_ablated_row(row) for row in record["after"]["ablated"]],
        attacks=[_attack_row(attack) for attack in record["attacks"]],
        options=json.dumps(record["config"], indent=1),
        environment=sk.collect_env(),
    )
    path = folder / "audit.html"
    path.write_text(page, encoding="utf-8")
    return path


def _signal_row(signal: Mapping[str, Any]) -> dict[str, str]:
    row = {"name": signal["name"], "vote": signal["vote"], "strongest": signal["strongest"] or "not measured"}
    if signal["strongest"] is None:
        return row | dict.fromkeys(("mean", "p_value", "left"), "")
    values = {"mean": ".2f", "p_value": ".1g", "left": ".0%"}
    return row | {name: format(signal[name], digits) for name, digits in values.items()}


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[str, str, str]]:
    return [(name.replace("_", " "), f"{before[name]:.3f}", f"{after[name]:.3f}") for name in after if name in before]


def _ablated_row(row: Mapping[str, Any]) -> dict[str, str]:
    which = "with the largest D-" if row["which"] == "hidden" else "at random"
    return {"name": f"{row['neurons']} {which}", "score": f"{row['score']:.2f}", "mean": f"{row['mean']:.2f}"}


def _attack_row(attack: Mapping[str, Any]) -> dict[str, str]:
    fraction = "" if attack["fraction"] is None else f" p = {attack['fraction']:g}"
    rate = "" if attack["learning_rate"] is None else f", learning rate {attack['learning_rate']:g}"
    found = attack["found"]
    return {
        "name": f"{attack['kind']}{fraction}{rate}, seed {attack['seed']}",
        "facts": str(len(attack["unseen"])),
        "score": f"{attack['max_unseen_fs']:.2f}",
        "mean": f"{found['mean']:.2f}" if found["shares"] else "not measured",
    }


def _figures(record: Mapping[str, Any]) -> dict[str, Figure]:
    with matplotlib.rc_context(STYLE):
        figures = {"signals": _signals(record["signals"])}
        if record["after"]["layers"]:
            figures["layers"] = _layers(
                *([found["mean"] for found in record[when]["layers"]] for when in ("before", "after"))
            )
    return figures


def _signals(signals: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axes = new_figure(1, 1, (8, 0.8 + 0.5 * len(signals)))
    ax = axes[0, 0]
    for row, signal in enumerate(signals):
        means = [look["mean"] for look in signal["looks"].values()]
        ax.plot(means, [row] * len(means), "o", color=COLORS[signal["vote"]], alpha=0.75, markersize=8)
        ax.text(1.04, row, signal["vote"], va="center", color=COLORS[signal["vote"]])
    ax.axvline(0.5, color=INK, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(signals)), [signal["name"] for signal in signals])
    ax.set_ylim(len(signals) - 0.5, -0.5)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("found")
    return figure


def _layers(before: Sequence[float], after: Sequence[float]) -> Figure:
    figure, axes = new_figure(1, 1, (8, 3.2))
    ax = axes[0, 0]
    layers = range(1, len(before) + 1)
    ax.plot(layers, before, color=FAINT, marker="o", label="before")
    ax.plot(layers, after, color=COLORS[HIDDEN], marker="o", label="after")
    ax.axhline(0.5, color=INK, linestyle="--", linewidth=1)
    ax.set_ylim(-0.02, 1.02)
    ax.xaxis.set_major_locator(whole_numbers())
    ax.set_xlabel("decoder layer")
    ax.set_ylabel("found")
    ax.legend(loc="lower right")
    return figure

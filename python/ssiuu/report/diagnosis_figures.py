"""Figures of a diagnosis beside influence: logit lens, ablation, similarity of states, drift under an attack."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..runs.read import RunRecord
from .style import FAINT, line_of, method_legend, new_figure, whole_numbers


def lens_curves(records: Sequence[RunRecord]) -> Figure | None:
    """Share of facts whose answer the logit lens sees ahead, by layer."""
    records = [record for record in records if record.lens and record.lens["after"]["share"]]
    if not records:
        return None
    figure, axes = new_figure(1, 1, (10, 3.6))
    ax = axes[0, 0]
    for before in {tuple(record.lens["before"]["share"]) for record in records}:
        ax.plot(range(1, len(before) + 1), before, color=FAINT, linewidth=1.4)
        ax.annotate(
            "original model", (len(before), before[-1]), (4, 0), textcoords="offset points", va="center", color=FAINT,
            fontsize=9,
        )  # fmt: skip
    for record in records:
        share = record.lens["after"]["share"]
        ax.plot(range(1, len(share) + 1), share, **line_of(record))
    _mark_level(ax, 0.5, "chance")
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("decoder layer")
    ax.set_ylabel("share of facts")
    ax.set_title("Answer ahead of a wrong one, by the logit lens")
    ax.xaxis.set_major_locator(whole_numbers(8))
    method_legend(figure, records)
    return figure


def ablation_bars(records: Sequence[RunRecord]) -> Figure | None:
    """Scores with the neurons of largest D- at zero, beside as many random ones."""
    records = [record for record in records if record.ablation]
    if not records:
        return None
    has_margin = all("margin" in record.ablation["none"] for record in records)
    second = ("margin", "margin of the forgotten answer") if has_margin else ("probability", "mean P(forgotten answer)")
    figure, axes = new_figure(1, 2, (10, 3.8))
    for ax, (name, label) in zip(axes[0], (("score", "FS"), second), strict=True):
        _bars(ax, records, name)
        ax.set_ylabel(label)
        ax.set_xlabel("neurons set to zero")
    axes[0, 0].set_title("What the model answers without neurons")
    plain, random = Patch(facecolor=FAINT), Patch(facecolor="white", edgecolor=FAINT, hatch="///")
    axes[0, 0].legend([plain, random], ["largest D⁻", "random"], loc="upper left", ncols=2, fontsize=9)
    method_legend(figure, records)
    return figure


def _bars(ax: Axes, records: Sequence[RunRecord], name: str) -> None:
    counts = sorted({part["count"] for record in records for part in record.ablation["ablated"]})
    width = 0.84 / (2 * len(records))
    for index, record in enumerate(records):
        style = {"edgecolor": record.color, "alpha": 1 - 0.25 * min(record.style, 2)}
        left = (2 * index - len(records)) * width
        ax.bar(left + width, record.ablation["none"][name], 2 * width * 0.9, facecolor=record.color, **style)
        for part in record.ablation["ablated"]:
            x = 1 + counts.index(part["count"]) + left
            ax.bar(x + 0.5 * width, part["hidden"][name], width * 0.9, facecolor=record.color, **style)
            ax.bar(x + 1.5 * width, part["random"][name], width * 0.9, facecolor="white", hatch="///", **style)
    ax.axhline(0, color=FAINT, linewidth=0.8)
    ax.set_xticks(range(len(counts) + 1), ["none", *map(str, counts)])
    ax.grid(False, axis="x")
    ax.margins(y=0.2)


def cka_curves(records: Sequence[RunRecord]) -> Figure | None:
    """Similarity of the states to the original model's, by layer."""
    sets = ("forget", "retain")
    records = [record for record in records if record.cka and any(name in record.cka for name in sets)]
    if not records:
        return None
    shown = [name for name in sets if any(name in record.cka for record in records)]
    figure, axes = new_figure(1, len(shown), (10, 3.6), sharey=True)
    for ax, name in zip(axes[0], shown, strict=True):
        for record in records:
            values = [float("nan") if value is None else value for value in record.cka.get(name, ())]
            ax.plot(range(1, len(values) + 1), values, **line_of(record))
        ax.set_title(f"{name} prompts")
        ax.set_xlabel("decoder layer")
        ax.xaxis.set_major_locator(whole_numbers(8))
    axes[0, 0].set_ylabel("CKA with the original model")
    axes[0, 0].set_ylim(top=1.01)
    method_legend(figure, records)
    return figure


def drift_panels(records: Sequence[RunRecord]) -> Figure | None:
    """Attributions before unlearning, after it and after an attack: their distribution, and their correlations."""
    records = [record for record in records if record.drift]
    if not records:
        return None
    figure, axes = new_figure(len(records), 2, (10, 0.8 + 2.6 * len(records)), width_ratios=(1.6, 1))
    for (left, right), record in zip(axes, records, strict=True):
        _distributions(left, record)
        _correlations(right, record)
    axes[-1, 0].set_xlabel("attribution (logarithmic on both sides of 0)")
    return figure


def _distributions(ax: Axes, record: RunRecord) -> None:
    histogram = record.drift["histogram"]
    edges = histogram["edges"]
    styles = {
        "original": {"color": FAINT, "linewidth": 1.6},
        "unlearned": {"color": record.color},
        "attacked": {"color": record.color, "linestyle": "--"},
    }
    for name, style in styles.items():
        ax.stairs(histogram[name], range(len(edges)), label=name, baseline=None, **style)
    middle = len(edges) // 2
    ticks = (0, middle // 2, middle, middle + middle // 2 + 1, len(edges) - 1)
    ax.set_xticks(ticks, [f"{edges[tick]:.0e}" if edges[tick] else "0" for tick in ticks])
    ax.set_ylim(0, 1.25 * max(max(histogram[name]) for name in styles))  # room for the legend
    ax.set_ylabel("share of neurons")
    ax.set_title(f"{record.label}: attributions ({record.drift['options']['target']})")
    ax.legend(loc="upper center", ncols=3, fontsize=9)


def _correlations(ax: Axes, record: RunRecord) -> None:
    pairs = {
        "unlearned_attacked": "unlearned,\nattacked",
        "original_unlearned": "original,\nunlearned",
        "original_attacked": "original,\nattacked",
    }
    for index, (name, hatch) in enumerate((("pearson", ""), ("spearman", "///"))):
        values = [record.drift[name][pair] or 0.0 for pair in pairs]
        places = [place + (index - 0.5) * 0.38 for place in range(len(pairs))]
        face = "white" if hatch else record.color
        ax.barh(places, values, 0.36, facecolor=face, edgecolor=record.color, hatch=hatch, label=name.capitalize())
        for place, value in zip(places, values, strict=True):
            ax.text(max(value, 0) + 0.02, place, f"{value:.2f}", va="center", fontsize=9)
    ax.set_yticks(range(len(pairs)), pairs.values())
    ax.invert_yaxis()
    ax.set_xlim(min(0, ax.get_xlim()[0]), 1.25)
    ax.set_xticks((0, 0.5, 1))
    ax.axvline(0, color=FAINT, linewidth=0.8)
    ax.grid(False, axis="y")
    ax.set_title("correlation")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=9)


def _mark_level(ax: Axes, level: float, text: str) -> None:
    ax.axhline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
    ax.annotate(
        text, (1, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        color=FAINT, fontsize=9,
    )  # fmt: skip

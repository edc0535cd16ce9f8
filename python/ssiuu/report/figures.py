"""The figures of a report. Each takes the runs and returns a figure, or None where no run has what it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ..analysis.influence import KINDS, TOP
from ..attacks.kinds import AttackGroup, get_kind
from ..runs.read import RunRecord
from .diagnosis_figures import ablation_bars, cka_curves, drift_panels, lens_curves
from .groups import attack_groups, attacks_in, mean_curve
from .style import FAINT, STYLE, from_zero, line_of, method_legend, new_figure, whole_numbers


def draw_all(records: Sequence[RunRecord]) -> dict[str, Figure]:
    """Name -> figure, of every figure that the runs have data for."""
    with matplotlib.rc_context(STYLE):
        figures = {
            "overview": overview(records),
            "influence": influence_curves(records),
            "modules": module_maps(records),
            "lens": lens_curves(records),
            "ablation": ablation_bars(records),
            "cka": cka_curves(records),
            "drift": drift_panels(records),
            "attacks": attack_curves(records),
            "training": training_curves(records),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def overview(records: Sequence[RunRecord]) -> Figure | None:
    """One plot for a README: what unlearning did to neurons, and what further training brings back."""
    diagnosed = [record for record in records if record.diagnosis]
    groups = _one_of_each_kind(records)
    if not diagnosed and not groups:
        return None
    widths = [1.25] * bool(diagnosed) + [1.0] * len(groups)
    figure, axes = new_figure(1, len(widths), (10, 3.7), width_ratios=widths)
    panels = iter(axes[0])
    if diagnosed:
        _influence_bars(next(panels), diagnosed)
    attacked = list(panels)
    for ax, group in zip(attacked, groups, strict=True):
        _recovery(ax, records, group)
    for ax in attacked[1:]:
        ax.sharey(attacked[0])
        ax.set_ylabel("")
    method_legend(figure, records)
    return figure


def _influence_bars(ax: Axes, records: Sequence[RunRecord]) -> None:
    height = 0.8 / len(records)
    largest = max(value for record in records for value in record.diagnosis["sum"].values()) or 1.0
    for group, name in enumerate(("d_plus", "d_minus")):
        for index, record in enumerate(records):
            value, y = record.diagnosis["sum"][name], group + (index - (len(records) - 1) / 2) * height
            ax.barh(y, value, height * 0.88, color=record.color, alpha=1 - 0.25 * min(record.style, 2))
            ax.text(value + 0.02 * largest, y, f"{value:.3g}", va="center", fontsize=9)
    ax.set_yticks([0, 1], ["Erased\nD⁺", "Hidden\nD⁻"])
    ax.set_ylim(1.55, -0.55)
    ax.set_xlim(0, 1.15 * largest)
    targets = ", ".join(sorted({record.diagnosis["target"] for record in records}))
    ax.set_xlabel(f"influence variation ({targets}), sum of {TOP} neurons")
    ax.set_title("What unlearning did to neurons")
    ax.grid(False, axis="y")


def _one_of_each_kind(records: Sequence[RunRecord]) -> list[AttackGroup]:
    """Of each kind that trains, the group that most runs have; among equals the one with the largest fraction."""

    def rank(group: AttackGroup) -> tuple:
        return sum(bool(attacks_in(record, group)) for record in records), group.fraction or 0

    groups = [group for group in attack_groups(records) if get_kind(group.kind).trains]
    kinds = dict.fromkeys(group.kind for group in groups)
    return [max((group for group in groups if group.kind == kind), key=rank) for kind in kinds]


def _recovery(ax: Axes, records: Sequence[RunRecord], group: AttackGroup) -> None:
    # The margin first: it still moves where probabilities of 1e-5 and of 1e-7 look the same.
    steps = [step for record in records for attack in attacks_in(record, group) for step in attack["steps"]]
    margin = any("unseen_margin" in step for step in steps)  # free text has none
    for record in records:
        curve = mean_curve(attacks_in(record, group), "unseen_margin" if margin else "unseen_probability")
        ax.plot(*curve, **line_of(record))
    _mark_before(ax, records, "forget_margin" if margin else "forget_probability")
    ax.set_title(f"Recovery, {group.kind} attack")
    ax.set_xlabel(f"attack step, {group.title}")
    ax.set_ylabel("margin of the forgotten answer" if margin else "mean P(forgotten answer)")
    if margin:
        ax.axhline(0, color=FAINT, linewidth=1.2)  # above, the model chooses the forgotten answer again
    else:
        from_zero(ax)


def _mark_before(ax: Axes, records: Sequence[RunRecord], name: str) -> None:
    """A line at the score of the original model, where the runs agree on it."""
    before = [record.evaluation["before"] for record in records if record.evaluation]
    levels = {round(scores[name], 4) for scores in before if name in scores}
    if len(levels) == 1:
        level = levels.pop()
        ax.axhline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.annotate(
            "original model", (1, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", color=FAINT, fontsize=9,
        )  # fmt: skip


def influence_curves(records: Sequence[RunRecord]) -> Figure | None:
    """Cumulative D+ and D- over neurons sorted by each score."""
    records = [record for record in records if record.variations]
    if not records:
        return None
    figure, axes = new_figure(1, 2, (10, 3.8), sharey=True)
    titles = {"d_plus": "D⁺: positive influence removed", "d_minus": "D⁻: negative influence added"}
    for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
        for record in records:
            scores = np.concatenate([getattr(v, name).flatten().numpy() for v in record.variations.values()])
            sums = np.cumsum(np.sort(scores.astype(np.float64))[::-1])
            shown = np.unique(np.geomspace(1, len(sums), 400).astype(int))
            ax.plot(shown, sums[shown - 1], **line_of(record))
        ax.axvline(TOP, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.annotate(
            f"{TOP} neurons", (TOP, 1), (-4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="right", va="top", color=FAINT, fontsize=9,
        )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel("neurons, strongest first")
        ax.set_yscale("log", nonpositive="mask")
        ax.set_title(title)
    low, top = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(low, top * 1e-8), top)
    axes[0, 0].set_ylabel("cumulative influence variation")
    method_legend(figure, records)
    return figure


def module_maps(records: Sequence[RunRecord]) -> Figure | None:
    """Mean over the top neurons of every module in every layer; one colour scale, so that panels compare."""
    records = [record for record in records if record.diagnosis]
    if not records:
        return None
    maps = {
        (record.path, name): [record.diagnosis["mean_top"][name][kind] for kind in _kinds(record)]
        for record in records
        for name in ("d_plus", "d_minus")
    }
    largest = max(value for rows in maps.values() for row in rows for value in row)
    # Few modules hold most of the influence: a square-root scale keeps the rest visible.
    norm = PowerNorm(0.5, 0, largest or 1.0)
    figure, axes = new_figure(len(records), 2, (10, 0.6 + 2.3 * len(records)), sharex=True)
    for row, record in zip(axes, records, strict=True):
        for ax, (name, symbol) in zip(row, {"d_plus": "D⁺", "d_minus": "D⁻"}.items(), strict=True):
            image = ax.imshow(maps[record.path, name], aspect="auto", cmap="magma_r", norm=norm)
            ax.set_yticks(range(len(_kinds(record))), _kinds(record))
            ax.xaxis.set_major_locator(whole_numbers(8))
            ax.set_title(f"{record.label}: {symbol}")
            ax.grid(False)
            ax.spines[:].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("layer")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.02)
    bar.set_label(f"mean of a module's top {TOP} neurons")
    bar.outline.set_visible(False)
    return figure


def _kinds(record: RunRecord) -> list[str]:
    return [kind for kind in KINDS if kind in record.diagnosis["mean_top"]["d_plus"]]


def attack_curves(records: Sequence[RunRecord]) -> Figure | None:
    """FS and answer probability of unseen facts: each attack thin, the mean of a run's attacks of one group thick."""
    groups = [group for group in attack_groups(records) if get_kind(group.kind).trains]
    if not groups:
        return None
    width = min(len(groups), 3)
    bands = math.ceil(len(groups) / width)
    figure, axes = new_figure(2 * bands, width, (10, 5.6 * bands), sharex="col", sharey="row")
    columns = [axes[2 * band : 2 * band + 2, place] for band in range(bands) for place in range(width)]
    for column in columns[len(groups) :]:
        for ax in column:
            ax.remove()
    for column, group in zip(columns, groups, strict=False):
        for ax, name, before in zip(column, ("fs", "probability"), ("fs", "forget_probability"), strict=True):
            for record in records:
                attacks = attacks_in(record, group)
                style = line_of(record)
                for attack in attacks if len(attacks) > 1 else ():
                    ax.plot(*mean_curve([attack], f"unseen_{name}"), **style | {"linewidth": 0.8, "alpha": 0.4})
                ax.plot(*mean_curve(attacks, f"unseen_{name}"), **style)
            _mark_before(ax, records, before)
            from_zero(ax)
        column[0].set_title(group.title)
        column[1].set_xlabel("attack step")
        column[1].tick_params(labelbottom=True)  # also where another panel of the column is below
    for rows, label in ((axes[::2, 0], "FS (unseen facts)"), (axes[1::2, 0], "mean P(forgotten answer)")):
        top = max(ax.get_ylim()[1] for ax in rows)
        for ax in rows:
            ax.set_ylim(0, top)
            ax.set_ylabel(label)
    method_legend(figure, records)
    return figure


def training_curves(records: Sequence[RunRecord]) -> Figure | None:
    """What every unlearning step logged."""
    if not any(record.metrics for record in records):
        return None
    figure, axes = new_figure(2, 3, (10, 5.6))
    panels = {
        "loss": ["loss"],
        "gradient norms (dashed: penalty)": ["loss_grad_norm", "penalty_grad_norm"],
        "lambda": ["lambda"],
        "share outweighed by the penalty": ["share"],
        "FS (dashed: RS)": ["fs", "rs"],
        "mean P(answer) (dashed: retain)": ["forget_probability", "retain_probability"],
    }
    for ax, (title, names) in zip(axes.flat, panels.items(), strict=True):
        for record in records:
            for index, name in enumerate(names):
                # A value that a method does not use is logged as null or 0, and has no curve.
                points = [(line["step"], line[name]) for line in record.metrics if line.get(name) is not None]
                if any(value != 0 for _, value in points):
                    style = line_of(record) | ({"linestyle": "--", "linewidth": 1.4} if index else {})
                    ax.plot(*zip(*points, strict=True), **style)
        ax.set_title(title)
        ax.xaxis.set_major_locator(whole_numbers())
        if title.startswith(("gradient", "lambda")) and ax.lines:
            ax.set_yscale("log", nonpositive="mask")
            low, high = ax.get_ylim()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_formatter("{x:g}")
        elif title != "loss":
            ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("unlearning step")
    method_legend(figure, records)
    return figure

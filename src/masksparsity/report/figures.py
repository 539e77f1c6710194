"""The figures of the report: results in, a matplotlib figure out, `None` where nothing is known.

They draw with the colours and under the style of `svg.py`, which turns them into text for the page.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from masksparsity.report.results import Results, change, count, number, pair, percent, unit_of
from masksparsity.report.svg import ACCENT, INK, MUTED, PAGE, PALE, STRONG

NARROW, WIDE = (5.2, 3.1), (10.8, 3.3)


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def accuracy(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Test accuracy in % after each stage."""
    names = (
        "baseline", "before_removal", "after_removal", "recalibrated", "finetuned", "scratch",
    )  # fmt: skip
    known = {name: number(results, "accuracy", name) for name in names}
    points = {name: 100 * value for name, value in known.items() if value is not None}
    if not points:
        return None
    figure = Figure(NARROW, layout="constrained")
    axes = figure.subplots()
    for x, (first, second) in enumerate(pairwise(name for name in points if name != "scratch")):
        removal = (first, second) == ("before_removal", "after_removal")
        width, colour = (3, ACCENT) if removal else (1.4, STRONG)
        axes.plot([x, x + 1], [points[first], points[second]], color=colour, linewidth=width)
    values = list(points.values())
    for x, (name, y) in enumerate(points.items()):
        face = PAGE if name == "scratch" else STRONG
        axes.plot(x, y, "o", markersize=7, color=STRONG, markerfacecolor=face)
        # The number stands where no line leaves the point.
        valley = y < min(values[max(x - 1, 0) : x] + values[x + 1 : x + 2], default=y)
        place: dict[str, Any] = {"xytext": (0, -16 if valley else 8), "textcoords": "offset points"}
        axes.annotate(percent(y / 100), (x, y), ha="center", **place)
    axes.set_xticks(range(len(points)), [name.replace("_", "\n") for name in points])
    low, high = min(values), max(values)
    span = max(high - low, 1.0)
    limits = low - 0.4 * span, high + 0.4 * span
    axes.set_ylim(limits)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylim(limits)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_ylabel("test accuracy, %")
    return figure


def cost(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Slim shares of MACs, parameters and latency."""
    known = {
        f"{name}\n{text(both[0])} → {text(both[1])}": both
        for key, name, text in (
            ("macs", "MACs", count),
            ("params", "parameters", count),
            ("latency_ms", "latency", lambda ms: f"{ms:.3g} ms"),
        )
        if (both := pair(results, key))
    }
    if not known:
        return None
    figure = Figure(NARROW, layout="constrained")
    axes = figure.subplots()
    for y, (dense, slim) in enumerate(known.values()):
        axes.barh(y, 1, 0.5, color=PALE)
        axes.barh(y, slim / dense, 0.5, color=STRONG)
        axes.text(max(1, slim / dense) + 0.03, y, change(dense, slim), va="center", fontsize=11)
    axes.set_yticks(range(len(known)), known)
    axes.set_ylim(len(known) - 0.4, -0.6)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def layers(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Channels that stay, layer by layer."""
    kept = results.get("layers")
    if not kept:
        return None
    figure = Figure(WIDE, layout="constrained")
    axes = figure.subplots()
    x = range(len(kept))
    axes.bar(x, [layer["dense"] for layer in kept], 0.8, color=PALE, label="dense")
    axes.bar(x, [layer["kept"] for layer in kept], 0.8, color=STRONG, label="kept")
    # Of a deep network only every so many names fit; all of them are in the table below the figure.
    every = -(-len(kept) // 40)
    axes.set_xticks(x[::every], [layer["name"] for layer in kept[::every]], rotation=90, fontsize=7)
    axes.set_xlim(-0.8, len(kept) - 0.2)
    axes.set_ylabel("channels")
    figure.legend(ncols=2, loc="outside upper right")
    return figure


def scales(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Histograms of |gamma| after the stages that change it."""
    titles = {
        "baseline": "after training",
        "global_l1": "after global L1",
        "masked": "after MaskSparsity",
    }
    shown = {name: results["scales"][name] for name in titles if name in results.get("scales", {})}
    if not shown:
        return None
    figure = Figure(WIDE, layout="constrained")
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, histogram) in zip(panels, shown.items(), strict=True):
        for which, colour in (("pruned", ACCENT), ("kept", STRONG)):
            shape = {"fill": True, "color": colour, "alpha": 0.75, "label": which}
            axes.stairs(histogram[which], histogram["edges"], **shape)
        mean = number(results, "kept_scale_mean", name)
        if mean is not None:
            axes.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
        axes.set_title(titles[name] + ("" if mean is None else f" · kept mean {mean:.2f}"))
        axes.set_xlabel("|scale|")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=2, loc="outside upper right")
    _log(panels[0])
    panels[0].set_ylim(bottom=0.6)  # a bin with a single channel in it can be seen
    panels[0].set_ylabel("channels")
    return figure


def curves(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Loss and test error over the epochs, stage by stage."""
    stages = {name: epochs for name, epochs in results.get("curves", {}).items() if epochs}
    if not stages:
        return None
    floor = 50 / (number(results, "total") or 1e4)  # half an image, where there is no error to draw
    figure = Figure((WIDE[0], 4.2), layout="constrained")
    panels = figure.subplots(2, len(stages), sharex="col", sharey="row", squeeze=False)
    for (error, loss), (name, epochs) in zip(panels.T, stages.items(), strict=True):
        for axes, key, colour in ((error, "test_accuracy", STRONG), (loss, "train_loss", ACCENT)):
            found = [(e["epoch"], y) for e in epochs if (y := number(e, key)) is not None]
            values = [max(100 * (1 - y), floor) if axes is error else y for _, y in found]
            marker = "." if len(found) == 1 else ""
            axes.plot([epoch for epoch, _ in found], values, color=colour, marker=marker)
            _log(axes)  # the first epochs and the last tenths of a percent can both be read
        error.set_title(name)
        loss.set_xlabel("epoch")
        loss.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0, 0].set_ylabel("test error, %")
    panels[1, 0].set_ylabel("training loss")
    return figure


def _over_runs(
    runs: Mapping[str, Results], label: str, ends: Callable[[Results], tuple[float, float] | None]
) -> Figure | None:
    """A line from dense to slim for every run, MACs across; the first run is this report's own."""
    lines = {
        name: (macs, values)
        for name, run in runs.items()
        if (macs := pair(run, "macs")) and (values := ends(run))
    }
    if len(lines) < 2:
        return None
    figure = Figure(NARROW, layout="constrained")
    axes = figure.subplots()
    unit, size = unit_of(max(macs[0] for macs, _ in lines.values()))
    for order, (name, (macs, values)) in enumerate(lines.items()):
        own = order == 0
        x = [value / size for value in macs]
        colour = STRONG if own else MUTED
        axes.plot(x, values, color=colour if own else PALE, zorder=3 if own else 2)
        axes.plot(x[0], values[0], "o", color=colour, markerfacecolor=PAGE, zorder=4)
        axes.plot(x[1], values[1], "o", color=colour, zorder=4)
        if len(lines) <= 8:  # more names than that are in each other's way
            place: dict[str, Any] = {"xytext": (6, 4 if values[1] > values[0] else -10)}
            place |= {"textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(name, (x[1], values[1]), **place)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"MACs, {unit}")
    axes.set_ylabel(label)
    return figure


def accuracy_over_runs(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Dense and slim accuracy of several runs against what was removed."""

    def ends(run: Results) -> tuple[float, float] | None:
        dense, slim = (number(run, "accuracy", key) for key in ("baseline", "finetuned"))
        return None if dense is None or slim is None else (100 * dense, 100 * slim)

    return _over_runs(runs, "test accuracy, %", ends)


def latency_over_runs(results: Results, runs: Mapping[str, Results]) -> Figure | None:
    """Dense and slim latency of several runs against what was removed."""
    figure = _over_runs(runs, "latency, ms", lambda run: pair(run, "latency_ms"))
    if figure:
        figure.axes[0].set_ylim(bottom=0)
    return figure


Draw = Callable[[Results, Mapping[str, Results]], Figure | None]


class Plot(NamedTuple):
    """A figure of the page: how to draw it, and what to look at."""

    draw: Draw
    heading: str
    caption: str
    wide: bool = False


PLOTS = (
    Plot(
        accuracy,
        "Accuracy through the stages",
        "Look at the step in the middle: what removal costs before any repair.",
    ),
    Plot(
        cost,
        "Cost before and after",
        "In strong colour: what is left. MACs of convolutions and linear layers.",
    ),
    Plot(
        layers,
        "Channels kept, layer by layer",
        "From input to output: where the network was wide for nothing, and where it was not.",
        wide=True,
    ),
    Plot(
        scales,
        "Scales of the pruned and of the kept channels",
        "Global L1 pulls the kept scales down with the rest; MaskSparsity leaves them free.",
        wide=True,
    ),
    Plot(
        curves,
        "Training, stage by stage",
        "Test error above, training loss below, both on log axes.",
        wide=True,
    ),
    Plot(
        accuracy_over_runs,
        "Accuracy against MACs, over runs",
        "Each line leads from the dense network (hollow) to its slim one.",
    ),
    Plot(
        latency_over_runs,
        "Measured latency against MACs, over runs",
        "A line towards the origin: the hardware rewards what was removed.",
    ),
)

"""The figure of size against accuracy: a module's price and its worth."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from nemo.report.results import CellResult, Results
from nemo.report.style import INK, Picture, colour, figure, spread_labels
from nemo.report.words import METHODS


def size_accuracy(results: Results, dataset: str, out: Path) -> Picture:
    models = results.params.models
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    name = f"size-accuracy-{dataset}.png"
    names, legend = _short_names(results.params.subsets)
    with figure(out / name, rows, columns, (1.2 + 4.1 * columns, 3.5 * rows)) as axes:
        axes.flat[0].figure.supxlabel(legend, fontsize=8.5)
        for axis, model in zip(axes.flat, models, strict=False):
            _modules_of(axis, results.of(dataset, model), results.params.subsets, names)
            axis.set_title(model)
        for axis in axes.flat[len(models) :]:
            axis.set_visible(False)
        _legend(axes.flat[0], results)
    how = (
        "Each module's size against its test accuracy on the classes it is for; up and left is "
        "better. Filled: fine-tuned. Hollow: as cut, before fine-tuning; a line joins the two. "
        "Grey dash: the standard model (100 %) restricted to the same classes. Mean over seeds."
    )
    title = f"Size against accuracy, {results.datasets[dataset]['title']}"
    return Picture(name, title, how)


def _short_names(subsets: list[str]) -> tuple[list[str], str]:
    """What stands at the points, and the line that explains it where names are too long."""
    if max(map(len, subsets)) <= 4:
        return subsets, ""
    letters = [chr(ord("A") + i % 26) + str(i // 26 or "") for i in range(len(subsets))]
    pairs = [f"{letter} {subset}" for letter, subset in zip(letters, subsets, strict=True)]
    return letters, "Classes:  " + "    ".join(pairs)


def _modules_of(axis: Any, cells: list[CellResult], subsets: list[str], names: list[str]) -> None:
    methods = list(dict.fromkeys(c.cell.method for c in cells if c.modules))
    sizes: dict[str, list[float]] = {}
    for method in methods:
        tone = colour(method)
        for subset in subsets:
            own = [_metrics(c, subset) for c in cells if c.cell.method == method]
            keys = ("parameters_ratio", "accuracy", "accuracy_step0", "accuracy_standard")
            x, tuned, cut, standard = (100 * fmean(m[key] for m in own) for key in keys)
            axis.plot(x, standard, "_", markersize=13, color=colour("standard"))
            axis.plot([x, x], [cut, tuned], color=tone, linewidth=0.9, alpha=0.5)
            axis.plot(x, cut, "o", markersize=5.5, markerfacecolor="white", markeredgecolor=tone)
            axis.plot(x, tuned, "o", markersize=6, color=tone)
            sizes.setdefault(method, []).append(x)
    axis.set(xlabel="parameters, % of the standard model", ylabel="test accuracy, %")
    low, _ = axis.get_ylim()
    axis.set_ylim(low, low + (100 - low) / (0.98 - 0.09 * len(methods)))  # room for names
    axis.set_yticks([tick for tick in axis.get_yticks() if low <= tick <= 100])
    _log_percent(axis, [x for values in sizes.values() for x in values])
    for level, method in enumerate(reversed(methods)):
        _subset_names(axis, sizes[method], names, 0.93 - 0.08 * level, colour(method))


def _metrics(result: CellResult, subset: str) -> dict[str, Any]:
    return next(m.metrics for m in result.modules if m.subset == subset)


def _subset_names(
    axis: Any, sizes: list[float], names: list[str], height: float, tone: str
) -> None:
    """The subsets' names in one line above their points, moved apart where they would touch."""
    low, high = (math.log(x) for x in axis.get_xlim())
    wanted = [(math.log(x) - low) / (high - low) for x in sizes]
    gap = 0.03 + 0.02 * max(map(len, names))
    for x, name in zip(spread_labels(wanted, gap), names, strict=True):
        axis.text(
            x,
            height,
            name,
            transform=axis.transAxes,
            ha="center",
            fontsize=8,
            color=tone,
            weight="bold",
        )


def _log_percent(axis: Any, values: list[float]) -> None:
    """Plain percentages on a logarithmic axis that always reaches 100 %."""
    axis.set_xscale("log")
    low = min(values, default=50) / 1.35
    axis.set_xlim(low, max(115, 1.15 * max(values, default=100)))
    decade = (1, 1.5, 2, 3, 5, 7)
    ticks = [step * unit for unit in (0.01, 0.1, 1, 10) for step in decade] + [100]
    shown = [tick for tick in ticks if low <= tick]
    if len(shown) > 8:
        shown = [tick for tick in shown if f"{tick:e}"[:3] in ("1.0", "3.0")]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_xticks([], minor=True)


def _legend(axis: Any, results: Results) -> None:
    from matplotlib.lines import Line2D

    def mark(tone: str, label: str, **style: Any) -> Any:
        return Line2D([], [], linestyle="", color=tone, label=label, **style)

    modular = [m for m in results.params.methods if m != "standard"]
    marks = [mark(colour(m), METHODS[m], marker="o") for m in modular]
    marks.append(mark(INK, "before fine-tuning", marker="o", markerfacecolor="white"))
    marks.append(mark(colour("standard"), "standard, restricted", marker="_", markersize=12))
    axis.figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), fontsize=8.5)

"""Figures of single cells: training history, maps of kept neurons, and coupling of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nemo.report.collect import Results, titles
from nemo.report.style import CROSS, EMPTY, INK, MAP, MARKERS, Picture, figure, legend, marks, tones
from nemo.report.words import label as method_label
from nemo.results import CellResult

ACROSS = 5  # maps of coupling side by side
TALLEST = 60.0  # inches of all maps in a figure, without what is between those of kept neurons


def draw_maps(results: Results, out: Path) -> list[Picture]:
    """Draw them into `out`, data set by data set, of the methods that params list."""
    pictures = []
    for dataset in results.datasets:
        if results.of(dataset):
            pictures.append(_history(results, dataset, out))
        for model in results.models(dataset):
            cells = [c for c in results.of(dataset, model) if c.modular]
            first = [c for c in cells if c.cell.seed == min(c.cell.seed for c in cells)]
            slug = f"{dataset}-{model.replace('/', '-')}.png"
            if first:
                pictures.append(_kept(first, out, f"kept-{slug}", _names(results, dataset)))
                pictures.append(_coupling(first, out, f"coupling-{slug}", _names(results, dataset)))
    return pictures


def _names(results: Results, dataset: str) -> list[str]:
    return [str(name) for name in results.datasets[dataset]["classes"]]


def _history(results: Results, dataset: str, out: Path) -> Picture:
    models = results.models(dataset)
    name = f"history-{dataset}.png"
    colours = tones(cell.cell.method for cell in results.of(dataset))
    with figure(out / name, len(models), 2, (8.6, 0.6 + 2.4 * len(models)), colours) as axes:
        for row, model in zip(axes, models, strict=True):
            cells = results.of(dataset, model)
            _lines(row[0], cells, colours, "val_accuracy", 100)
            _lines(row[1], cells, colours, "mask_on", 1)
            row[0].set(title=model, ylabel="validation accuracy, %")
            row[1].set(title=" ", ylabel="sample-mask bits on", ylim=(-0.02, 1.02))
            for axis in row:
                axis.set_xlabel("epoch")
        legend(axes, colours)
    how = (
        "Left: accuracy on held-out training images (the first eighth of the epochs may lie below "
        "the axis). Right: the share of sample-mask bits that are "
        "on, a per-batch statistic that shows when modularizing sets in; it is not the NRR of "
        "the tables. One thin line per seed."
    )
    title = f"Training history, {titles([results])[dataset]}"
    return Picture(name, title, how)


def _lines(
    axis: Any, cells: list[CellResult], colours: dict[str, str], column: str, by: float
) -> None:
    """A line per cell that has the column, `by` times its values."""
    settled: list[float] = []
    forms = marks(colours)
    for cell in cells:
        rows = [(row["epoch"], by * row[column]) for row in cell.history if column in row]
        if rows:
            method = cell.cell.method
            style = {"marker": forms[method]} if forms[method] != MARKERS[0] else {}
            axis.plot(*zip(*rows, strict=True), color=colours[method], lw=1.4, ms=4, **style)
            settled += [value for _, value in rows[len(rows) // 8 :]]
    if by == 100 and settled:  # the steep first epochs would flatten what matters
        axis.set_ylim(min(settled) - 2, min(101, max(settled) + 2))


def _panels(
    cells: list[CellResult],
    path: Path,
    size: tuple[float, float],
    draw: Callable[[Any, CellResult], Any],
    label: str,
    down: int,
    across: int = 1,
) -> None:
    """One heat map per method on one shared scale from 0 to 1."""
    with figure(path, down, across, size) as axes:
        for axis in axes.flat[len(cells) :]:
            axis.set_visible(False)
        for axis, cell in zip(axes.flat, cells, strict=False):
            image = draw(axis, cell)
            axis.grid(visible=False)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            axis.set_title(f"{cell.cell.model}, {method_label(cell.cell.method)}")
        shown = {"fraction": 0.05, "aspect": 25, "shrink": 1 / down if across > 1 else 1}
        bar = axes.flat[0].figure.colorbar(image, ax=list(axes.flat), **shown)
        bar.set_label(label)
        bar.outline.set_visible(False)


def _kept(cells: list[CellResult], out: Path, name: str, classes: list[str]) -> Picture:
    layers = cells[0].masks["layers"] if cells[0].masks else []
    height = min(max(1.3, 0.17 * min(len(classes), 40)), TALLEST / len(cells)) + 0.25

    def draw(axis: Any, cell: CellResult) -> Any:
        assert cell.masks is not None
        shares = [[k / row["neurons"] for k in row["kept"]] for row in cell.masks["layers"]]
        grid = [list(column) for column in zip(*shares, strict=True)]
        image = axis.imshow(grid, cmap=MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        dead = [(x, y) for x, row in enumerate(cell.masks["layers"]) for y in row["dead"]]
        if dead:
            axis.plot(*zip(*dead, strict=True), "x", color=CROSS, markersize=5)
        _ticks(axis.yaxis, classes, limit=max(1, int(height / 0.17)))
        _ticks(axis.xaxis, [row["layer"] for row in cell.masks["layers"]], limit=72)
        last = cell is cells[-1]
        axis.tick_params(axis="x", rotation=90, labelsize=7, labelbottom=last)
        axis.set_ylabel("class")
        return image

    width = min(14, max(6.5, 2.2 + 0.17 * len(layers)))
    longest = max((len(row["layer"]) for row in layers), default=0)
    size = (width, height * len(cells) + 0.5 + 0.065 * longest)
    _panels(cells, out / name, size, draw, "share of neurons kept", len(cells))
    how = (
        "Rows are classes, columns the masked layers from input to output. The darker, the more of "
        "the layer's neurons the class keeps. A cross marks a layer that is dead for the class. "
        "First seed."
    )
    return Picture(name, f"Kept neurons, {_what(cells)}", how)


def _coupling(cells: list[CellResult], out: Path, name: str, classes: list[str]) -> Picture:
    across = min(len(cells), ACROSS)
    down = -(-len(cells) // across)
    side = min(5.0, max(2.6, 0.36 * len(classes)), TALLEST / down - 0.7)

    def draw(axis: Any, cell: CellResult) -> Any:
        assert cell.masks is not None
        matrix = cell.masks["coupling_matrix"]
        pairs = [[None if x == y else v for x, v in enumerate(row)] for y, row in enumerate(matrix)]
        grid = np.array(pairs, dtype=float)  # a class with itself says nothing: left empty
        image = axis.imshow(grid, cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axis.set_facecolor(EMPTY)
        _ticks(axis.xaxis, classes, limit=30)
        _ticks(axis.yaxis, classes, limit=30)
        long = max(map(len, classes)) > 2
        axis.tick_params(axis="x", rotation=90 if long else 0)
        axis.set_xlabel(f"mean {cell.masks['coupling']:.3f}")
        for y, row in enumerate(matrix if len(matrix) <= 10 else []):
            for x, value in enumerate(row):
                shade = "white" if value > 0.6 else INK
                if x != y:
                    text = f"{value:.2f}".removeprefix("0")
                    axis.text(x, y, text, ha="center", va="center", fontsize=6.5, color=shade)
        return image

    size = (side * across + 1.4, (side + 0.7) * down)
    _panels(cells, out / name, size, draw, "Jaccard similarity", down, across)
    how = (
        "How much of their neurons two classes share: Jaccard similarity of their class masks. The "
        "paler, the better separated. The mean over pairs, under each panel, is the coupling of "
        "the table. First seed."
    )
    return Picture(name, f"Coupling of classes, {_what(cells)}", how)


def _what(cells: list[CellResult]) -> str:
    return f"{cells[0].cell.model} on {cells[0].cell.dataset}"


def _ticks(axis: Any, names: list[str], limit: int = 40) -> None:
    """Name every position, or about `limit` of them where there are more."""
    step = -(-len(names) // limit)
    axis.set_ticks(range(0, len(names), step), [n[:24] for n in names[::step]])

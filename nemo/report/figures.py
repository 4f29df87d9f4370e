"""One figure per table and data set; a point is the mean over seeds, a line its spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd

from nemo.forms import percent
from nemo.metrics import METRICS
from nemo.report.published import PUBLISHED
from nemo.report.rows import MODULE
from nemo.report.style import INK, Picture, figure, legend, marks, tones
from nemo.report.table import Table
from nemo.report.words import short

Frame = pd.DataFrame
LINES = ("-o", "--s", ":^", "-.v")
GREY = "#555555"


def draw(table: Table, frame: Frame, folder: Path, dataset: str) -> Picture:
    """The figure of a table's rows of one data set, in `folder`."""
    name = f"{table.name}-{dataset}.png"
    frame = _in_percent(frame, table)
    sizes = [m.name for m in table.metrics if m.name == "parameters_ratio"]  # of a standard model,
    frame = frame.reindex(columns=frame.columns.union(sizes, sort=False))  # which may be missing
    frame = frame.assign(row=frame["model"] + ", " + frame["method"] if "method" in frame else "")
    how = DRAW[table.name](frame, folder / name)
    return Picture(name, f"{table.title}, {dataset}", how)


def _in_percent(frame: Frame, table: Table) -> Frame:
    """With shares as percentages, where tables show them so."""
    shares = [m.name for m in table.metrics if m.form is percent and m.name in frame]
    return frame.assign(**{name: 100 * frame[name] for name in shares})


def _dots(
    frame: Frame,
    path: Path,
    columns: Sequence[str],
    *,
    row: str = "model",
    kind: str = "method",
    width: float = 9,
    height: tuple[float, float] = (0.9, 0.36),
    zero: bool = False,
) -> None:
    """An axis per column: a line per `row`, a point per `kind` in it. In inches: `width`, and
    `height` in all and of a row. `zero` marks it, and what is published of a column."""
    columns = [column for column in columns if column in frame]
    tall = height[0] + height[1] * frame[row].nunique()
    colours = tones(frame[kind])
    named = {} if kind == "model" else colours  # rows name the model
    with figure(path, 1, len(columns), (width, tall), named) as axes:
        for axis, column in zip(axes.flat, columns, strict=True):
            _rows(axis, frame, row, kind, column, colours)
            if zero:
                axis.axvline(0, color=INK, lw=0.8)
            if zero and column in PUBLISHED:
                by = 1 if column.endswith("_points") else 100
                axis.axvline(by * PUBLISHED[column], color="#D55E00", lw=1, ls="--")
        if named:
            legend(axes, named)


def _models(frame: Frame, path: Path) -> str:
    one = frame["model"].nunique() == 1  # a line for each of its methods
    row, kind = ("row", "model") if one else ("model", "method")
    _dots(frame, path, ("accuracy", "nrr", "coupling"), row=row, kind=kind)
    return "Accuracy, the share of neurons that a class keeps, and the likeness of class masks."


def _modules(frame: Frame, path: Path) -> str:
    frame = frame.assign(
        kind=frame["alternative"].where(frame["alternative"] != "", frame["method"])
    )
    models, subsets = (list(dict.fromkeys(frame[key])) for key in ("model", "subset"))
    colours, size = tones(frame["kind"]), (2.1 * len(subsets), 1.9 * len(models))
    forms = marks(colours)
    with figure(path, len(models), len(subsets), size, colours) as axes:
        for row, model in zip(axes, models, strict=True):
            for axis, subset in zip(row, subsets, strict=True):
                mine = frame[(frame["model"] == model) & (frame["subset"] == subset)]
                means = mine.groupby("kind", sort=False)[["parameters_ratio", "accuracy"]].mean()
                for kind, point in means.iterrows():
                    axis.plot(*point, forms[str(kind)], ms=5, color=colours[str(kind)])
                front = _front(means)
                axis.step(front.iloc[:, 0], front.iloc[:, 1], where="post", color="#BBBBBB", lw=1)
                axis.set_xscale("log")
                axis.set_xlim(min(10, 0.8 * frame["parameters_ratio"].min()), 125)
                axis.set_xticks([10, 30, 100], ["10", "30", "100"])
                axis.set_xticks([], minor=True)
                axis.set_ylim(top=min(axis.get_ylim()[1], 100.5))  # nothing is above 100 %
            row[0].set_ylabel(f"{model}\naccuracy, %")
        for axis, subset in zip(axes[0], subsets, strict=True):
            axis.set_title(_broken(subset), fontsize=8.5)
        axes.flat[0].figure.supxlabel("parameters, % of the standard model", fontsize=9)
        legend(axes, colours)
    return (
        "Size against test accuracy after fine-tuning. The grey line is the Pareto front: nothing "
        "is above and left of it."
    )


def _broken(subset: str) -> str:
    """A subset's name in lines that fit above a panel."""
    return "\n".join(wrap(short(subset).replace("+", "+ "), 24)).replace("+ ", "+")


def _front(means: Frame) -> Frame:
    """The points that none beats in both size and accuracy, by size."""
    ordered = means.sort_values(["parameters_ratio", "accuracy"], ascending=[True, False])
    return ordered[ordered["accuracy"] >= ordered["accuracy"].cummax()]


def _objectives(frame: Frame, path: Path) -> str:
    _dots(frame, path, ("accuracy", "nrr", "coupling"), row="row", kind="model", height=(0.8, 0.36))
    return "What each loss on the masks does to accuracy, neurons kept and coupling."


def _sensitivity(frame: Frame, path: Path) -> str:
    frame = frame.assign(value=frame["value"].astype(float))
    trained = frame[frame["accuracy"].notna()] if "accuracy" in frame else frame[:0]
    trades = list(trained.groupby("model", sort=False))
    every = frame.groupby(["knob", "model"], sort=False)
    known = [(str(k), str(m), rows) for (k, m), rows in every]
    panels = [panel for panel in known if panel[2]["value"].nunique() > 1] or known
    panels.sort(key=lambda panel: panel[0] == "masks.threshold")
    across = min(5, len(panels) + len(trades))
    down = -(-(len(panels) + len(trades)) // across)
    with figure(path, 2 * down, across, (2.4 * across, 4.2 * down)) as axes:
        columns = [axes[2 * row : 2 * row + 2, c] for row in range(down) for c in range(across)]
        for column, (model, rows) in zip(columns, trades, strict=False):
            _trade(column, rows, str(model))
        for column, (knob, model, rows) in zip(columns[len(trades) :], panels, strict=False):
            _knob(column, rows, knob, model)
        for column in columns[len(trades) + len(panels) :]:
            for axis in column:
                axis.set_visible(False)
    return (
        "First accuracy against the neurons that a class keeps, a line for each knob of a method. "
        "Then one knob at a time; above accuracy (or coupling), below the neurons kept. Dotted: "
        "the standard model."
    )


def _trade(axes: Any, frame: Frame, model: str) -> None:
    (axis, below), colours = axes, tones(frame["method"])
    for number, (names, rows) in enumerate(frame.groupby(["method", "knob"], sort=False)):
        method, knob = map(str, names)
        line = rows.groupby("value")[["nrr", "accuracy"]].mean().sort_values("nrr")
        style = {"ms": 4, "color": colours[method], "label": f"{method}, {knob}"}
        axis.plot(line["nrr"], line["accuracy"], LINES[number % len(LINES)], **style)
    axis.set(title=model, xlabel="nrr", ylabel="accuracy")
    below.set_axis_off()
    below.legend(*axis.get_legend_handles_labels(), fontsize=7, loc="upper left")


def _knob(axes: Any, rows: Frame, knob: str, model: str) -> None:
    known = "accuracy" in rows and rows["accuracy"].notna().any()
    upper = "accuracy" if known else "coupling"
    for axis, y in zip(axes, (upper, "nrr"), strict=True):
        for number, (method, own) in enumerate(rows.groupby("method", sort=False)):
            line = own.groupby("value")[y].mean()
            style = LINES[number % len(LINES)]
            axis.plot(line.index, line, style, ms=4, color=INK, label=method, lw=1.2)
        axis.set(ylabel=y, xlabel=knob)
        if y == "accuracy" and "loss_points" in rows:
            axis.axhline((rows[y] + rows["loss_points"]).mean(), color=GREY, lw=1, ls=":")
        if rows["value"].min() > 0 and knob != "masks.threshold":
            values = sorted(rows["value"].unique())
            axis.set_xscale("log")
            axis.set_xticks(values, [f"{value:g}" for value in values])
            axis.set_xticks([], minor=True)
    axes[0].set_title(model)
    if rows["method"].nunique() > 1:
        axes[1].legend(fontsize=7)


def _granularity(frame: Frame, path: Path) -> str:
    subsets = list(dict.fromkeys(frame["subset"]))
    colours = tones(frame["granularity"])
    with figure(path, 1, len(subsets), (2.8 * len(subsets), 2.8)) as axes:
        for axis, subset in zip(axes.flat, subsets, strict=True):
            for kind, tone in colours.items():
                mine = frame[(frame["subset"] == subset) & (frame["granularity"] == kind)]
                over = mine.groupby("threshold")[["parameters_ratio", "accuracy"]]
                size, reached = (over.mean()[name] for name in ("parameters_ratio", "accuracy"))
                spread = over.std()["accuracy"].fillna(0)
                axis.errorbar(size, reached, spread, fmt="-o", color=tone, label=kind)
            axis.set(title=_broken(subset), xlabel="parameters, % of the standard model")
        axes.flat[0].set_ylabel("accuracy, %")
        axes.flat[0].legend(fontsize=8)
    return "Size against test accuracy after fine-tuning, at several thresholds of class masks."


def _costs(frame: Frame, path: Path) -> str:
    steps = frame[frame["what"].str.startswith("training step")]
    steps = steps.assign(method=steps["what"].str.removeprefix("training step, "))
    _dots(steps, path, ("ratio", "peak_mb"), width=7)
    return "A training step: time over the standard one, and memory."


def _headline(frame: Frame, path: Path) -> str:
    _dots(frame, path, tuple(PUBLISHED), width=7, zero=True)
    return (
        "The dashed line is what is published for NeMo, an average over models and two data sets "
        "at full scale."
    )


def _budgets(frame: Frame, path: Path) -> str:
    frame = frame.assign(epochs=frame["epochs"].astype(float))
    models, kinds = (list(dict.fromkeys(frame[key])) for key in ("model", "competitor"))
    panels = list(frame.groupby(["method", "equal"], sort=False))
    colours = {MODULE: INK, **tones(kind for kind in kinds if kind != MODULE)}
    ticks = sorted(frame["epochs"].unique())
    size = (3.2 * len(models), 0.6 + 2.6 * len(panels))
    with figure(path, len(panels), len(models), size) as axes:
        for row, (names, rows) in zip(axes, panels, strict=True):
            for axis, model in zip(row, models, strict=True):
                for kind, tone in colours.items():
                    own = rows[(rows["model"] == model) & (rows["competitor"] == kind)]
                    over = own.groupby("epochs")["accuracy"].agg(["mean", "std"])
                    wide = 2 if kind == MODULE else 1
                    spread = over["std"].fillna(0)
                    axis.errorbar(
                        over.index, over["mean"], spread, fmt="-o", ms=3, lw=wide, color=tone
                    )
                axis.set_xscale("symlog", linthresh=0.1)
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.set_xticks([], minor=True)
                axis.set_title(model)
            method, equal = map(str, names)
            equal = "FLOPs" if equal == "flops" else equal
            row[0].set_ylabel(f"{method}, equal {equal}\naccuracy, %")
        axes.flat[0].figure.supxlabel("epochs of fine-tuning", fontsize=9)
        legend(axes, colours)
    return (
        "Test accuracy against the budget of fine-tuning, mean of subsets; bars: spread over seeds."
    )


def _alternatives(frame: Frame, path: Path) -> str:
    sizes: dict[str, Any] = {"width": 6.5, "height": (1, 0.5)}
    _dots(frame, path, ("ahead_points",), row="row", kind="alternative", zero=True, **sizes)
    return "Right of zero the module is better than the alternative; mean of subsets."


def _gap(frame: Frame, path: Path) -> str:
    columns = [name for scope, name in METRICS if scope == "gap" and name in frame]
    means = frame.groupby(["row", "seed"], sort=False)[columns].mean().reset_index()  # of subsets
    shown = "validation accuracy, %, mean of subsets"
    tall = means.melt(["row", "seed"], columns, "kind", shown)
    _dots(tall, path, (shown,), row="row", kind="kind", width=6.5, height=(1, 0.4))
    return "Modules before fine-tuning, from masks of each sample to one mask for all."


DRAW: dict[str, Callable[[Frame, Path], str]] = {
    "T1-models": _models,
    "T2-modules": _modules,
    "T3-objectives": _objectives,
    "T4-sensitivity": _sensitivity,
    "T5-granularity": _granularity,
    "T6-costs": _costs,
    "T7-headline": _headline,
    "T8-budgets": _budgets,
    "alternatives": _alternatives,
    "gap": _gap,
}


def _rows(
    axis: Any, frame: Frame, row: str, kind: str, column: str, colours: dict[str, str]
) -> None:
    """A line per `row`, a point per `kind` in it."""
    names, forms = list(dict.fromkeys(frame[row])), marks(colours)
    spread = frame.dropna(subset=[column]).groupby([row, kind], sort=False)[column]
    for name, of, mean, std in spread.agg(["mean", "std"]).reset_index().itertuples(index=False):
        height = len(names) - names.index(name)
        axis.plot(mean, height, forms[of], ms=6, color=colours[of])
        if std == std:  # more than one seed
            axis.plot([mean - std, mean + std], [height, height], color=colours[of], lw=1.2)
    axis.set_yticks(range(len(names), 0, -1), names)
    axis.set_ylim(0.4, len(names) + 0.6)
    axis.set_xlabel(column)

"""One figure per table, drawn from its frame; a point is the mean over seeds, a line its spread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.study.rows import OBJECTIVES, PUBLISHED
from benchmarks.study.tables import Table
from nemo.report.style import COLOURS, INK, Picture, figure

KINDS = {
    **COLOURS,
    "nemo, mean": "#56B4E9",
    "random": "#E69F00",
    "pruned": "#009E73",
    "dense": "#CC79A7",
    "standard, whole": COLOURS["standard"],
    "standard, tuned": "#999999",
}
STRENGTH = {"nemo": "loss.alpha", "mwt": "mwt.alpha and mwt.beta, x"}
Frame = pd.DataFrame


def draw(table: Table, folder: Path) -> Picture:
    """The figure of `table`, in `folder` under the table's name."""
    name = f"{table.name}.png"
    how = DRAW[table.name](table.frame, folder / name)
    return Picture(name, table.title, how)


def _models(frame: Frame, path: Path) -> str:
    with figure(path, 1, 3, (9, 0.9 + 0.36 * frame["model"].nunique())) as axes:
        for axis, column in zip(axes.flat, ("accuracy %", "nrr", "coupling"), strict=True):
            _rows(axis, frame.dropna(subset=[column]), "model", "method", column)
        _legend(axes, list(dict.fromkeys(frame["method"])))
    return "Accuracy, the share of neurons that a class keeps, and the likeness of class masks."


def _modules(frame: Frame, path: Path) -> str:
    models = list(dict.fromkeys(frame["model"]))
    subsets = list(dict.fromkeys(frame["subset"]))
    with figure(path, len(models), len(subsets), (2.1 * len(subsets), 1.9 * len(models))) as axes:
        for row, model in zip(axes, models, strict=True):
            for axis, subset in zip(row, subsets, strict=True):
                mine = frame[(frame["model"] == model) & (frame["subset"] == subset)]
                means = mine.groupby("kind", sort=False)[["parameters %", "accuracy %"]].mean()
                for kind, point in means.iterrows():
                    axis.plot(point.iloc[0], point.iloc[1], "o", ms=5, color=KINDS[kind])
                front = _front(means)
                axis.step(front.iloc[:, 0], front.iloc[:, 1], where="post", color="#BBBBBB", lw=1)
                axis.set_xscale("log")
                axis.set_xlim(min(10, 0.8 * frame["parameters %"].min()), 125)
                axis.set_xticks([10, 30, 100], ["10", "30", "100"])
                axis.set_xticks([], minor=True)
            row[0].set_ylabel(f"{model}\naccuracy, %")
        for axis, subset in zip(axes[0], subsets, strict=True):
            axis.set_title(subset, fontsize=8.5)
        axes.flat[0].figure.supxlabel("parameters, % of the standard model", fontsize=9)
        _legend(axes, list(dict.fromkeys(frame["kind"])))
    return (
        "Size against test accuracy after fine-tuning. The grey line is the Pareto front: nothing "
        "is above and left of it. Alternatives to NeMo's module have at most its parameters."
    )


def _front(means: Frame) -> Frame:
    """The points that none beats in both size and accuracy, by size."""
    ordered = means.sort_values(["parameters %", "accuracy %"], ascending=[True, False])
    return ordered[ordered["accuracy %"] >= ordered["accuracy %"].cummax()]


def _objectives(frame: Frame, path: Path) -> str:
    names = [title for _, _, title in OBJECTIVES if title in set(frame["objective"])]
    with figure(path, 1, 3, (9, 0.8 + 0.36 * len(names))) as axes:
        columns = ("accuracy %", "nrr", "coupling")
        for axis, column in zip(axes.flat, columns, strict=True):
            _rows(axis, frame.assign(kind="nemo"), "objective", "kind", column)
    return "What each loss on the masks does to accuracy, neurons kept and coupling."


def _sensitivity(frame: Frame, path: Path) -> str:
    panels = [
        (knob, model)
        for knob in dict.fromkeys(frame["knob"])
        for model in dict.fromkeys(frame[frame["knob"] == knob]["model"])
        if frame[(frame["knob"] == knob) & (frame["model"] == model)]["value"].nunique() > 1
    ]
    with figure(path, 2, len(panels) + 1, (2.3 * (len(panels) + 1), 4.2)) as axes:
        for axis, model in zip(axes[:, 0], dict.fromkeys(frame["model"]), strict=False):
            _trade(axis, frame[(frame["model"] == model) & frame["accuracy %"].notna()], model)
        for column, (knob, model) in zip(axes[:, 1:].T, panels, strict=True):
            mine = frame[(frame["knob"] == knob) & (frame["model"] == model)]
            upper = "coupling" if knob == "masks.threshold" else "accuracy %"
            for axis, y in zip(column, (upper, "nrr"), strict=True):
                for (method, rows), dash in zip(
                    mine.groupby("method", sort=True), ("-o", "--s"), strict=False
                ):
                    rows = rows.sort_values("value")
                    axis.plot(rows["value"], rows[y], dash, ms=4, color=INK, label=method, lw=1.2)
                axis.set(ylabel=y, xlabel=knob)
                if y == "accuracy %":
                    whole = (mine[y] + mine["loss"]).mean()
                    axis.axhline(whole, color=COLOURS["standard"], lw=1, ls=":")
                if mine["value"].max() > 2 * mine["value"].min() and knob != "masks.threshold":
                    axis.set_xscale("log")
                    axis.set_xticks(rows["value"], [f"{v:g}" for v in rows["value"]])
                    axis.set_xticks([], minor=True)
            column[0].set_title(model)
            if mine["method"].nunique() > 1:
                column[1].legend(fontsize=7)
    return (
        "Left: accuracy against the neurons a class keeps, a point for each strength of a method's "
        "loss. Then one knob at a time; above accuracy (or coupling), below the neurons kept. "
        "Dotted: the standard model."
    )


def _trade(axis: Any, frame: Frame, model: str) -> None:
    """Accuracy against neurons kept, a line for each method's strengths of its loss."""
    for method in ("mwt", "nemo"):
        strengths = frame["knob"] == STRENGTH[method]
        rows = frame[strengths].groupby("value")[["nrr", "accuracy %"]].mean().sort_values("nrr")
        axis.plot(rows["nrr"], rows["accuracy %"], "-o", ms=4, color=COLOURS[method], label=method)
    axis.set(title=model, xlabel="nrr", ylabel="accuracy %")
    axis.legend(fontsize=7)


def _granularity(frame: Frame, path: Path) -> str:
    subsets = list(dict.fromkeys(frame["subset"]))
    tones = {"neurons": COLOURS["nemo"], "heads": COLOURS["mwt"]}
    with figure(path, 1, len(subsets), (2.8 * len(subsets), 2.8)) as axes:
        for axis, subset in zip(axes.flat, subsets, strict=True):
            for kind, tone in tones.items():
                mine = frame[(frame["subset"] == subset) & (frame["granularity"] == kind)]
                over = mine.groupby("threshold")[["parameters %", "accuracy %"]]
                size, reached = (over.mean()[column] for column in ("parameters %", "accuracy %"))
                spread = over.std()["accuracy %"].fillna(0)
                axis.errorbar(size, reached, spread, fmt="-o", color=tone, label=kind)
            axis.set(title=subset, xlabel="parameters, % of the standard model")
        axes.flat[0].set_ylabel("accuracy, %")
        axes.flat[0].legend(fontsize=8)
    return "Size against test accuracy after fine-tuning, at two thresholds of the class masks."


def _costs(frame: Frame, path: Path) -> str:
    steps = frame[frame["what"].str.startswith("training step")]
    steps = steps.assign(method=steps["what"].str.removeprefix("training step, "))
    with figure(path, 1, 2, (7, 0.9 + 0.36 * steps["model"].nunique())) as axes:
        for axis, column in zip(axes.flat, ("ratio", "peak MB"), strict=True):
            _rows(axis, steps, "model", "method", column)
        _legend(axes, list(dict.fromkeys(steps["method"])))
    return "A training step: time over the standard one, and memory."


def _headline(frame: Frame, path: Path) -> str:
    with figure(path, 1, 2, (7, 0.9 + 0.36 * frame["model"].nunique())) as axes:
        for axis, (column, published) in zip(axes.flat, PUBLISHED.items(), strict=True):
            _rows(axis, frame.assign(kind="nemo"), "model", "kind", column)
            axis.axvline(0, color=INK, lw=0.8)
            axis.axvline(published, color=COLOURS["mwt"], lw=1, ls="--")
    return "The dashed line is the published average over models and two data sets, at full scale."


def _alternatives(frame: Frame, path: Path) -> str:
    with figure(path, 1, 1, (6.5, 1 + 0.5 * frame["model"].nunique())) as axes:
        _rows(axes.flat[0], frame, "model", "alternative", "nemo ahead, points")
        axes.flat[0].axvline(0, color=INK, lw=0.8)
        _legend(axes, list(dict.fromkeys(frame["alternative"])))
    return "Right of zero NeMo's module is better than the alternative; mean of subsets."


def _gap(frame: Frame, path: Path) -> str:
    nemo = frame[frame["method"] == "nemo"]
    columns = ["soft", "binary", "binary + bn", "mean", "mean + bn"]
    columns += ["binary + bn, low threshold", "mean + bn, low threshold"]
    means = nemo.groupby(["model", "seed"], sort=False)[columns].mean().reset_index()  # of subsets
    tall = means.melt(["model", "seed"], columns, "kind", "accuracy")
    inks = (INK, "#D55E00", "#E69F00", "#009E73", "#0072B2", "#56B4E9", "#CC79A7")
    tones = dict(zip(columns, inks, strict=True))
    with figure(path, 1, 1, (6.5, 1 + 0.45 * nemo["model"].nunique())) as axes:
        _rows(axes.flat[0], tall, "model", "kind", "accuracy", tones)
        axes.flat[0].set_xlabel("validation accuracy, %, mean of subsets")
        _legend(axes, columns, tones)
    return "NeMo's modules before fine-tuning, from masks of each sample to one mask for all."


DRAW: dict[str, Callable[[Frame, Path], str]] = {
    "T1-models": _models,
    "T2-modules": _modules,
    "T3-objectives": _objectives,
    "T4-sensitivity": _sensitivity,
    "T5-granularity": _granularity,
    "T6-costs": _costs,
    "T7-headline": _headline,
    "alternatives": _alternatives,
    "gap": _gap,
}


def _rows(
    axis: Any, frame: Frame, row: str, kind: str, column: str, tones: dict[str, str] = KINDS
) -> None:
    """A line per `row`, a point per `kind` in it."""
    names = list(dict.fromkeys(frame[row]))
    spread = frame.groupby([row, kind], sort=False)[column].agg(["mean", "std"])
    for (name, of), point in spread.iterrows():
        height = len(names) - names.index(name)
        mean, std = point["mean"], point["std"]
        axis.plot(mean, height, "o", ms=6, color=tones[of])
        if std == std:  # more than one seed
            axis.plot([mean - std, mean + std], [height, height], color=tones[of], lw=1.2)
    axis.set_yticks(range(len(names), 0, -1), names)
    axis.set_ylim(0.4, len(names) + 0.6)
    axis.set_xlabel(column)


def _legend(axes: Any, kinds: list[str], tones: dict[str, str] = KINDS) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], ls="", marker="o", color=tones[k], label=k) for k in kinds]
    drawing = axes.flat[0].figure
    columns = max(2, int(drawing.get_figwidth() / max(1.1, 0.5 + 0.085 * max(map(len, kinds)))))
    drawing.legend(handles=marks, loc="outside upper center", ncols=min(columns, len(marks)))

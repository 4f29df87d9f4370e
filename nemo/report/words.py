"""What the report says: the scale of every number, and what the tables come to."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pandas as pd

from nemo.alternatives import ALTERNATIVES
from nemo.config import Params
from nemo.data.subsets import parse_subset
from nemo.forms import count
from nemo.masking.objectives import OBJECTIVES
from nemo.metrics import measured
from nemo.report.collect import Results, titles
from nemo.results import CellResult

LOSS_LIMIT = 3.0  # points of accuracy: the paper's own sign that alpha is too high
Frames = dict[str, pd.DataFrame]


def label(name: str) -> str:
    """What texts and figures call a method or alternative; a variant has its name in params."""
    found = OBJECTIVES.get(name) or ALTERNATIVES.get(name)
    return found.label if found else name


def short(subset: str) -> str:
    """A subset's name where there is little room: of many parts the first three and the last."""
    if len(subset) <= 30:
        return subset
    parts = subset.split("+")
    named = "+".join([*parts[:3], "...", parts[-1]]) if len(parts) > 4 else subset
    return named if len(named) <= 60 else f"{subset[:57]}..."


def _named(results: Results, dataset: str) -> str:
    """What the names of subsets stand for, where params give them some."""
    names, classes = results.params.subsets.items(), results.datasets[dataset]["classes"]
    told = [
        f"{name}: {short(text)} ({len(parse_subset(text, classes))} classes)"
        for name, text in names
        if name != text
    ]
    return f"Subsets: {'; '.join(told)}. " if told else ""


def caption(results: Results, dataset: str) -> str:
    """At which scale the numbers of one data set were measured: the caption of its tables."""
    about = results.datasets[dataset]
    counts, (height, width) = about["counts"], about["size"]
    images = ", ".join(f"{counts[part]:,} {part}" for part in ("train", "val", "test"))
    models = "; ".join(_scales(results, dataset))
    cells = results.of(dataset, every=True)
    seeds = sorted({result.cell.seed for result in cells})
    machines = sorted({result.made["trained"].get("machine", "") for result in cells} - {""})
    return (
        f"{about['title']}: {images} images of {height} x {width} px, {len(about['classes'])} "
        f"classes. {models}. Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"profile {results.params.profile}. "
        + (f"Trained on: {'; '.join(machines)}. " if machines else "")
        + _named(results, dataset)
        + "Measured at this scale, which is that of params.yaml; no number here is the paper's, "
        "unless it says published."
    )


def _scales(results: Results, dataset: str) -> Iterator[str]:
    """Models with their sizes, and for how long they were trained; together where that is equal."""
    groups: dict[str, list[str]] = {}
    for model in results.models(dataset):
        cells = results.of(dataset, model, every=True)
        epochs = " or ".join(map(str, sorted({len(cell.history) for cell in cells})))
        tuning = max((len(m.history) for cell in cells for m in cell.modules), default=0)
        text = f"{epochs} epochs" + (f", modules fine-tuned for {tuning}" if tuning else "")
        size = f"{shape_of(cells[0])}; {count(cells[0].metrics['parameters'])} parameters"
        groups.setdefault(text, []).append(f"{model} ({size})")
    for text, models in groups.items():
        yield f"{', '.join(models)}: {text}"


def shape_of(result: CellResult) -> str:
    """A model's size as its params state it: `width 0.25`, or `dim 64, depth 4, heads 4`."""
    keys = [(k.split("."), value) for k, value in result.params.items()]
    own = [(key[1], v) for key, v in keys if key[0] == "architecture" and len(key) == 2]
    return ", ".join(f"{name} {value}" for name, value in own)


def headlines(results: Results, tables: Frames) -> list[str]:
    """What the numbers of each data set come to, in a few sentences."""
    lines = [line for dataset in results.datasets for line in _accuracy(results, dataset)]
    for dataset in results.datasets:
        own = {name: frame[frame["dataset"] == dataset] for name, frame in tables.items()}
        title = titles([results])[dataset]
        if "T7-headline" in own and len(own["T7-headline"]):
            lines += _claims(own["T7-headline"], own["T2-modules"], title)
        if "alternatives" in own and len(own["alternatives"]):
            lines += _alternatives(own["alternatives"], title)
    return lines


def _accuracy(results: Results, dataset: str) -> list[str]:
    """A line for each modular method that params list: what it costs, and what modules reach."""
    lines = []
    for method in results.params.methods:
        cells = [c for c in results.of(dataset) if c.cell.method == method and c.modular]
        parts, worst = [], 0.0
        for model in dict.fromkeys(c.cell.model for c in cells):
            own = [measured(results.subject(c)) for c in cells if c.cell.model == model]
            lost = [row["loss_points"] for row in own if row["loss_points"] is not None]
            after, kept = (100 * fmean(row[key] for row in own) for key in ("accuracy", "nrr"))
            if lost:
                worst = max(worst, fmean(lost))
                before = f"{after + fmean(lost):.1f} → "
                parts.append(f"{model} {before}{after:.1f} % with {kept:.0f} % of the neurons")
        if parts:
            verdict = (
                f"one model loses {worst:.1f} points, more than the {LOSS_LIMIT:.0f} that are "
                "acceptable"
                if worst > LOSS_LIMIT
                else f"no model loses more than {worst:.1f} points of accuracy"
            )
            title = titles([results])[dataset]
            first = f"{title}, standard → {label(method)}: {'; '.join(parts)} per class; {verdict}."
            lines.append(f"{first} {_modules(results, cells)}".strip())
    return lines


def _modules(results: Results, cells: list[CellResult]) -> str:
    rows = [measured(results.subject(c, m)) for c in cells for m in c.modules]
    rows = [row for row in rows if row["parameters_ratio"] and row["accuracy_standard"]]
    if not rows:
        return ""
    size = 100 * fmean(row["parameters_ratio"] for row in rows)
    gap = 100 * fmean(row["accuracy"] - row["accuracy_standard"] for row in rows)
    side = "above" if gap >= 0 else "below"
    return (
        f"Fine-tuned modules hold {size:.0f} % of the standard model's parameters on average and "
        f"are {abs(gap):.1f} points {side} the standard model restricted to the same classes."
    )


def _claims(headline: pd.DataFrame, modules: pd.DataFrame, title: str) -> list[str]:
    """The paper's two claims, model by model: an average would hide that they fail apart."""
    lines = []
    for method, rows in headline.groupby("method", sort=False):
        against = rows["against"].iloc[0]
        seeds = rows.groupby("model", sort=False)[["gain_points", "size_reduction"]]
        means, spread = seeds.mean(), seeds.std()["gain_points"]
        found = (
            f"{model} {_signed(gain, spread[model])} points and {abs(100 * size):.0f} % "
            f"{'fewer' if size > 0 else 'more'}"
            for model, gain, size in means.itertuples()
        )
        own = modules[modules["alternative"] == ""]
        each = own.pivot_table(
            index=["model", "subset"], columns="method", values=["accuracy", "parameters"],
            sort=False,
        )  # fmt: skip
        better = each["accuracy"][method] > each["accuracy"][against]
        both = better & (each["parameters"][method] < each["parameters"][against])
        models = means.index[(means["gain_points"] > 0) & (means["size_reduction"] > 0)]
        pairs = ", ".join(f"{model} {subset}" for model, subset in both.index[both])
        lines.append(
            f"{title}, {label(str(method))}'s modules against {label(against)}'s, accuracy and "
            f"parameters: {'; '.join(found)}. They are both more accurate and smaller on "
            f"{', '.join(map(str, models)) or 'no model'}, and on {both.sum()} of {len(both)} "
            f"pairs of model and subset{f': {pairs}' if pairs else ''}. The two methods' losses "
            "need not be equally strong: T7 says what each cost."
        )
    return lines


def _alternatives(frame: pd.DataFrame, title: str) -> list[str]:
    """By how much modules are ahead of each alternative; mean masks are a module, too."""
    lines = []
    for method, rows in frame[frame["alternative"] != "mean-masks"].groupby("method", sort=False):
        ahead = rows.groupby(["alternative", "model"], sort=False)["ahead_points"]
        each = ahead.agg(["mean", "std"])
        against = [
            f"against {label(name)}: "
            + ", ".join(
                f"{_signed(points, spread)} on {model}"
                for model, points, spread in each.loc[name].itertuples()
            )
            for name in rows["alternative"].unique()
        ]
        lines.append(
            f"{title}, points of accuracy that {label(str(method))}'s modules are ahead, mean of "
            f"subsets and seeds: {'; '.join(against)}."
        )
    return lines


def _signed(points: float, spread: float) -> str:
    """With the standard deviation, which one seed has not."""
    return f"{points:+.1f}" if pd.isna(spread) else f"{points:+.1f} ± {spread:.1f}"


def settings(params: Params) -> str:
    """The params of the report as YAML, defaults included."""
    import yaml

    content: dict[str, Any] = params.model_dump(mode="json", exclude_none=True)
    used = {"data": set(params.datasets), "architecture": set(params.models)}
    for key, names in used.items():
        content[key] = {k: v for k, v in content[key].items() if k in names}
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=90)
    return text


def rerun(results: Results) -> list[tuple[str, str]]:
    """(what, the command that computes it again)."""
    profile = results.params.profile
    commands = [("all that params list", f"cp profiles/{profile}.yaml params.yaml && dvc repro")]
    extra = [c for c in results.cells if c.cell.method not in results.params.methods]
    for model in dict.fromkeys(c.cell.model for c in extra):
        names = list(dict.fromkeys(c.cell.method for c in extra if c.cell.model == model))
        methods = ", ".join([*results.params.methods, *names])
        command = f"dvc exp run -S 'models=[{model}]' -S 'methods=[{methods}]'"
        commands.append((f"variants of {model} (T3, T4)", command))
    if results.times:
        command = f"python -m benchmarks.times --params profiles/{profile}.yaml"
        commands.append(("CPU times (T6), on a quiet machine", command))
    commands.append(("the tables and this page, from results/ alone",
                     f"nemo report --params profiles/{profile}.yaml"))  # fmt: skip
    return commands

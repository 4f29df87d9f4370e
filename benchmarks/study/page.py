"""reports/cifar10-cpu/index.html: the study on one page, with the pipeline's own figures."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from PIL import Image

from benchmarks.study.rows import PUBLISHED, Facts, plain_units
from benchmarks.study.tables import Table, summarised
from nemo.cells import Cell
from nemo.config import Params
from nemo.report import words
from nemo.report.figures import draw_all
from nemo.report.published import beside
from nemo.report.results import CellResult, ModuleResult, Results
from nemo.report.style import Picture

FIRST = ("T7-headline", "alternatives")  # what the headline is made of


def write_page(
    units: dict[str, Facts],
    tables: list[Table],
    pictures: list[Picture],
    where: str,
    out: Path,
) -> None:
    """index.html in `out`, whose figures/ holds `pictures` and gets the maps of the models; `where`
    is the setting of all tables."""
    results = as_results(list(plain_units(units)))
    maps = draw_all(results, out / "figures")
    environment = Environment(
        loader=ChoiceLoader(
            [FileSystemLoader(Path(__file__).parent), PackageLoader("nemo.report", ".")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    (out / "index.html").write_text(
        environment.get_template("study.html").render(
            setting=where,
            verdicts=verdicts(tables),
            sections=[
                (table, _grid(table), picture, _inline(out / "figures" / picture.file))
                for table, picture in sorted(
                    zip(tables, pictures, strict=True), key=lambda pair: pair[0].name not in FIRST
                )
            ],
            maps=[(picture, _inline(out / "figures" / picture.file)) for picture in maps],
            flags=words.diagnose(results),
            others=[
                (name, flag)
                for name, facts in units.items()
                if facts["changes"]
                for flag in words.diagnose(as_results([facts]))
            ],
            beside=beside(results, next(iter(results.datasets))),
            rerun=rerun(units),
        )
    )


def verdicts(tables: list[Table]) -> list[str]:
    """Whether the paper's claims hold here, and how modules compare with alternatives."""
    frames = {table.name: table.frame for table in tables}
    lines = []
    if "T7-headline" in frames:
        lines += _claims(frames["T7-headline"], frames["T2-modules"])
    if "alternatives" in frames:
        others = frames["alternatives"]
        others = others[others["alternative"] != "nemo, mean"]  # is NeMo's module, too
        ahead = others.groupby(["alternative", "model"], sort=False)["nemo ahead, points"]
        lines.append(
            "Is a NeMo module better than the obvious alternatives? Points of test accuracy by "
            "which it is ahead, mean of subsets and seeds. All alternatives have at most its "
            "parameters but the standard model, whole as it is and tuned on the subset."
        )
        for name in others["alternative"].unique():
            each = (
                f"{_signed(points, spread)} on {model}"
                for model, points, spread in ahead.agg(["mean", "std"]).loc[name].itertuples()
            )
            lines.append(f"Against {name}: {', '.join(each)}.")
    return lines


def _claims(headline: pd.DataFrame, modules: pd.DataFrame) -> list[str]:
    """The paper's two claims, model by model: an average would hide that they fail apart."""
    seeds = headline.groupby("model", sort=False)[["gain", "size reduction %"]]
    means, spread = seeds.mean(), seeds.std()
    found = (
        f"{model} {_signed(gain, spread['gain'][model])} points and {abs(size):.0f} % "
        f"{'fewer' if size > 0 else 'more'}"
        for model, gain, size in means.itertuples()
    )
    each = modules.pivot_table(
        index=["model", "subset"], columns="kind", values=["accuracy %", "parameters %"], sort=False
    )
    better = each["accuracy %"]["nemo"] > each["accuracy %"]["mwt"]
    both = better & (each["parameters %"]["nemo"] < each["parameters %"]["mwt"])
    models = means.index[(means["gain"] > 0) & (means["size reduction %"] > 0)]
    pairs = ", ".join(f"{model} {subset}" for model, subset in both.index[both])
    return [
        f"Published, as averages: NeMo's modules have {PUBLISHED['gain']} points more accuracy "
        f"than MwT's and {PUBLISHED['size reduction %']} % fewer parameters.",
        f"Here, mean +- standard deviation over seeds: {'; '.join(found)}.",
        f"Both claims hold together on {', '.join(map(str, models)) or 'no model'}, and on "
        f"{both.sum()} of {len(both)} pairs of model and subset{f': {pairs}' if pairs else ''}. "
        "The two methods' losses were not equally strong: T7 says what each cost.",
    ]


def _signed(points: float, spread: float) -> str:
    """With the standard deviation, which one seed has not."""
    return f"{points:+.1f}" if pd.isna(spread) else f"{points:+.1f} +- {spread:.1f}"


def rerun(units: dict[str, Facts]) -> list[tuple[str, str]]:
    """(what, the command that computes its units again)."""
    sweeps = [name for name, facts in units.items() if facts["changes"]]
    plain = [name for name in units if name not in sweeps]
    knobs = [name for name in sweeps if any(k in name for k in ("-alpha-", "-mwt-", "-tau-"))]
    vgg16 = [name for name in plain if name.startswith("vgg16")]
    command = "python -m benchmarks.study run "
    return [
        ("T1, T2, T7, alternatives, gap", command + " ".join(plain)),
        ("T3", command + " ".join(vgg16 + [name for name in sweeps if name not in knobs])),
        ("T4", command + " ".join(knobs)),
        ("T5", command + " ".join(name for name in plain if name.startswith("vit_small"))),
        ("T6, CPU times", "python -m benchmarks.study times"),
    ]


def as_results(units: list[Facts]) -> Results:
    """Units as the pipeline's report reads its results."""
    found, models, seeds = [], [], set()
    for facts in units:
        evaluation = facts["evaluation"]
        dataset = evaluation["dataset"]["name"]
        models.append(evaluation["model"])
        for row in evaluation["cells"]:
            method = row["method"]
            seeds.add(row["seed"])
            found.append(
                CellResult(
                    Cell(dataset, evaluation["model"], method, row["seed"]),
                    row,
                    {},
                    facts["history"][method],
                    facts["masks"].get(method),
                    [_module(facts, m) for m in evaluation["modules"] if m["method"] == method],
                )
            )
    changes = {"models": list(dict.fromkeys(models)), "seeds": sorted(seeds)}
    params = Params.model_validate(units[0]["params"] | changes)
    about = units[0]["evaluation"]["dataset"]
    return Results(params, {about["name"]: about}, found)


def _module(facts: Facts, row: dict[str, Any]) -> ModuleResult:
    history = facts["finetuning"][f"{row['method']} {row['subset']}"]
    return ModuleResult(row["subset"], row, history, Path())


def _grid(table: Table) -> dict[str, Any]:
    shown = summarised(table)
    rows = [[str(value) for value in row] for row in shown.itertuples(index=False)]
    return {"headers": list(shown.columns), "rows": rows, "labels": len(table.keys)}


def _inline(path: Path) -> str:
    """As lossless WebP, which is a third of the PNG."""
    packed = BytesIO()
    Image.open(path).convert("RGB").save(packed, "webp", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode("ascii")

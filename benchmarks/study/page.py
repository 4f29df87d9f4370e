"""reports/cifar10-cpu/index.html: the study on one page, with the pipeline's own figures."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PackageLoader, StrictUndefined
from PIL import Image

from benchmarks.study.figures import PUBLISHED
from benchmarks.study.tables import Facts, Table, plain_units, summarised
from nemo.config import Params
from nemo.layout import Cell
from nemo.report import words
from nemo.report.figures import draw_all
from nemo.report.published import beside
from nemo.report.results import CellResult, ModuleResult, Results
from nemo.report.style import Picture

RERUN = "python -m benchmarks.study run {}"


def write_page(
    units: dict[str, Facts],
    tables: list[Table],
    pictures: list[Picture],
    where: str,
    out: Path,
) -> None:
    """index.html in `out`, whose figures/ holds `pictures` and gets the maps of the models; `where`
    is the setting of all tables."""
    results = as_results(units)
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
                for table, picture in zip(tables, pictures, strict=True)
            ],
            maps=[(picture, _inline(out / "figures" / picture.file)) for picture in maps],
            flags=words.diagnose(results),
            beside=beside(results, next(iter(results.datasets))),
            units=[(name, RERUN.format(name)) for name in units],
        )
    )


def verdicts(tables: list[Table]) -> list[str]:
    """Whether the paper's claims hold here, and how modules compare with alternatives."""
    frames = {table.name: table.frame for table in tables}
    lines = []
    if "T7-headline" in frames:
        lines += _claims(frames["T7-headline"].groupby("model", sort=False).mean(numeric_only=True))
    if "alternatives" in frames:
        others = frames["alternatives"]
        others = others[others["alternative"] != "nemo, mean"]  # is NeMo's module, too
        ahead = others.groupby(["alternative", "model"], sort=False)["nemo ahead, points"].mean()
        lines.append(
            "Is a NeMo module better than the obvious alternatives? Points of test accuracy by "
            "which it is ahead, mean of subsets and seeds. All alternatives have at most its "
            "parameters but the standard model, whole as it is and tuned on the subset."
        )
        for name in others["alternative"].unique():
            each = ", ".join(f"{points:+.1f} on {model}" for model, points in ahead[name].items())
            lines.append(f"Against {name}: {each}.")
    return lines


def _claims(headline: pd.DataFrame) -> list[str]:
    """The paper's two claims, model by model: an average would hide that they fail apart."""
    lines = [
        f"Published, as averages: NeMo's modules have {PUBLISHED['gain']} points more accuracy "
        f"than MwT's and {PUBLISHED['size reduction %']} % fewer parameters."
    ]
    for (more, fewer), models in headline.groupby(
        [headline["gain"] > 0, headline["size reduction %"] > 0]
    ):
        lines.append(
            f"Here, on {', '.join(map(str, models.index))}: {_range(models['gain'], '.1f')} points "
            f"{'more' if more else 'less'} and {_range(models['size reduction %'], '.0f')} % "
            f"{'fewer' if fewer else 'more'}."
        )
    both = headline.index[(headline["gain"] > 0) & (headline["size reduction %"] > 0)]
    lines.append(f"Both claims hold together on {', '.join(map(str, both)) or 'no model'}.")
    return lines


def _range(values: pd.Series[float], shape: str) -> str:
    low, high = (f"{value:{shape}}" for value in (values.abs().min(), values.abs().max()))
    return low if low == high else f"{low} to {high}"


def as_results(units: dict[str, Facts]) -> Results:
    """The units that follow the profile, as the pipeline's report reads its results."""
    plain = list(plain_units(units))
    found, models, seeds = [], [], set()
    for facts in plain:
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
    params = Params.model_validate(plain[0]["params"] | changes)
    about = plain[0]["evaluation"]["dataset"]
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

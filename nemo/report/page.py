"""index.html: everything on one page that needs nothing but itself."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd

from nemo.report import words
from nemo.report.published import NOTHING, beside
from nemo.report.results import Results
from nemo.report.style import Picture
from nemo.report.table import TABLES, grid


def page(
    results: Results, tables: dict[str, pd.DataFrame], pictures: list[Picture], folder: Path
) -> str:
    """The page, with the figures in `folder` inlined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("nemo.report", ".")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        profile=results.params.profile,
        headlines=words.headlines(results),
        sections=_sections(results, tables),
        nothing=NOTHING,
        flags=words.diagnose(results),
        figures=[(picture, _inline(folder / picture.file)) for picture in pictures],
        settings=words.settings(results.params),
    )


def _sections(results: Results, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    sections = []
    for dataset in results.params.datasets:
        grids = []
        for table in TABLES:
            frame = tables[table.name]
            grids.append((table, grid(table, frame[frame["dataset"] == dataset])))
        sections.append(
            {
                "title": results.datasets[dataset]["title"],
                "caption": words.caption(results, dataset),
                "grids": grids,
                "beside": beside(results, dataset),
            }
        )
    return sections


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")

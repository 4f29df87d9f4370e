"""Writes the folder reports/<profile>/ and prints the tables of a finished one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pandas as pd

from nemo.config import Params
from nemo.files import new_folder, write_json, writing
from nemo.report import words
from nemo.report.collect import Results, collect, others_of, titles
from nemo.report.published import NOTHING, beside
from nemo.report.table import Part, Table, csv_text, grid
from nemo.report.tables import T1, T2, TABLES, frames, history_frame, summary
from nemo.results import MissingResultError

COMPLETE = f"{T1.name}.csv"  # a folder that holds it is a report, and may be replaced


def write_report(params: Params, root: Path, out: Path) -> list[str]:
    """Write tables, figures, metrics.json and index.html into `out`, replacing what it held.

    Args:
        params: says which cells the report is about.
        root: the folder with results/.
        out: appears whole or not at all.

    Returns:
        A line for each result that is missing, or that does not fit params and is left out.

    Raises:
        MissingResultError: there is no result, or one is not what it should be; nothing is written.
        ValueError: `out` holds something, and it is no report.
    """
    if out.exists() and any(out.iterdir()) and not (out / COMPLETE).is_file():
        raise ValueError(f"{out} holds files and is no report: choose another folder, or empty it")
    results = collect(params, root)
    others = [collect(other, root) for other in others_of(params, root)]
    with new_folder(out) as folder:
        _write_all(results, others, folder)
    return [
        *(f"missing: {name}" for each in (results, *others) for name in each.missing),
        *(f"left out: {name}" for each in (results, *others) for name in each.left_out),
    ]


def _write_all(results: Results, others: list[Results], folder: Path) -> None:
    from nemo.report.figures import draw
    from nemo.report.maps import draw_maps
    from nemo.report.page import page

    made, figures = [(each, frames(each)) for each in (results, *others)], folder / "figures"
    figures.mkdir()
    sections, own = [], made[0][1]
    named = titles((results, *others))
    for table in TABLES:
        parts, rows = [], []
        for each, tables in made if table.beside else made[:1]:
            frame = tables.get(table.name)
            if frame is None:
                continue
            rows.append(frame)
            for name in each.datasets:
                part = frame[frame["dataset"] == name].dropna(axis=1, how="all")
                if len(part):
                    part = table.shown(part)
                    picture = draw(table, part, figures, name)
                    parts.append(Part(named[name], each, name, grid(table, part), picture))
        if rows:
            _write(folder / f"{table.name}.csv", csv_text(_joined(table, rows)))
            _write(folder / f"{table.name}.md", _markdown(table, parts, results))
            sections.append((table, parts))
    _write(folder / "history.csv", csv_text(history_frame(results)))
    write_json(folder / "metrics.json", summary(own))
    maps = draw_maps(results, figures)
    _write(folder / "index.html", page(results, others, own, sections, maps, figures))


def _joined(table: Table, rows: list[pd.DataFrame]) -> pd.DataFrame:
    if len(rows) == 1:
        return rows[0]
    frame = pd.concat(rows, ignore_index=True)
    return frame[[name for name in table.column_names if name in frame]]


def _write(path: Path, text: str) -> None:
    with writing(path), path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _markdown(table: Table, parts: list[Part], results: Results) -> str:
    """One table as Markdown: a section per data set, each with its scale."""
    text = [f"# {table.title}", table.note]
    for part in parts:
        text += [f"## {part.title}", words.caption(part.results, part.dataset)]
        text.append(part.grid.markdown)
        text.append(f"![{part.picture.how}](figures/{part.picture.file})")
    if table is T1:
        text.append(_published(results))
    return "\n\n".join(text) + "\n"


def _published(results: Results) -> str:
    pairs = [pair for dataset in results.datasets for pair in beside(results, dataset)]
    lines = [
        f"- {p.what}: ours {p.ours} ({p.scale}); published {p.published} ({p.published_scale})"
        for p in pairs
    ]
    head = "Published figures that measure the same thing, at their scale:"
    return "\n".join([head, "", *lines]) if lines else NOTHING


def render_tables(out: Path) -> None:
    """Print T1 and T2 of the finished report in `out`: framed on a terminal, else as Markdown.

    Raises:
        MissingResultError: `out` holds no report.
    """
    for table in (T1, T2):
        path = out / f"{table.name}.md"
        if not path.is_file() and table is T1:
            raise MissingResultError(f"{path} is missing; `dvc repro` makes it, or `nemo report`")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(re.sub(r"^!.*$", "", text, flags=re.M)))
        else:
            print(text)

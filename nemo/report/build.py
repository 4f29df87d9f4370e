"""Writes the folder reports/<profile>/ and prints the tables of a finished one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pandas as pd

from nemo.config import Params
from nemo.files import new_folder, write_json, writing
from nemo.report import words
from nemo.report.published import NOTHING, Beside, beside
from nemo.report.results import MissingResultError, Results, read_results
from nemo.report.table import MODULAR, TABLES, Table, grid, markdown
from nemo.report.tables import csv_text, frames, history_frame, summary

COMPLETE = "modular.csv"  # a folder that holds it is a report, and may be replaced


def write_report(params: Params, root: Path, out: Path) -> None:
    """Write tables, figures, metrics.json and index.html into `out`, replacing what it held.

    Args:
        params: says which cells the report is about.
        root: the folder with evaluation/ and runs/.
        out: appears whole or not at all.

    Raises:
        MissingResultError: a result file is absent; nothing is written.
        ValueError: `out` holds something, and it is no report.
    """
    if out.exists() and any(out.iterdir()) and not (out / COMPLETE).is_file():
        raise ValueError(f"{out} holds files and is no report: choose another folder, or empty it")
    results = read_results(params, root)
    with new_folder(out) as folder:
        _write_all(results, folder)


def _write_all(results: Results, folder: Path) -> None:
    from nemo.report.figures import draw_all
    from nemo.report.page import page

    tables = frames(results)
    for table in TABLES:
        _write(folder / f"{table.name}.csv", csv_text(tables[table.name]))
        _write(folder / f"{table.name}.md", table_markdown(table, tables[table.name], results))
    _write(folder / "history.csv", csv_text(history_frame(results)))
    write_json(folder / "metrics.json", summary(tables))
    figures = folder / "figures"
    figures.mkdir()
    pictures = draw_all(results, figures)
    _write(folder / "index.html", page(results, tables, pictures, figures))


def _write(path: Path, text: str) -> None:
    with writing(path), path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def table_markdown(table: Table, frame: pd.DataFrame, results: Results) -> str:
    """One table as Markdown: a section per data set, each with its caption."""
    parts = [f"# {table.title}", table.note]
    for dataset in results.params.datasets:
        rows = frame[frame["dataset"] == dataset]
        parts += [f"## {results.datasets[dataset]['title']}", words.caption(results, dataset)]
        parts.append(markdown(grid(table, rows)))
        if table is MODULAR:
            parts.append(_published_markdown(beside(results, dataset)))
    return "\n\n".join(parts) + "\n"


def _published_markdown(pairs: list[Beside]) -> str:
    if not pairs:
        return NOTHING
    lines = [
        f"- {p.what}: ours {p.ours} ({p.scale}); published {p.published} ({p.published_scale})"
        for p in pairs
    ]
    return "\n".join(["Published figures that measure the same thing, at their scale:", "", *lines])


def render_tables(out: Path) -> None:
    """Print the tables of the finished report in `out`: framed on a terminal, else as Markdown.

    Raises:
        MissingResultError: `out` holds no report.
    """
    for table in TABLES:
        path = out / f"{table.name}.md"
        if not path.is_file():
            raise MissingResultError(f"{path} is missing; `dvc repro` makes it, or `nemo report`")
        text = path.read_text(encoding="utf-8")
        if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
            _print_framed(text)
        else:
            print(text)


def _print_framed(text: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Framed

    console = Console(highlight=False)
    for block in text.strip().split("\n\n"):
        if not block.startswith("|"):
            heading = block.startswith("#")
            console.print(escape(block.lstrip("# ")), style="bold" if heading else "dim")
            continue
        head, align, *rows = (
            [c.strip() for c in r.strip("|").split("|")] for r in block.split("\n")
        )
        framed = Framed(box=box.SIMPLE_HEAD)
        for name, rule in zip(head, align, strict=True):
            framed.add_column(escape(name), justify="right" if rule.endswith(":") else "left")
        for row in rows:
            framed.add_row(*map(escape, row))
        console.print(framed)

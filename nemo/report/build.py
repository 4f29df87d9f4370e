"""Writes the folder reports/<profile>/ and prints the tables of a finished one."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from nemo.config import Params
from nemo.files import new_folder, write_json, writing
from nemo.report import words
from nemo.report.collect import Results, collect
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
    with new_folder(out) as folder:
        _write_all(results, folder)
    return [
        *(f"missing: {name}" for name in results.missing),
        *(f"left out: {name}" for name in results.left_out),
    ]


def _write_all(results: Results, folder: Path) -> None:
    from nemo.report.figures import draw
    from nemo.report.maps import draw_maps
    from nemo.report.page import page

    tables, figures = frames(results), folder / "figures"
    figures.mkdir()
    sections = []
    for table in TABLES:
        if table.name in tables:
            frame = tables[table.name]
            parts = []
            for name in results.datasets:
                own = frame[frame["dataset"] == name].dropna(axis=1, how="all")
                if len(own):
                    picture = draw(table, own, figures, name)
                    parts.append((name, grid(table, own), picture))
            _write(folder / f"{table.name}.csv", csv_text(frame))
            _write(folder / f"{table.name}.md", _markdown(table, parts, results))
            sections.append((table, parts))
    _write(folder / "history.csv", csv_text(history_frame(results)))
    write_json(folder / "metrics.json", summary(tables))
    maps = draw_maps(results, figures)
    _write(folder / "index.html", page(results, tables, sections, maps, figures))


def _write(path: Path, text: str) -> None:
    with writing(path), path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def _markdown(table: Table, parts: list[Part], results: Results) -> str:
    """One table as Markdown: a section per data set, each with its scale."""
    text = [f"# {table.title}", table.note]
    for name, shown, picture in parts:
        text += [f"## {results.datasets[name]['title']}", words.caption(results, name)]
        text.append(shown.markdown)
        text.append(f"![{picture.how}](figures/{picture.file})")
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

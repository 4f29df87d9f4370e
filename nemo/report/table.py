"""What a table is, as CSV, as a data frame, and as it is shown.

One row of a CSV is one seed, so nothing is lost; Markdown and HTML show mean ± sd over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from nemo.forms import EXACT
from nemo.metrics import Metric, metrics_of
from nemo.report.collect import Results
from nemo.report.style import Picture
from nemo.report.words import short
from nemo.results import Row

SEED = "seed"
HEADERS = {
    "model": "Model", "method": "Method", "subset": "Classes", "alternative": "Alternative",
    "changes": "Changes", "knob": "Knob", "value": "Value", "threshold": "Threshold",
    "granularity": "Granularity", "equal": "Equal", "competitor": "Competitor",
    "epochs": "Epochs", "what": "What", "against": "Against", "device": "Device",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        keys: the columns that name a row, besides the data set (the first) and seed (the last).
        scopes: of the metrics that are its other columns.
        rows: makes them, from results.
        texts: columns of text that name nothing.
        trained: whether metrics that follow from params alone are left out.
        beside: whether the profiles that params name under `beside` have rows in it.
        over: the key whose values are averaged where the table is shown; its CSV has each.
    """

    name: str
    title: str
    note: str
    keys: tuple[str, ...]
    scopes: tuple[str, ...]
    rows: Callable[[Results], Iterator[Row]]
    texts: tuple[str, ...] = ("device",)
    trained: bool = False
    beside: bool = False
    over: str = ""

    @property
    def shown_keys(self) -> list[str]:
        """Those that name a row where the table is shown."""
        return [key for key in self.keys if key != self.over]

    @property
    def key_names(self) -> list[str]:
        return ["dataset", *self.keys, SEED]

    @property
    def column_names(self) -> list[str]:
        return [*self.key_names, *self.texts, *(metric.name for metric in self.metrics)]

    @property
    def metrics(self) -> list[Metric]:
        """Its columns of numbers; a plugin may add some."""
        found = [metric for scope in self.scopes for metric in metrics_of(scope)]
        return [m for m in found if not (self.trained and m.tolerance is EXACT and m.value)]

    def frame(self, results: Results) -> pd.DataFrame:
        """A row per seed. Columns of numbers that no row has are left out."""
        frame = pd.DataFrame(list(self.rows(results)), columns=self.column_names)
        for metric in self.metrics:
            numbers = pd.to_numeric(frame[metric.name])
            frame[metric.name] = numbers.astype("Int64" if metric.integer else "float64")
        empty = [m.name for m in self.metrics if not frame[m.name].notna().any()]
        return frame.drop(columns=empty)

    def shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Averaged over the key `over`; what one of its values lacks has no average."""
        if not self.over:
            return frame
        names = ["dataset", *self.shown_keys, SEED, *self.texts]
        groups = frame.groupby(names, sort=False, dropna=False)
        numbers = {m.name: groups[m.name] for m in self.metrics if m.name in frame}
        middle = {metric.name for metric in self.metrics if metric.middle}
        means = {
            name: (own.median() if name in middle else own.mean()).where(own.count() == own.size())
            for name, own in numbers.items()
        }
        return pd.DataFrame(means).reset_index()


@dataclass(frozen=True)
class Grid:
    """A table of one data set, ready to be shown: strings only; the first `labels` are text."""

    headers: list[str]
    rows: list[list[str]]
    labels: int

    @cached_property
    def markdown(self) -> str:
        from tabulate import tabulate

        align = ["left"] * self.labels + ["right"] * (len(self.headers) - self.labels)
        return tabulate(
            self.rows, self.headers, tablefmt="pipe", colalign=align, disable_numparse=True
        )


@dataclass(frozen=True)
class Part:
    """What a table shows of one data set: its rows, and its figure."""

    title: str
    results: Results
    dataset: str
    grid: Grid
    picture: Picture


def csv_text(frame: pd.DataFrame) -> str:
    text: str = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text


def grid(table: Table, frame: pd.DataFrame) -> Grid:
    """The rows of one data set, seeds averaged. Labels that are always empty are left out, and the
    device and number of seeds where they are the same everywhere."""
    groups = frame.groupby(table.shown_keys, sort=False, dropna=False)
    labels = pd.DataFrame({n: groups[n].first() for n in (*table.shown_keys, *table.texts)})
    labels["device"] = groups["device"].agg(lambda used: ", ".join(sorted(set(used))))
    labels["seeds"] = groups[SEED].nunique().astype(str)
    if "subset" in labels:
        labels["subset"] = labels["subset"].map(short)
    for name in labels:
        same = labels[name].nunique() < 2
        if (labels[name] == "").all() or (name in ("device", "seeds") and same):
            labels = labels.drop(columns=name)
    shown = [m for m in table.metrics if m.header and m.name in frame]
    rows = [
        [*map(str, names), *(_cell(metric, own) for metric in shown)]
        for names, (_, own) in zip(labels.itertuples(index=False), groups, strict=True)
    ]
    headers = [HEADERS.get(str(name), str(name).capitalize()) for name in labels]
    return Grid([*headers, *(metric.header for metric in shown)], rows, len(headers))


def _cell(metric: Metric, rows: pd.DataFrame) -> str:
    values = rows[metric.name].dropna().astype(float)
    if not len(values):
        return ""
    if metric.middle:
        return metric.form(float(values.median()))
    text = metric.form(float(values.max() if metric.worst else values.mean()))
    if len(values) > 1 and not (metric.integer or metric.worst):
        text += f" ± {metric.form(float(values.std())).lstrip('+')}"
    if metric.ratio in rows and rows[metric.ratio].notna().any():
        text += f" ({100 * rows[metric.ratio].astype(float).mean():.0f} %)"
    return text

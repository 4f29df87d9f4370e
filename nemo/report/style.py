"""How every figure looks, and how it is saved so that equal numbers give equal bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from nemo.files import writing
from nemo.masking.objectives import OBJECTIVES
from nemo.report.words import label

# Okabe and Ito's colours, which the colour-blind tell apart, and greys; methods have their own
PALETTE = (
    "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#999999", "#F0E442", "#000000", "#882255",
    "#8C6D31",
)  # fmt: skip
MARKERS = "os^Dv<>p"
LEGEND_LINE = 0.2  # inches
INK = "#222222"
MAP, EMPTY, CROSS = "Blues", "#F1F1F1", "#D55E00"  # one ramp of lightness, readable in grey
SETTINGS: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that machines agree
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Picture:
    """One saved figure and how to read it."""

    file: str
    title: str
    how: str


def tones(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: a method's own, the same in every figure, or the next one free."""
    names = list(dict.fromkeys(names))
    found: dict[str, str] = {}
    for name in names:
        own = OBJECTIVES[name].colour if name in OBJECTIVES else ""
        if own and own not in found.values():
            found[name] = own
    free = cycle([tone for tone in PALETTE if tone not in found.values()] or PALETTE)
    return {name: found[name] if name in found else next(free) for name in names}


def marks(colours: dict[str, str]) -> dict[str, str]:
    """A marker for each name, so that names of one colour differ, too."""
    found: dict[str, str] = {}
    used: Counter[str] = Counter()
    for name, tone in colours.items():
        found[name] = MARKERS[used[tone] % len(MARKERS)]
        used[tone] += 1
    return found


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], named: Iterable[str] = ()
) -> Iterator[Any]:
    """A grid of axes (always two-dimensional) that is saved to `path` as PNG. It grows by what the
    legend of `named` needs beyond two lines."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    with mpl.rc_context():
        mpl.rcdefaults()  # a user's matplotlibrc must not change the bytes
        mpl.rcParams.update(SETTINGS)
        names, (width, height) = list(named), size
        lines = -(-len(names) // _across(names, width)) if names else 0
        tall = height + LEGEND_LINE * max(0, lines - 2)
        drawing = Figure(figsize=(width, tall), layout="constrained")
        yield drawing.subplots(rows, columns, squeeze=False)
        with writing(path):
            drawing.savefig(path, format="png", metadata={"Software": None})


def legend(axes: Any, colours: dict[str, str]) -> None:
    """Above all axes, what the colours stand for, in as many columns as there is room for."""
    from matplotlib.lines import Line2D

    forms = marks(colours)
    handles = [
        Line2D([], [], ls="", marker=forms[name], color=tone, label=label(name))
        for name, tone in colours.items()
    ]
    drawing = axes.flat[0].figure
    columns = min(_across(colours, drawing.get_figwidth()), len(handles))
    drawing.legend(handles=handles, loc="outside upper center", ncols=columns)


def _across(names: Iterable[str], width: float) -> int:
    """How many entries of a legend stand beside each other, in `width` inches."""
    longest = max(len(label(name)) for name in names)
    return max(2, int(width / max(1.1, 0.5 + 0.085 * longest)))

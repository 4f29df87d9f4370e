"""How a number is shown, and how far a regenerated one may be from the committed one (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Form = Callable[[float], str]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def plain(value: float) -> str:
    return f"{value:.3f}"


def points(value: float) -> str:
    return f"{value:+.1f}" if round(value, 1) else "0.0"  # never -0.0


def tenth(value: float) -> str:
    return f"{value:.1f}"


def seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def small(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def count(value: float) -> str:
    """Three significant digits: 845, 12.3 k, 11.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:.0f}"


@dataclass(frozen=True)
class Tolerance:
    """Two values agree when they differ by at most `absolute + relative * |committed|`."""

    absolute: float
    relative: float
    why: str

    def admits(self, fresh: float, committed: float) -> bool:
        if math.isnan(fresh) or math.isnan(committed):
            return math.isnan(fresh) and math.isnan(committed)  # nothing agrees with nothing only
        allowed = self.absolute + self.relative * abs(committed)
        return fresh == committed or abs(fresh - committed) <= allowed + 1e-12


EXACT = Tolerance(0, 0, "follows from params alone")
ACCURACY = Tolerance(0.03, 0, "a trained model's accuracy over seeds, 360 or more test images")
LOST = Tolerance(4, 0, "the difference of two accuracies, in points")
SUBSET = Tolerance(0.06, 0, "few test images: a subset of two classes has about 70")
AHEAD = Tolerance(8, 0, "the difference of two accuracies of a subset, in points")
STEP0 = Tolerance(0.4, 0, "before fine-tuning the mask gap decides, by chance")
AS_CUT = Tolerance(0.55, 0, "of two classes, one CPU had 51 %, another 100; no BatchNorm anew")
MASKS = Tolerance(0.12, 0, "which neurons survive differs from seed to seed more than accuracy")
DEAD = Tolerance(3, 0, "a layer near the threshold dies or lives by chance")
SIZE = Tolerance(0, 0.35, "a module's size follows its masks, layer by layer")
SHARE = Tolerance(0.35, 0, "a share of sizes that follow the masks, layer by layer")
ROUNDING = Tolerance(1e-9, 0, "rounding of float64; the bound that exactness means")
MACHINE = Tolerance(math.inf, 0, "the time that a machine takes is its own")
CHOSEN = Tolerance(math.inf, 0, "the best of a few learning rates is often a near tie")
WINS = Tolerance(2, 0, "a comparison near its tie falls either way by chance")

"""What looks wrong in the results: the paper's failure signatures, wherever they show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from nemo.forms import percent
from nemo.masking.objectives import OBJECTIVES
from nemo.metrics import measured
from nemo.report.collect import Results
from nemo.report.words import LOSS_LIMIT
from nemo.results import CellResult, Row

COUPLING_LIMIT = 0.6
COHESION_LIMIT = 0.7
CERTIFICATE_LIMIT = 1e-9


class Flag(NamedTuple):
    """Something that looks wrong, with its evidence and what usually helps."""

    where: str
    what: str
    advice: str


def diagnose(results: Results, cells: list[CellResult] | None = None) -> list[Flag]:
    """The flags of `cells`, or of all."""
    flags: list[Flag] = []
    for result in results.cells if cells is None else cells:
        if result.modular:
            flags += _idle(result)
            flags += _cell_flags(result, measured(results.subject(result)))
            for module in result.modules:
                row = module.metrics | measured(results.subject(result, module))
                where = f"{result.cell.name}, classes {module.subset}"
                flags += [Flag(where, *rest) for rest in _module_flags(row, _pull(result))]
    return flags


def _idle(result: CellResult) -> Iterator[Flag]:
    """Parts of the loss that waited for the task loss until the end."""
    last, advice = result.history[-1], "more train.epochs, or another train.lr"
    share = last.get("penalty_share", 1)
    if share == 0:
        yield Flag(result.cell.name, "the loss on masks never counted", advice)
    elif share < 1:
        rose = f"the loss on masks rose to {int(100 * share)} % of its weight"
        yield Flag(result.cell.name, rose, "more train.epochs, or a shorter warmup")
    if "cut_loss" in last and not any(row.get("cut_loss") for row in result.history):
        yield Flag(result.cell.name, "the cut pass never ran", advice)


def _pull(result: CellResult) -> str:
    """The params that pull masks apart."""
    return OBJECTIVES[result.base].pull or f"the weight of {OBJECTIVES[result.base].label}'s loss"


def _cell_flags(result: CellResult, row: Row) -> Iterator[Flag]:
    where, pull = result.cell.name, _pull(result)
    if (row["loss_points"] or 0) > LOSS_LIMIT:
        standard = row["accuracy"] + row["loss_points"] / 100
        lost = f"loses {row['loss_points']:.1f} points against the standard model "
        yield Flag(where, f"{lost}({percent(standard)} %)", f"{pull} too high for this many epochs")
    if row["coupling"] > COUPLING_LIMIT:
        what = f"coupling {row['coupling']:.3f} is above {COUPLING_LIMIT}: classes share neurons"
        yield Flag(where, what, f"{pull}, or too few epochs")
    if row["cohesion"] < COHESION_LIMIT:
        what = (
            f"cohesion {row['cohesion']:.3f} is below {COHESION_LIMIT}: samples of a class differ"
        )
        yield Flag(where, what, f"{pull}, or too few epochs")
    if row["dead_layers"]:
        what = f"{row['dead_layers']} of {row['layers']} masked layers are dead for some class"
        yield Flag(where, what, f"{pull} too high, or masks.threshold too high")


def _module_flags(row: Row, pull: str) -> Iterator[tuple[str, str]]:
    gap = 100 * ((row["accuracy_standard"] or 0) - row["accuracy"])
    if gap > LOSS_LIMIT:
        steps = f"from {percent(row['accuracy_step0'])} to {percent(row['accuracy'])} %"
        what = f"fine-tuning goes {steps}, {gap:.1f} points below the standard model"
        yield what, "more finetune.epochs, or a lower masks.threshold"
    if row["certificate"] > CERTIFICATE_LIMIT:
        what = f"certificate {row['certificate']:.1e} is above {CERTIFICATE_LIMIT:.0e}"
        yield what, "the module is not exact: please report it"
    if row.get("vacuous"):
        what = "its logits hardly vary between images, so the certificate says little"
        yield what, f"too few neurons are left: {pull} too high"
    if row.get("blocked"):
        what = f"{row['blocked']} operations have no rule for smaller inputs"
        yield what, "the module is exact, but larger than it could be"

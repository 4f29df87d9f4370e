"""What a variant changes, read from params alone: the rows of T3 and T4 follow from it.

A change is a *switch* where it is no number, or turns a number from or to zero: another form of the
objective, or a part of it less. Any other number is a *knob*. T3 compares switches; T4 turns one
knob, of a method or of a switched one, or several in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo.cells import Cell
from nemo.report.collect import Results
from nemo.results import CellResult, Row
from nemo.settings import ORIGIN, settings

Change = dict[str, tuple[object, object]]  # {key of params: (value before, value now)}


@dataclass(frozen=True)
class Turn:
    """A row of T4: `result` has `knob` at `value`, all else as the method `series`."""

    series: str
    knob: str
    value: float
    result: CellResult


def forms(results: Results, dataset: str, model: str) -> list[tuple[CellResult, str]]:
    """Methods and their switched variants with what they switch; empty where nothing is switched.

    Methods come in the order of params, each followed by its variants.
    """
    found = []
    for result in results.of(dataset, model, every=True):
        change = _from_base(results, result)
        own = f"{results.params.base_of(result.cell.method).section}."
        if result.modular and _switched(change) and all(key.startswith(own) for key in change):
            found.append((result, ", ".join(f"{key} {new}" for key, (_, new) in change.items())))
    order = [r.base for r in results.of(dataset, model, every=True)]
    found.sort(key=lambda pair: order.index(pair[0].base))
    return found if any(text for _, text in found) else []


def turns(results: Results, dataset: str, model: str) -> Iterator[Turn]:
    """Every knob that is turned at a model, by series; its own value included, seed by seed. Knobs
    of the fine-tuning are none: T4 is of the whole network, which they do not move."""
    every = [r for r in results.of(dataset, model, every=True) if r.modular]
    for series in dict.fromkeys(r.cell.method for r in every):
        centre = [r for r in every if r.cell.method == series]
        if not _switched(_from_base(results, centre[0])):
            continue
        found: dict[str, list[Turn]] = {}
        for result in every:
            if result.base == centre[0].base and result.cell.method != series:
                change = _change(centre[0].params, result.params)
                tuned = any(key.startswith("finetune.") for key in change)
                if _proportional(change) and not tuned:
                    new = next(iter(change.values()))[1]
                    found.setdefault(" and ".join(change), []).append(
                        Turn(series, " and ".join(change), _number(new), result)
                    )
        for knob, rows in found.items():
            seeds = {turn.result.cell.seed for turn in rows}
            value = _number(centre[0].params[knob.split(" and ")[0]])
            yield from (Turn(series, knob, value, r) for r in centre if r.cell.seed in seeds)
            yield from rows


def _from_base(results: Results, result: CellResult) -> Change:
    """What a variant changes of the method that it is one of; nothing for a method itself."""
    cell = result.cell
    base = Cell(cell.dataset, cell.model, result.base, cell.seed)
    return _change(settings(results.params, base, result.family), result.params)  # type: ignore[arg-type]


def _change(before: Row, now: Row) -> Change:
    keys = [key for key in {**before, **now} if key not in ORIGIN]
    return {k: (before.get(k), now.get(k)) for k in keys if before.get(k) != now.get(k)}


def _switched(change: Change) -> bool:
    """Whether all of a change are switches; also where there is none."""
    return all(_is_switch(*pair) for pair in change.values())


def _is_switch(before: object, now: object) -> bool:
    numbers = [v for v in (before, now) if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) < 2 or 0 in numbers


def _proportional(change: Change) -> bool:
    """Whether a change is of one knob, or of several by one factor."""
    if not change or any(_is_switch(*pair) for pair in change.values()):
        return False
    factors = [_number(now) / _number(before) for before, now in change.values()]
    return max(factors) - min(factors) < 1e-6 * max(factors)


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)

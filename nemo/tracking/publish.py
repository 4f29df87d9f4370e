"""Every finished cell and module into MLflow, from the files of results; twice changes nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from nemo.cells import Cell, cells
from nemo.config import STANDARD, Params
from nemo.results import CellResult, MissingResultError, read_result, result_file
from nemo.settings import fits
from nemo.tracking.patience import Patience, in_time
from nemo.tracking.records import cell_key, cell_record, module_record
from nemo.tracking.store import KEY, Store, TrackingError, one_line
from nemo.tracking.views import addresses, views

QUIETLY = 10.0  # seconds that a store which does not answer may cost a report
BY_HAND = 60.0
_log = logging.getLogger(__name__)


@dataclass
class Summary:
    """What `publish` did.

    Attributes:
        place: the database's path, or the server's address.
        skipped: a line for each file that is missing, or is of other params.
        addresses: {view: its address in the UI}.
    """

    place: str
    added: int
    unchanged: int
    skipped: list[str] = field(default_factory=list)
    addresses: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.added} runs added or completed, {self.unchanged} unchanged"]
        lines += [f"skipped: {reason}" for reason in self.skipped]
        lines += [f"{name + ':':<9}{address}" for name, address in self.addresses.items()]
        return "\n".join(lines)


def publish(params: Params, root: Path = Path(), seconds: float = BY_HAND) -> Summary:
    """Log every finished cell of `params`, and its modules, from the files below `root`.

    Runs of other params, and of earlier results, stay.

    Args:
        seconds: how long a store may take that does not answer; one that does is waited for.

    Raises:
        MissingResultError: there are no results of these params.
        TrackingError: the store cannot be used, or MLflow is not installed.
    """
    results, skipped = _finished(params, root)
    if not results:
        raise MissingResultError(skipped[0])

    def write(patience: Patience) -> Store:
        store = Store.connect(root, patience)
        for result in results:
            with store.alone():
                _put(store, result, _standard(result, results))
        store.show(views(results))
        return store

    try:
        store = in_time(write, Patience(seconds))
    except ImportError:
        raise TrackingError(
            "MLflow is not installed: pip install 'nemo-modular[pipeline]'"
        ) from None
    except Exception as error:  # stores and clients raise their own kinds; a user needs one line
        raise TrackingError(f"MLflow: {one_line(error)}") from error
    where = addresses(store.place, store.experiment)
    return Summary(store.place, store.added, store.unchanged, skipped, where)


def publish_quietly(params: Params, root: Path = Path()) -> Summary | None:
    """`publish` for the end of a stage: it never raises, and warns once in one line instead."""
    try:
        return publish(params, root, QUIETLY)
    except Exception as error:  # whatever it is, the report is written and stays
        _log.warning("%s; `nemo publish` logs the results later", one_line(error))
        return None


def _put(store: Store, result: CellResult, standard: CellResult | None) -> None:
    key = cell_key(result.profile, result.cell, result.params, result.data["sha256"])
    run_id = store.put(key, cell_record(result, standard), store.runs(KEY, key))
    below = store.runs("mlflow.parentRunId", run_id) if result.modules else []
    for module in result.modules:
        record = module_record(result, module, standard, run_id)
        own = [run for run in below if run.data.tags.get("subset") == module.subset]
        store.put(f"{run_id}/{module.subset}", record, own)


def _standard(result: CellResult, results: list[CellResult]) -> CellResult | None:
    cell = result.cell
    wanted = Cell(cell.dataset, cell.model, STANDARD, cell.seed)
    return next((other for other in results if other.cell == wanted), None)


def _finished(params: Params, root: Path) -> tuple[list[CellResult], list[str]]:
    """The results that are of these params, and a line for each cell that has none.

    Variants that no stage runs count where their files are there.
    """
    results: list[CellResult] = []
    skipped: list[str] = []
    every = [*dict.fromkeys([*params.methods, *params.variants])]
    for cell in cells(params.model_copy(update={"methods": every})):
        path = result_file(root, params.profile, cell)
        if cell.method not in params.methods and not path.exists():
            continue
        try:
            result = read_result(path)
        except MissingResultError as error:
            skipped.append(str(error))
            continue
        if differing := fits(result, params):
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            skipped.append(f"{path}: {differing[0]}{more}; `dvc repro` makes it anew")
        else:
            results.append(result)
    return results, skipped

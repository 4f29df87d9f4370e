"""Every finished cell and module into MLflow, from the files of results; twice changes nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from nemo.config import Params
from nemo.report.collect import Results, collect
from nemo.results import CellResult
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
        skipped: a line for each cell or subset without results, and each file left out.
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

    The same files as for the report (`nemo.report.collect`). Runs of other params, and of earlier
    results, stay.

    Args:
        seconds: how long a store may take that does not answer; one that does is waited for.

    Raises:
        MissingResultError: there are no results, or a file is damaged or of other params.
        TrackingError: the store cannot be used, or MLflow is not installed.
    """
    results = collect(params, root)

    def write(patience: Patience) -> Store:
        store = Store.connect(root, patience)
        for result in results.cells:
            with store.alone():
                _put(store, results, result)
        store.show(views(results.cells))
        return store

    try:
        store = in_time(write, Patience(seconds))
    except ImportError:
        raise TrackingError(
            "MLflow is not installed: pip install 'nemo-modular[pipeline]'"
        ) from None
    except Exception as error:  # stores and clients raise their own kinds; a user needs one line
        raise TrackingError(f"MLflow: {one_line(error)}") from error
    return Summary(
        store.place,
        store.added,
        store.unchanged,
        [f"{name} has no results" for name in results.missing] + results.left_out,
        addresses(store.place, store.experiment),
    )


def publish_quietly(params: Params, root: Path = Path()) -> Summary | None:
    """`publish` for the end of a stage: it never raises, and warns once in one line instead."""
    try:
        return publish(params, root, QUIETLY)
    except Exception as error:  # whatever it is, the report is written and stays
        _log.warning("%s; `nemo publish` logs the results later", one_line(error))
        return None


def _put(store: Store, results: Results, result: CellResult) -> None:
    key = cell_key(result.profile, result.cell, result.params, result.data["sha256"])
    run_id = store.put(key, cell_record(results.subject(result)), store.runs(KEY, key))
    below = store.runs("mlflow.parentRunId", run_id) if result.modules else []
    for module in result.modules:
        record = module_record(results.subject(result, module), module, run_id)
        own = [run for run in below if run.data.tags.get("subset") == module.subset]
        store.put(f"{run_id}/{module.subset}", record, own)

"""Every finished cell and module into MLflow, from the files; doing it twice changes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo.config import Params
from nemo.report.results import CellResult, MissingResultError, read_cells
from nemo.tracking.records import cell_record, module_record
from nemo.tracking.store import Store, TrackingError, one_line


@dataclass
class Summary:
    """What `publish` did."""

    uri: str
    added: int = 0
    unchanged: int = 0
    skipped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        line = f"{self.uri}: {self.added} runs added or completed, {self.unchanged} unchanged"
        return "\n".join([line, *(f"skipped: {reason}" for reason in self.skipped)])


def publish(params: Params, root: Path = Path()) -> Summary:
    """Log every finished cell and module of `params` from the files under `root`.

    Publishing twice changes nothing. Runs of other params, and of earlier results, stay.

    Raises:
        MissingResultError: not one model has all its results.
        TrackingError: the store cannot be used, or MLflow is not installed.
    """
    results, skipped = _finished(params, root)
    if not results:
        raise MissingResultError(skipped[0])
    try:
        store = Store.connect(root)
        for result in results:
            run_id = store.put(cell_record(params, result.cell, root, result))
            for module in result.modules:
                store.put(module_record(params, result, module, run_id))
    except ImportError:
        raise TrackingError(
            "MLflow is not installed: pip install 'nemo-modular[pipeline]'"
        ) from None
    except Exception as error:  # stores and clients raise their own kinds; a user needs one line
        raise TrackingError(f"MLflow: {one_line(error)}") from error
    return Summary(store.uri, store.added, store.unchanged, skipped)


def _finished(params: Params, root: Path) -> tuple[list[CellResult], list[str]]:
    """The cells of every model that is complete, and why the others are not."""
    results: list[CellResult] = []
    skipped: list[str] = []
    for dataset in params.datasets:
        for model in params.models:
            try:
                results += list(read_cells(params, root, dataset, model))
            except MissingResultError as error:
                skipped.append(str(error))
    return results, skipped

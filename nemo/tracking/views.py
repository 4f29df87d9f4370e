"""Ready views of the MLflow UI, which by itself opens on an empty page and shows no metric (ours).

MLflow keeps a view that someone shares as a tag of the experiment, and opens it by the tag's name
(`viewStateShareKey`). Publishing writes three: the cells' table, charts that compare the cells, and
the modules' table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from nemo.results import CellResult
from nemo.tracking.records import objective_keys

TAG = "mlflow.sharedViewState."
LOCAL = "http://127.0.0.1:5000"  # where `make mlflow` serves a database
CELLS = ("accuracy", "nrr", "cohesion", "coupling", "parameters", "flops")
MODULES = ("accuracy", "accuracy_step0", "accuracy_standard", "parameters_ratio", "flops_ratio",
           "parameters", "flops", "certificate")  # fmt: skip
COMPARED = ("accuracy", "nrr", "coupling")


def views(results: Iterable[CellResult]) -> dict[str, str]:
    """{tag: value} of the experiment: the three views of these results."""
    keys = [objective_keys(result.params) for result in results]
    strengths = sorted({key for own in keys for key in own})
    sections = sorted({key.split(".")[0] for key in strengths})
    charts = [
        chart
        for section in sections
        for chart in _charts(section, [key for key in strengths if key.split(".")[0] == section])
    ]
    states = {
        "cells": _table("cell", CELLS, strengths),
        "modules": _table("module", MODULES, ["subset", *strengths])
        | {"orderByKey": "params.`subset`", "orderByAsc": True},  # by default below their cells
        "compare": _table("cell", CELLS, strengths)
        | {
            "searchFilter": "tags.role = 'cell' and tags.base != 'standard'",
            "compareRunCharts": charts,
            "compareRunSections": [
                {"uuid": s, "name": s, "display": True, "isReordered": True, "deleted": False,
                 "isGenerated": False, "columns": 2} for s in sections
            ],
        },
    }  # fmt: skip
    return {f"{TAG}nemo-{name}": json.dumps(state) for name, state in states.items()}


def addresses(uri: str, experiment: str) -> dict[str, str]:
    """{view: its address in the UI} of a server, or of what `make mlflow` serves."""
    server = uri.rstrip("/") if uri.startswith("http") else LOCAL
    base = f"{server}/#/experiments/{experiment}/runs?viewStateShareKey=nemo-"
    compare = f"{base}compare&compareRunsMode=CHART"
    return {"cells": f"{base}cells", "modules": f"{base}modules", "compare": compare}


def _table(role: str, metrics: Iterable[str], strengths: list[str]) -> dict[str, Any]:
    columns = [f"metrics.`{name}`" for name in metrics]
    columns += [f"params.`{key}`" for key in strengths]
    name = "attributes.`Run Name`"
    return {
        "searchFilter": f"tags.role = '{role}'",
        "selectedColumns": columns,
        "columnOrder": [name, *columns],
        "columnWidths": {name: 280},
        "runsHiddenMode": "SHOW_ALL",
    }


def _charts(section: str, strengths: list[str]) -> list[dict[str, Any]]:
    """All of an objective's settings and figures as parallel coordinates, then each pair."""
    about = {"metricSectionId": section, "deleted": False, "isGenerated": False}
    whole = {
        "type": "PARALLEL",
        "uuid": f"{section}-all",
        "selectedParams": strengths,
        "selectedMetrics": list(COMPARED),
        "showAllRuns": True,
        **about,
    }
    pairs = [
        {
            "type": "SCATTER",
            "uuid": f"{key}-{name}",
            "xaxis": {"key": key, "type": "PARAM"},
            "yaxis": {"key": name, "type": "METRIC"},
            "runsCountToCompare": 100,
            **about,
        }
        for key in strengths
        for name in COMPARED
    ]
    return [whole, *pairs]

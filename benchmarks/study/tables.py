"""The tables T1 to T4 and T7, from the units' files alone.

Accuracies are test accuracies in percent, at the last epoch (modules: at the epoch that validation
chose). `best test %` is the paper's protocol, the best test epoch, and serves only to compare with
published figures. Over seeds: mean +- standard deviation (n-1), differences paired by seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from nemo.files import read_json

Facts = dict[str, Any]
OBJECTIVES = (  # start of the unit's name, method, title
    ("vgg16", "nemo", "contrastive, equation"),
    ("vgg16-released", "nemo", "contrastive, released"),
    ("vgg16", "mwt", "MwT: cohesion + coupling"),
    ("vgg16-cohesion-only", "mwt", "cohesion only"),
    ("vgg16-coupling-only", "mwt", "coupling only"),
    ("vgg16-no-mask-loss", "mwt", "cross-entropy only"),
)


@dataclass(frozen=True)
class Table:
    """A table of the report; `keys` are the columns that name a row."""

    name: str
    title: str
    how: str
    keys: tuple[str, ...]
    frame: pd.DataFrame  # a row per seed


def read_units(folder: Path) -> dict[str, Facts]:
    """{unit: its facts}; what is there is what the tables show."""
    return {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}


def setting(units: dict[str, Facts]) -> str:
    """Data set, scale and class of machine of the units, in a sentence or two."""
    facts = next(iter(units.values()))
    about, params = facts["evaluation"]["dataset"], facts["params"]
    counts = ", ".join(f"{count:,} {split}" for split, count in about["counts"].items())
    machines = sorted({f["provenance"]["machine"] for f in units.values()})
    return (
        f"{about['title']}: {counts} images. Profile {params['profile']}: "
        f"{params['train']['epochs']['cnn']} epochs for CNNs, "
        f"{params['train']['epochs']['transformer']} for Transformers, modules fine-tuned for "
        f"{params['finetune']['epochs']['cnn']}. Machine: {'; '.join(machines)}."
    )


def tables(units: dict[str, Facts]) -> list[Table]:
    """Every table that the units at hand have rows for."""
    made = [
        Table(
            "T1-models",
            "Modular models",
            "Loss is the points lost against the standard model of the same seed (paired).",
            ("model", "method"),
            pd.DataFrame(_models(units)),
        ),
        Table(
            "T2-modules",
            "Modules and what else has their size, per class subset",
            "random, pruned and dense have at most the parameters of NeMo's module and the same "
            "fine-tuning; standard is the whole standard model with its logits restricted.",
            ("model", "subset", "kind"),
            pd.DataFrame(_modules(units)),
        ),
        Table(
            "T3-objectives",
            "What is minimised, on vgg16",
            "The loss on the masks that is added to cross-entropy.",
            ("objective",),
            pd.DataFrame(_objectives(units)),
        ),
        Table(
            "T4-sensitivity",
            "One knob at a time, on vgg16",
            "Everything else as in the profile.",
            ("method", "knob", "value"),
            pd.DataFrame(_sensitivity(units)),
        ),
        Table(
            "gap",
            "The mask gap, before fine-tuning",
            "Validation accuracy. soft: masks of each sample; binary: one mask, as in the module; "
            "mean: kept neurons scaled by their mean mask; + bn: BatchNorm re-estimated.",
            ("model", "method", "subset"),
            pd.DataFrame(_gap(units)),
        ),
    ]
    return [table for table in made if len(table.frame)]


def summarised(table: Table) -> pd.DataFrame:
    """The table over seeds: `mean +- sd` as text, and how many seeds there are."""
    groups = table.frame.groupby(list(table.keys), sort=False)
    values = table.frame.columns.drop([*table.keys, "seed"])
    values = [c for c in values if is_numeric_dtype(table.frame[c])]
    text = groups[values].agg(_spread)
    text.insert(0, "seeds", groups["seed"].nunique())
    return text.reset_index()


def _spread(column: pd.Series[float]) -> str:
    known = column.dropna()
    if known.empty:
        return ""
    mean = f"{known.mean():.4g}"
    return mean if len(known) == 1 else f"{mean} +- {known.std():.2g}"


def _models(units: dict[str, Facts]) -> Iterator[dict[str, Any]]:
    for facts in _plain(units):
        for row in facts["evaluation"]["cells"]:
            yield {"model": facts["evaluation"]["model"], **_cell(facts, row)}


def _cell(facts: Facts, row: dict[str, Any]) -> dict[str, Any]:
    """The figures of one training."""
    method = row["method"]
    standard = next(c for c in facts["evaluation"]["cells"] if c["method"] == "standard")
    return {
        "method": method,
        "seed": row["seed"],
        "accuracy %": 100 * row["accuracy"],
        "loss": None if row is standard else 100 * (standard["accuracy"] - row["accuracy"]),
        "best test %": 100 * max(e["test_accuracy"] for e in facts["history"][method]),
        **{key: row.get(key) for key in ("nrr", "cohesion", "coupling", "dead_layers")},
    }


def _modules(units: dict[str, Facts]) -> Iterator[dict[str, Any]]:
    for facts in _plain(units):
        evaluation = facts["evaluation"]
        parent = next(c for c in evaluation["cells"] if c["method"] == "standard")
        rows = {(m["method"], m["subset"]): m for m in evaluation["modules"]}
        for (method, subset), row in rows.items():
            history = facts["finetuning"][f"{method} {subset}"]
            best = max(epoch["test_accuracy"] for epoch in history)
            named = {"model": evaluation["model"], "subset": subset, "seed": row["seed"]}
            step0 = {"step 0 %": 100 * row["accuracy_step0"]}
            yield named | {"kind": method} | step0 | _size(row, parent, row["accuracy"], best)
            if method == "nemo":
                yield named | {"kind": "standard"} | _size(parent, parent, row["accuracy_standard"])
                for other in facts.get("baselines", []):
                    if other["subset"] == subset:
                        size = _size(other, parent, other["accuracy"], other["best_test_accuracy"])
                        yield named | {"kind": other["baseline"]} | size


def _size(
    row: dict[str, Any], parent: dict[str, Any], accuracy: float, best: float | None = None
) -> dict[str, Any]:
    return {
        "accuracy %": 100 * accuracy,
        "best test %": None if best is None else 100 * best,
        "parameters %": 100 * row["parameters"] / parent["parameters"],
        "FLOPs %": 100 * row["flops"] / parent["flops"],
    }


def _objectives(units: dict[str, Facts]) -> Iterator[dict[str, Any]]:
    for start, method, title in OBJECTIVES:
        for name, facts in units.items():
            if name.rpartition("-")[0] == start:
                row = next(c for c in facts["evaluation"]["cells"] if c["method"] == method)
                yield {**_cell(facts, row), "objective": title}


def _sensitivity(units: dict[str, Facts]) -> Iterator[dict[str, Any]]:
    base = units.get("vgg16-0")
    if base is None:
        return
    loss = base["params"]["loss"]
    knobs = {"loss.alpha": loss["alpha"]["cnn"], "loss.tau": loss["tau"]}
    for knob, usual in knobs.items():
        yield _knob(base, knob, usual)
        for facts in units.values():
            if knob in facts["changes"]:
                yield _knob(facts, knob, facts["changes"][knob])
    for row in base["thresholds"]:
        named = {"method": row["method"], "knob": "masks.threshold", "value": row["threshold"]}
        yield named | {"seed": 0} | {k: row[k] for k in ("nrr", "cohesion", "coupling")}


def _knob(facts: Facts, knob: str, value: float) -> dict[str, Any]:
    row = next(c for c in facts["evaluation"]["cells"] if c["method"] == "nemo")
    form = facts["params"]["loss"]["form"]
    return {**_cell(facts, row), "method": f"nemo, {form}", "knob": knob, "value": value}


def _gap(units: dict[str, Facts]) -> Iterator[dict[str, Any]]:
    for facts in _plain(units):
        seed = facts["evaluation"]["cells"][0]["seed"]
        for row in facts["gap"]:
            percent = {k: 100 * v for k, v in row.items() if k not in ("method", "subset")}
            named = {key: row[key] for key in ("method", "subset")}
            yield {"model": facts["evaluation"]["model"], "seed": seed} | named | percent


def _plain(units: dict[str, Facts]) -> Iterator[Facts]:
    """The units that follow the profile unchanged and have modules."""
    return (facts for facts in units.values() if not facts["changes"])

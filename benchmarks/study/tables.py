"""The tables T1 to T7, from the units' files alone.

Accuracies are test accuracies in percent, at the last epoch (modules: at the epoch that validation
chose). `best test %` is the paper's protocol, the best test epoch or the evaluation where that is
higher (on a GPU another batch size rounds otherwise), and serves only to compare with
published figures. Over seeds: mean +- standard deviation (n-1), differences paired by seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from benchmarks.study.plan import ALPHAS, MWT, PAIRS
from nemo.config import Params
from nemo.files import read_json
from nemo.report.published import published_rows
from nemo.report.words import shape_of

Facts = dict[str, Any]
Row = dict[str, Any]
OBJECTIVES = (  # start of the unit's name, method, title
    ("vgg16", "nemo", "contrastive, equation"),
    ("vgg16-released", "nemo", "contrastive, released"),
    ("vgg16", "mwt", "MwT: cohesion + coupling"),
    ("vgg16-cohesion-only", "mwt", "cohesion only"),
    ("vgg16-coupling-only", "mwt", "coupling only"),
    ("vgg16-no-mask-loss", "mwt", "cross-entropy only"),
)
PUBLISHED = {  # the paper's abstract, full scale
    column: float(next(row["value"] for row in published_rows() if row["metric"] == metric))
    for column, metric in (
        ("gain", "module accuracy gain"),
        ("size reduction %", "module size reduction"),
    )
}
KNOB = ("model", "knob", "method", "value")  # what names a row of T4


@dataclass(frozen=True)
class Table:
    """A table of the report; `keys` are the columns that name a row."""

    name: str
    title: str
    how: str
    keys: tuple[str, ...]
    frame: pd.DataFrame  # a row per seed


def read_units(folder: Path) -> dict[str, Facts]:
    """{unit: its facts}, of every file that is there."""
    return {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}


def setting(units: dict[str, Facts], times: dict[str, Facts]) -> str:
    """Data set, scale and class of machine of the units and timings, in a few sentences.

    Raises:
        ValueError: units of different images.
    """
    if len({facts["data_sha256"] for facts in units.values()}) > 1:
        raise ValueError("these units were computed on different images")
    facts = next(iter(plain_units(units)), next(iter(units.values())))
    about, params = facts["evaluation"]["dataset"], facts["params"]
    counts = ", ".join(f"{count:,} {split}" for split, count in about["counts"].items())
    machines = sorted({f["provenance"]["machine"] for f in units.values()})
    timed = sorted(
        f"{t['provenance']['machine']}, {t['provenance']['threads']} threads"
        for t in times.values()
    )
    clock = f" Times, where there are any: {'; '.join(dict.fromkeys(timed))}." if timed else ""
    shapes = dict.fromkeys(
        shape_of(Params.model_validate(f["params"]), f["evaluation"]["model"])
        for f in units.values()
    )
    return (
        f"{about['title']}: {counts} images. Models: {'; '.join(shapes)}. "
        f"Recipe: profiles/{params['profile'].removesuffix('-repro')}.yaml, "
        f"{params['train']['epochs']['cnn']} epochs for CNNs, "
        f"{params['train']['epochs']['transformer']} for Transformers, modules fine-tuned for "
        f"{params['finetune']['epochs']['cnn']}. Computed on: {'; '.join(machines)}.{clock}"
    )


def tables(units: dict[str, Facts], times: dict[str, Facts]) -> list[Table]:
    """Every table that the units and timings at hand have rows for."""
    made = [
        Table(
            "T1-models",
            "T1. Modular models",
            "Loss: points lost against the standard model of the same seed (paired). CPU time: of "
            "a training step over the standard one's, from T6 (one machine, one seed's model).",
            ("model", "method"),
            pd.DataFrame(_models(units, times)),
        ),
        Table(
            "T2-modules",
            "T2. Modules and what else has their size, per class subset",
            "random, pruned and dense have at most the parameters of NeMo's module and the epochs "
            "of its fine-tuning; nemo, mwt and pruned were trained on all classes before, random "
            "and dense begin with it. random's weights are drawn as torch's layers draw them, "
            "dense's as the model does (vgg16's classifier: N(0, .01), which learns slowly at "
            "first); pruned has one ratio for all layers. `nemo, mean` is NeMo's module with mean "
            "masks in its weights; standard is the whole standard model with its logits "
            "restricted to the subset, and tuned is fine-tuned as modules are. best test: of the "
            "fine-tuned epochs. CPU times are of the first seed's modules.",
            ("model", "subset", "kind"),
            pd.DataFrame(_modules(units, times)),
        ),
        Table(
            "T3-objectives",
            "T3. What is minimised, on vgg16",
            "The loss on the masks that is added to cross-entropy. Pairs: fine-tuned modules of "
            f"{' and '.join(PAIRS)}, mean.",
            ("objective",),
            pd.DataFrame(_objectives(units)),
        ),
        Table(
            "T4-sensitivity",
            "T4. One knob at a time",
            "Everything else as in the profile, which is to have the alpha, and the factor of "
            "MwT's published weights, that keep the fewest neurons among those that lose at most "
            "3 points of validation accuracy. Published: accuracy in the authors' sweep of a CNN "
            "that they do not name, 200 epochs, tau at alpha 1.4; its trend is what compares. "
            "Their figures of masks are of training batches and do not stand here.",
            KNOB,
            pd.DataFrame(sorted(_sensitivity(units), key=itemgetter(*KNOB))),
        ),
        Table(
            "T5-granularity",
            "T5. Neurons against whole attention heads and MLP blocks",
            "Class masks at two thresholds; `heads` has at most the parameters of `neurons`, and "
            "the same fine-tuning.",
            ("model", "subset", "threshold", "granularity"),
            pd.DataFrame(_granularity(units)),
        ),
        Table(
            "T6-costs",
            "T6. What it costs",
            "On a quiet machine, batch 128. Training steps: medians of steps that took turns, "
            "ratio over the standard one's. Others: in a process of their own, one call, and the "
            "mean of 9 steps for fine-tuning. Peak: growth of the resident set over two training "
            "steps with the optimizer's state, or over the call; of fine-tuning, over its first "
            "step.",
            ("model", "what", "subset"),
            pd.DataFrame(_costs(times)),
        ),
        Table(
            "T7-headline",
            "T7. NeMo against MwT, modules",
            "Mean over class subsets. Gain: points of module accuracy over MwT's (published, mean "
            f"of models at full scale: {PUBLISHED['gain']}); size reduction: of its parameters "
            f"(published: {PUBLISHED['size reduction %']} %). "
            "Loss: points that the whole modular model lost against the standard one; a stronger "
            "loss on the masks makes smaller and less accurate modules, and the two methods' are "
            "not equally strong.",
            ("model",),
            pd.DataFrame(_headline(units)),
        ),
        Table(
            "alternatives",
            "NeMo's modules against alternatives",
            "Points of test accuracy that NeMo's fine-tuned module has over the alternative, mean "
            "over class subsets, and in how many of them it is ahead. All have at "
            "most its parameters, and FLOPs of their own, but the standard model, `whole` with its "
            "logits restricted and `tuned` on the subset besides.",
            ("model", "alternative"),
            pd.DataFrame(_alternatives(units)),
        ),
        Table(
            "gap",
            "The mask gap, before fine-tuning",
            "Validation accuracy. soft: masks of each sample; binary: one mask, as in the module; "
            "mean: kept neurons scaled by their mean mask; + bn: BatchNorm re-estimated; low "
            "threshold: .5 instead of the profile's. First seed of the CNNs.",
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
    shapes = {column: _format(table.frame[column]) for column in values}
    text = pd.DataFrame({c: groups[c].agg(_spread, shape) for c, shape in shapes.items()})
    text.insert(0, "seeds", groups["seed"].nunique())
    text.insert(1, "device", groups["device"].agg(lambda used: ", ".join(sorted(set(used)))))
    return text.reset_index()


def _format(column: pd.Series[float]) -> str:
    """One for a whole column: shares to a thousandth, all else to 4 digits or so."""
    known = column.dropna()
    if (known == known.round()).all():
        return ".1f"
    largest = known.abs().max()
    return ".3f" if largest <= 1 else ".2f" if largest < 100 else ".1f"


def _spread(column: pd.Series[float], shape: str) -> str:
    known = column.dropna()
    if known.empty:
        return ""
    mean = f"{known.mean():{shape}}"
    return mean if len(known) == 1 else f"{mean} +- {known.std():{shape}}"


def _models(units: dict[str, Facts], times: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        timed = times[facts["unit"]]["training"] if facts["unit"] in times else ()
        ratios = {row["method"]: row["ratio"] for row in timed}
        for row in facts["evaluation"]["cells"]:
            named = {"model": facts["evaluation"]["model"]}
            yield named | _cell(facts, row) | {"CPU time": ratios.get(row["method"])}


def _device(facts: Facts) -> str:
    return "CPU" if facts["params"]["device"] == "cpu" else "GPU"


def _cell(facts: Facts, row: Row) -> Row:
    """The figures of one training."""
    method = row["method"]
    standard = next(c for c in facts["evaluation"]["cells"] if c["method"] == "standard")
    return {
        "method": method,
        "seed": row["seed"],
        "device": _device(facts),
        "accuracy %": 100 * row["accuracy"],
        "loss": None if row is standard else 100 * (standard["accuracy"] - row["accuracy"]),
        "best test %": 100
        * max(row["accuracy"], *(e["test_accuracy"] for e in facts["history"][method])),
        **{key: row.get(key) for key in ("nrr", "cohesion", "coupling", "dead_layers")},
    }


def _modules(units: dict[str, Facts], times: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        evaluation = facts["evaluation"]
        parent = next(c for c in evaluation["cells"] if c["method"] == "standard")
        latency = _latencies(times.get(facts["unit"]))
        rows = {(m["method"], m["subset"]): m for m in evaluation["modules"]}
        for (method, subset), row in rows.items():
            history = facts["finetuning"][f"{method} {subset}"]
            best = max(epoch["test_accuracy"] for epoch in history)
            named = {"model": evaluation["model"], "subset": subset, "seed": row["seed"]}
            named["device"] = _device(facts)
            took = latency.get((method, subset), {})
            whole = parent | {"accuracy": row["accuracy_standard"], "accuracy_step0": None}
            yield named | {"kind": method} | _beside(row, whole, best) | took
            if method == "nemo":
                yield (
                    named
                    | {"kind": "standard"}
                    | _beside(whole, whole)
                    | latency.get(("standard", "all"), {})
                )
                for other in facts.get("baselines", []):
                    if other["subset"] == subset:
                        best = other["best_test_accuracy"]
                        yield named | {"kind": other["baseline"]} | _beside(other, whole, best)


def _latencies(times: Facts | None) -> dict[tuple[str, str], Row]:
    found: dict[tuple[str, str], Row] = {}
    for row in times["latency"] if times else ():
        key = (row["method"], row["subset"])
        took = found.setdefault(key, {})
        took[f"CPU ms, batch {row['batch']}"] = row["ms"]
        took[f"CPU time, batch {row['batch']}, %"] = 100 * row["ratio"]
    return found


def _beside(row: Row, standard: Row, best: float | None = None) -> Row:
    """The figures of one module and, in percent, of the `standard` model on the same classes."""
    step0 = row["accuracy_step0"]
    return {
        **_module(row, standard, best),
        "step 0, % of standard": None if step0 is None else 100 * step0 / standard["accuracy"],
        "accuracy, % of standard": 100 * row["accuracy"] / standard["accuracy"],
        "parameters, k": row["parameters"] / 1000,
        "MFLOPs": row["flops"] / 1e6,
    }


def _module(row: Row, parent: Row, best: float | None = None) -> Row:
    step0 = row["accuracy_step0"]
    return {
        "step 0 %": None if step0 is None else 100 * step0,
        "accuracy %": 100 * row["accuracy"],
        "best test %": None if best is None else 100 * max(best, row["accuracy"]),
        "parameters %": 100 * row["parameters"] / parent["parameters"],
        "FLOPs %": 100 * row["flops"] / parent["flops"],
    }


def _objectives(units: dict[str, Facts]) -> Iterator[Row]:
    for start, method, title in OBJECTIVES:
        for name, facts in units.items():
            if name.rpartition("-")[0] == start:
                cells, modules = facts["evaluation"]["cells"], facts["evaluation"]["modules"]
                row = next(c for c in cells if c["method"] == method)
                pairs = [m for m in modules if m["method"] == method and m["subset"] in PAIRS]
                yield {
                    **_cell(facts, row),
                    "objective": title,
                    "pairs, accuracy %": 100 * fmean(m["accuracy"] for m in pairs),
                    "pairs, parameters %": 100 * fmean(m["parameters_ratio"] for m in pairs),
                }


def _published_sweep() -> dict[tuple[str, float, float], float]:
    """{(model, alpha, tau): accuracy of the modular model in percent}; vgg16 stands for CNNs."""
    return {
        ("vgg16", float(found[1]), float(found[2])): float(row["value"])
        for row in published_rows()
        if row["metric"] == "modular model accuracy"
        and (found := re.search(r"alpha ([\d.]+), tau ([\d.]+)$", row["setting"]))
    }


def _sensitivity(units: dict[str, Facts]) -> Iterator[Row]:
    published = _published_sweep()
    for name, facts in units.items():
        model, params = facts["evaluation"]["model"], facts["params"]
        changes = facts["changes"]
        if model not in ALPHAS or params["seeds"] != [0]:
            continue
        if "-mwt-" in name:
            factor = changes["mwt.alpha"] / MWT[model][0]
            yield _knob(facts, "mwt", "mwt.alpha and mwt.beta, x", factor)
        elif "loss.alpha" in changes:
            alpha = changes["loss.alpha"]
            row = _knob(facts, "nemo", "loss.alpha", alpha)
            yield row | {"published %": published.get((model, alpha, 0.2))}
        elif set(changes) <= {"loss.tau", "loss.form"}:
            tau = params["loss"]["tau"]
            row = _knob(facts, "nemo", "loss.tau", tau)
            yield row | {"published %": published.get((model, 1.4, tau))}
        for row in facts["thresholds"] if not changes else ():
            named = {"model": model, "method": row["method"], "knob": "masks.threshold"}
            named |= {"value": row["threshold"], "seed": 0, "device": _device(facts)}
            yield named | {key: row[key] for key in ("nrr", "cohesion", "coupling")}


def _knob(facts: Facts, method: str, knob: str, value: float) -> Row:
    cells = {c["method"]: c for c in facts["evaluation"]["cells"]}
    lost = cells["standard"]["val_accuracy"] - cells[method]["val_accuracy"]
    form = f", {facts['params']['loss']['form']}" if method == "nemo" else ""
    return {
        **_cell(facts, cells[method]),
        "model": facts["evaluation"]["model"],
        "method": f"{method}{form}",
        "knob": knob,
        "value": value,
        "validation %": 100 * cells[method]["val_accuracy"],
        "loss, validation": 100 * lost,
    }


def _granularity(units: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        cells = facts["evaluation"]["cells"]
        parent = next(c for c in cells if c["method"] == "standard")
        for row in facts.get("granularity", []):
            named = {key: row[key] for key in ("subset", "threshold", "granularity")}
            named |= {"model": facts["evaluation"]["model"], "seed": parent["seed"]}
            named["device"] = _device(facts)
            yield named | _module(row, parent, row["best_test_accuracy"])


def _costs(times: dict[str, Facts]) -> Iterator[Row]:
    for name, facts in times.items():
        model, _, seed = name.rpartition("-")
        named = {"model": model, "seed": int(seed), "subset": "", "device": "CPU"}
        for row in facts["training"]:
            what = {"what": f"training step, {row['method']}", "ms": row["ms"]}
            yield named | what | {"ratio": row["ratio"], "peak MB": row["peak_mb"]}
        for row in facts["operations"]:
            what = {"what": row["what"], "subset": row.get("subset", "")}
            ms = 1000 * row["seconds"]
            yield named | what | {"ms": ms, "peak MB": row.get("peak_mb")}


def _headline(units: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        rows = facts["evaluation"]["modules"]
        cells = {c["method"]: c["accuracy"] for c in facts["evaluation"]["cells"]}
        mwt, nemo = ({m["subset"]: m for m in rows if m["method"] == k} for k in ("mwt", "nemo"))
        reached = {f"{m['method']} {m['subset']}": m["accuracy"] for m in rows}
        best = {
            key: max(reached[key], *(epoch["test_accuracy"] for epoch in history))
            for key, history in facts["finetuning"].items()
        }
        yield {
            "model": facts["evaluation"]["model"],
            "seed": rows[0]["seed"],
            "device": _device(facts),
            "gain": 100 * fmean(nemo[s]["accuracy"] - mwt[s]["accuracy"] for s in nemo),
            "gain, best test": 100 * fmean(best[f"nemo {s}"] - best[f"mwt {s}"] for s in nemo),
            "size reduction %": 100
            * (1 - fmean(nemo[s]["parameters"] / mwt[s]["parameters"] for s in nemo)),
            "nemo, parameters %": 100 * fmean(m["parameters_ratio"] for m in nemo.values()),
            "mwt, parameters %": 100 * fmean(m["parameters_ratio"] for m in mwt.values()),
            "nemo, loss": 100 * (cells["standard"] - cells["nemo"]),
            "mwt, loss": 100 * (cells["standard"] - cells["mwt"]),
        }


def _alternatives(units: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        modules = {m["subset"]: m for m in facts["evaluation"]["modules"] if m["method"] == "nemo"}
        others: dict[str, dict[str, float]] = {}
        flops: dict[str, float] = {}
        for row in facts.get("baselines", []):
            others.setdefault(row["baseline"], {})[row["subset"]] = row["accuracy"]
        for name in others:
            flops[name] = 100 * fmean(
                row["flops"] / modules[row["subset"]]["flops"]
                for row in facts["baselines"]
                if row["baseline"] == name
            )
        flops["standard, whole"] = 100 * fmean(1 / m["flops_ratio"] for m in modules.values())
        whole = {subset: m["accuracy_standard"] for subset, m in modules.items()}
        others["standard, whole"] = whole
        for name, accuracies in others.items():
            ahead = [100 * (modules[s]["accuracy"] - accuracies[s]) for s in modules]
            yield {
                "model": facts["evaluation"]["model"],
                "alternative": name,
                "seed": next(iter(modules.values()))["seed"],
                "device": _device(facts),
                "nemo ahead, points": fmean(ahead),
                "worst subset": min(ahead),
                "best subset": max(ahead),
                "FLOPs, % of nemo's": flops[name],
                "subsets ahead": sum(points > 0 for points in ahead),
                "subsets": len(ahead),
            }


def _gap(units: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        seed = facts["evaluation"]["cells"][0]["seed"]
        for row in facts.get("gap", []):
            percent = {k: 100 * v for k, v in row.items() if k not in ("method", "subset")}
            named = {key: row[key] for key in ("method", "subset")}
            named |= {"seed": seed, "device": _device(facts)}
            yield {"model": facts["evaluation"]["model"]} | named | percent


def plain_units(units: dict[str, Facts]) -> Iterator[Facts]:
    """The units that follow the profile unchanged and have modules."""
    return (facts for facts in units.values() if not facts["changes"])

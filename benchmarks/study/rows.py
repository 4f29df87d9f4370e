"""The rows of the tables T1 to T7, one per seed, from the units' files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from benchmarks.study.plan import ALPHAS, MWT, PAIRS
from nemo.report.published import published_rows

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


def models(units: dict[str, Facts], times: dict[str, Facts]) -> Iterator[Row]:
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


def modules(units: dict[str, Facts], times: dict[str, Facts]) -> Iterator[Row]:
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


def objectives(units: dict[str, Facts]) -> Iterator[Row]:
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


def sensitivity(units: dict[str, Facts]) -> Iterator[Row]:
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


def granularity(units: dict[str, Facts]) -> Iterator[Row]:
    for facts in plain_units(units):
        cells = facts["evaluation"]["cells"]
        parent = next(c for c in cells if c["method"] == "standard")
        for row in facts.get("granularity", []):
            named = {key: row[key] for key in ("subset", "threshold", "granularity")}
            named |= {"model": facts["evaluation"]["model"], "seed": parent["seed"]}
            named["device"] = _device(facts)
            yield named | _module(row, parent, row["best_test_accuracy"])


def costs(times: dict[str, Facts]) -> Iterator[Row]:
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


def headline(units: dict[str, Facts]) -> Iterator[Row]:
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


def alternatives(units: dict[str, Facts]) -> Iterator[Row]:
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


def gap(units: dict[str, Facts]) -> Iterator[Row]:
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

"""The rows of every table, one per seed, from finished results alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean

from nemo.metrics import measured
from nemo.report.collect import Results
from nemo.report.published import published_rows
from nemo.report.variants import forms, turns
from nemo.results import CellResult, ModuleResult, Row

AGAINST = "mwt"  # the method that the headline compares all others with
MODULE = "module"  # the competitor that the others of a table of budgets are compared with
WHOLE = "standard"  # the alternative that every module has: the whole standard model


def models(results: Results) -> Iterator[Row]:
    """T1: a row per cell."""
    for result in results.listed():
        yield _named(result) | measured(results.subject(result))


def modules(results: Results) -> Iterator[Row]:
    """T2: a row per module, per alternative to it, and for the standard model of each subset."""
    subsets = list(results.params.subsets)
    for dataset, model in _models(results):
        rows = list(_modules_of(results, results.of(dataset, model)))
        yield from sorted(rows, key=lambda row: subsets.index(row["subset"]))


def _modules_of(results: Results, cells: list[CellResult]) -> Iterator[Row]:
    for result in cells:
        named = _named(result)
        if not result.modular:
            parts = [(part, "") for part in _standard_parts(results, result)]
        else:
            parts = [(module, "") for module in result.modules]
            parts += [
                (ModuleResult(row["subset"], row, []), row["alternative"])
                for row in result.extras.get("alternatives", [])
            ]
        for part, alternative in parts:
            row = {"subset": part.subset, "alternative": alternative}
            yield named | row | measured(results.subject(result, part, alternative))


def _standard_parts(results: Results, result: CellResult) -> Iterator[ModuleResult]:
    """A standard model restricted to the classes of each subset that has a module."""
    cell = result.cell
    cut = {m.subset: m for r in results.of(cell.dataset, cell.model) for m in r.modules}
    for subset, accuracy in result.subsets.items():
        if subset in cut:
            whole = {key: result.metrics[key] for key in ("parameters", "flops")}
            about = {"classes": cut[subset].metrics["classes"], "accuracy": accuracy}
            yield ModuleResult(subset, whole | about, [])


def objectives(results: Results) -> Iterator[Row]:
    """T3: what each form of an objective does; modules are those that all of them have."""
    for dataset, model in _models(results):
        compared = forms(results, dataset, model)
        subsets = [{m.subset for m in result.modules} for result, _ in compared]
        common = set.intersection(*subsets) if subsets else set()
        for result, changes in compared:
            row = _named(result) | {"changes": changes} | measured(results.subject(result))
            own = [
                measured(results.subject(result, m)) for m in result.modules if m.subset in common
            ]
            if own:
                row["module_accuracy"] = fmean(m["accuracy"] for m in own)
                row["module_parameters_ratio"] = _mean(m["parameters_ratio"] for m in own)
            yield row


def sensitivity(results: Results) -> Iterator[Row]:
    """T4: one knob at a time, and the class masks' figures at every threshold."""
    published = _published_sweep()
    rows = []
    for dataset, model in _models(results):
        for turn in turns(results, dataset, model):
            result, standard = turn.result, results.beside(turn.result, WHOLE)
            row = _named(result) | measured(results.subject(result))
            row |= {"method": turn.series, "knob": turn.knob, "value": turn.value}
            if standard is not None:
                lost = standard.metrics["val_accuracy"] - result.metrics["val_accuracy"]
                row["val_loss_points"] = 100 * lost
            if result.family == "cnn" and re.match(r"CIFAR-10(?!\d)", result.data["title"]):
                row["published_accuracy"] = published.get((turn.knob, turn.value))
            rows.append(row)
        for result in results.of(dataset, model, every=True):
            for at in result.extras.get("thresholds", []):
                row = {"knob": "masks.threshold", "value": at["threshold"]}
                rows.append(_named(result) | row | at)
    places = {name: place for place, name in enumerate(dict.fromkeys(r["model"] for r in rows))}
    rows.sort(key=lambda r: (r["dataset"], places[r["model"]], r["knob"], r["method"], r["value"]))
    for row in rows:
        yield row | {"value": f"{row['value']:g}"}


def _published_sweep() -> dict[tuple[str, float], float]:
    """{(knob, value): accuracy of the modular model} in the authors' sweep of a CNN.

    Alpha at their tau .2, tau at their alpha 1.4.
    """
    found: dict[tuple[str, float], float] = {}
    for row in published_rows():
        pair = re.search(r"alpha ([\d.]+), tau ([\d.]+)$", row["setting"])
        if row["metric"] == "modular model accuracy" and pair:
            alpha, tau, accuracy = float(pair[1]), float(pair[2]), float(row["value"]) / 100
            if tau == 0.2:
                found["loss.alpha", alpha] = accuracy
            if alpha == 1.4:
                found["loss.tau", tau] = accuracy
    return found


def granularity(results: Results) -> Iterator[Row]:
    """T5: neurons against whole heads, per threshold of the class masks."""
    for result in results.listed():
        for row in result.extras.get("granularity", []):
            named = {key: row[key] for key in ("subset", "granularity")}
            named["threshold"] = f"{row['threshold']:g}"
            part = ModuleResult(row["subset"], row, [])
            subject = results.subject(result, part, row["granularity"])
            yield _named(result) | measured(subject) | named


def costs(results: Results) -> Iterator[Row]:
    """T6: training steps and the other operations, as `benchmarks.times` measured them."""
    for (dataset, model, seed), times in results.times.items():
        named = {"dataset": dataset, "model": model, "seed": seed, "device": "CPU"}
        for row in times["training"]:
            what = {"what": f"training step, {row['method']}", "subset": ""}
            yield named | what | row
        for row in times["operations"]:
            yield named | {"subset": ""} | row | {"ms": 1000 * row["seconds"]}


def headline(results: Results) -> Iterator[Row]:
    """T7: the modules of each method against those of `AGAINST`, mean over subsets."""
    for result in results.listed():
        other = results.beside(result, AGAINST)
        if not result.modules or result.cell.method == AGAINST or other is None:
            continue
        mine, theirs = ({m["subset"]: m for m in _measured(results, r)} for r in (result, other))
        pairs = [(mine[subset], theirs[subset]) for subset in mine if subset in theirs]
        if not pairs:
            continue
        best = [(a["best_test_accuracy"], b["best_test_accuracy"]) for a, b in pairs]
        watched = all(None not in pair for pair in best)
        loss, against = (measured(results.subject(r))["loss_points"] for r in (result, other))
        yield _named(result) | {
            "against": AGAINST,
            "gain_points": 100 * fmean(a["accuracy"] - b["accuracy"] for a, b in pairs),
            "gain_best_test_points": 100 * fmean(a - b for a, b in best) if watched else None,
            "size_reduction": 1 - fmean(a["parameters"] / b["parameters"] for a, b in pairs),
            "parameters_ratio": _mean(a["parameters_ratio"] for a, _ in pairs),
            "against_parameters_ratio": _mean(b["parameters_ratio"] for _, b in pairs),
            "loss_points": loss,
            "against_loss_points": against,
        }


def _measured(results: Results, result: CellResult) -> list[Row]:
    return [{"subset": m.subset} | measured(results.subject(result, m)) for m in result.modules]


def alternatives(results: Results) -> Iterator[Row]:
    """Points that modules are ahead of each alternative, over subsets."""
    for result in results.listed():
        modules = {m.subset: m.metrics for m in result.modules}
        others: dict[str, dict[str, Row]] = {}
        for row in result.extras.get("alternatives", []):
            others.setdefault(row["alternative"], {})[row["subset"]] = row
        standard = results.beside(result, WHOLE)
        if result.cell.method in results.params.alternatives.of and standard is not None:
            flops = standard.metrics["flops"]
            others[WHOLE] = {
                s: {"accuracy": a, "flops": flops} for s, a in standard.subsets.items()
            }
        for name, rows in others.items():
            pairs = [(modules[subset], rows[subset]) for subset in modules if subset in rows]
            ahead = [100 * (mine["accuracy"] - its["accuracy"]) for mine, its in pairs]
            if ahead:
                yield _named(result) | {
                    "alternative": name,
                    "ahead_points": fmean(ahead),
                    "worst_points": min(ahead),
                    "best_points": max(ahead),
                    "flops_ratio": fmean(its["flops"] / mine["flops"] for mine, its in pairs),
                    "subsets_ahead": sum(points > 0 for points in ahead),
                    "subsets": len(ahead),
                }


def budgets(results: Results) -> Iterator[Row]:
    """T8: accuracy after each budget of fine-tuning, and how far the module is ahead."""
    for result in results.listed():
        groups: dict[tuple[str, float], dict[str, dict[str, Row]]] = {}
        for row in result.extras.get("budgets", []):
            group = groups.setdefault((row["equal"], row["epochs"]), {})
            group.setdefault(row["competitor"], {})[row["subset"]] = row
        for row in result.extras.get("budgets", []):
            group, subset = groups[row["equal"], row["epochs"]], row["subset"]
            mine = group[MODULE][subset]["accuracy"]
            rival = _best_rival(group) if row["competitor"] == MODULE else row["competitor"]
            its = group[rival][subset]["accuracy"] if rival else None
            named = _named(result) | row | {"epochs": f"{row['epochs']:g}"}
            named["ahead_points"] = None if its is None else 100 * (mine - its)
            yield named | {"device": _device(row["device"])}


def _best_rival(group: dict[str, dict[str, Row]]) -> str:
    """The competitor of at most the module's size that has the best mean accuracy over all of its
    subsets; empty where there is none."""
    mine = group[MODULE]
    means = {
        name: fmean(row["accuracy"] for row in rows.values())
        for name, rows in group.items()
        if name != MODULE
        and all(row["accuracy"] is not None for row in rows.values())
        and all(row[row["equal"]] <= mine[s][row["equal"]] for s, row in rows.items())
    }
    return max(means, key=lambda name: means[name], default="")


def gap(results: Results) -> Iterator[Row]:
    """Validation accuracy of soft, binary and mean masks, before fine-tuning."""
    for result in results.listed():
        for row in result.extras.get("gap", []):
            named = {k.replace(" + bn", "_bn").replace(", low threshold", "_low"): v
                     for k, v in row.items()}  # fmt: skip
            yield _named(result) | named


def _models(results: Results) -> Iterator[tuple[str, str]]:
    for dataset in results.datasets:
        for model in results.models(dataset):
            yield dataset, model


def _named(result: CellResult) -> Row:
    return asdict(result.cell) | {
        "device": _device(result.made.get("trained", {}).get("device", ""))
    }


def _device(name: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU"}.get(name, name)


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

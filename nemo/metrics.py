"""Every number that is shown, compared or logged, once: name, header, format, tolerance (ours).

Tables T1 and T2, `nemo report --check` and MLflow all read this list. A metric of a cell or of a
module is one function behind one decorator; a plugin adds its own in the same way. It gets a
`Subject` and returns a number, or None where it does not apply. This module imports no torch and
no pandas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from nemo import forms as f
from nemo.forms import EXACT, Form, Tolerance, percent, plain, points
from nemo.results import CellResult, ModuleResult, Row


@dataclass(frozen=True)
class Subject:
    """What a metric is measured of: a cell, or where `module` is given, a module of the cell.

    Attributes:
        standard: the standard model of the same data set, model and seed, if it has results.
        times: {metric: value} that the benchmark of times measured of it; often empty.
        alternative: what `module` is where it is not the cell's own, such as `pruned`.
    """

    cell: CellResult
    standard: CellResult | None = None
    module: ModuleResult | None = None
    times: Row = field(default_factory=dict)
    alternative: str = ""

    @property
    def scope(self) -> str:
        return "cell" if self.module is None else "module"


Value = Callable[[Subject], "float | None"]


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        name: its column in the CSV files.
        header: what tables show above it; a metric without one is in the CSV only.
        scope: `cell` (T1), `module` (T2), or the table whose rows have it.
        value: how it is found; None where the rows of its table are made as a whole.
        mlflow: its key in MLflow; None is the name, an empty text keeps it out.
        worst: whether the largest value over seeds is shown and not the mean: it is a bound.
        ratio: the metric whose percentage stands behind it in brackets.
        middle: whether the median over subsets and seeds is shown, not the mean: it has outliers.
    """

    name: str
    header: str = ""
    form: Form = plain
    tolerance: Tolerance = EXACT
    scope: str = "cell"
    value: Value | None = None
    mlflow: str | None = None
    worst: bool = False
    ratio: str = ""
    middle: bool = False

    @property
    def integer(self) -> bool:
        """Whether it counts something."""
        return self.form in (f.count, f.whole)


METRICS: dict[tuple[str, str], Metric] = {}


def metric(name: str, scope: str, **about: Any) -> Callable[[Value], Value]:
    """Register a function of a `Subject` as a metric of `cell` or `module`.

    Args:
        about: the other attributes of `Metric`.

    Raises:
        ValueError: there is a metric of that name and scope.
    """

    def add(value: Value) -> Value:
        _add(Metric(name, scope=scope, value=value, **about))
        return value

    return add


def _add(entry: Metric) -> None:
    if (entry.scope, entry.name) in METRICS:
        raise ValueError(f"metric {entry.name!r} of a {entry.scope} exists already")
    METRICS[entry.scope, entry.name] = entry


def metrics_of(scope: str) -> list[Metric]:
    """The metrics of a scope, in the order of their columns."""
    return [entry for entry in METRICS.values() if entry.scope == scope]


def measured(subject: Subject) -> Row:
    """{name: value or None} of every metric of the subject's scope."""
    found = metrics_of(subject.scope)
    return {entry.name: entry.value(subject) for entry in found if entry.value is not None}


def logged(subject: Subject) -> dict[str, float]:
    """{key in MLflow: value}, of the metrics that the subject has."""
    values = measured(subject)
    keys = {entry.name: entry.mlflow for entry in metrics_of(subject.scope)}
    return {
        keys[name] or name: float(value)
        for name, value in values.items()
        if value is not None and keys[name] != ""
    }


def _kept(key: str) -> Value:
    """A value that the file of results or of times has under that key."""
    return lambda of: of.times.get(key, (of.module or of.cell).metrics.get(key))


def _lost(key: str) -> Value:
    """Points lost against the standard model of the same seed."""

    def value(of: Subject) -> float | None:
        if of.standard is None or not of.cell.modular:
            return None
        return 100 * float(of.standard.metrics[key] - of.cell.metrics[key])

    return value


def _best_test(of: Subject) -> float | None:
    """The paper's protocol: the best epoch on the test images, where they were watched."""
    part = of.module or of.cell
    watched = [row["test_accuracy"] for row in part.history if "test_accuracy" in row]
    if best := part.metrics.get("best_test_accuracy"):
        watched.append(best)
    return max(part.metrics["accuracy"], *watched) if watched else None


def _whole_standard(of: Subject) -> float | None:
    return None if of.standard is None else of.standard.subsets.get(_module(of).subset)


def _whole_modular(of: Subject) -> float | None:
    modular = of.cell.modular and not of.alternative
    return of.cell.subsets.get(_module(of).subset) if modular else None


def _module(of: Subject) -> ModuleResult:
    assert of.module is not None
    return of.module


def _of_standard(key: str) -> Value:
    """A module's accuracy or size over that of the standard model for the same classes."""

    def value(of: Subject) -> float | None:
        mine = _module(of).metrics.get(key)
        if mine is None or of.standard is None:
            return None
        size = key in ("parameters", "flops")
        theirs = of.standard.metrics[key] if size else _whole_standard(of)
        return float(mine / theirs) if theirs else None

    return value


def _classes(of: Subject) -> float | None:
    classes = _module(of).metrics.get("classes")
    return None if classes is None else len(classes)


def _register(scope: str, *entries: Metric) -> None:
    for entry in entries:
        value = entry.value
        if value is None and scope in ("cell", "module"):
            value = _kept(entry.name)
        _add(replace(entry, scope=scope, value=value))


_register(
    "cell",
    Metric("accuracy", "Accuracy %", percent, f.ACCURACY),
    Metric("loss_points", "Loss, points", points, f.LOST, value=_lost("accuracy")),
    Metric("best_test_accuracy", "Best test %", percent, f.ACCURACY, value=_best_test),
    Metric("val_accuracy", "Validation %", percent, f.ACCURACY),
    Metric("nrr", "NRR", plain, f.MASKS),
    Metric("cohesion", "Cohesion", plain, f.MASKS),
    Metric("coupling", "Coupling", plain, f.MASKS),
    Metric("dead_layers", "Dead layers", f.whole, f.DEAD),
    Metric("layers", form=f.whole),
    Metric("neurons", form=f.whole),
    Metric("parameters", "Parameters", f.count),
    Metric("generator_parameters", form=f.whole),
    Metric("flops", "FLOPs", f.count),
    Metric("epochs", form=f.whole),
    Metric("cpu_time", "CPU time", mlflow=""),
)
_register(
    "module",
    Metric("classes", form=f.whole, value=_classes),
    Metric("accuracy_standard", "Standard", percent, f.SUBSET, value=_whole_standard),
    Metric("accuracy_modular", "Modular", percent, f.SUBSET, value=_whole_modular),
    Metric("accuracy_step0", "Step 0", percent, f.AS_CUT, ratio="step0_ratio"),
    Metric("step0_ratio", "", percent, f.AS_CUT, value=_of_standard("accuracy_step0")),
    Metric("accuracy_step0_bn", "Step 0, BatchNorm", percent, f.STEP0),
    Metric("accuracy", "Fine-tuned", percent, f.SUBSET, ratio="accuracy_ratio"),
    Metric("accuracy_ratio", "", percent, f.SUBSET, value=_of_standard("accuracy")),
    Metric("best_test_accuracy", "Best test", percent, f.SUBSET, value=_best_test),
    Metric("nrr", "NRR", plain, f.MASKS),
    Metric("parameters", "Parameters", f.count, f.SIZE, ratio="parameters_ratio"),
    Metric("parameters_ratio", "", percent, f.SIZE, value=_of_standard("parameters")),
    Metric("bytes", "", f.count, f.SIZE),
    Metric("flops", "FLOPs", f.count, f.SIZE, ratio="flops_ratio"),
    Metric("flops_ratio", "", percent, f.SIZE, value=_of_standard("flops")),
    Metric("blocked", form=f.whole),
    Metric("certificate", "Certificate", f.small, f.ROUNDING, worst=True),
    Metric("cpu_ms_1", "CPU ms, 1 image", mlflow="", ratio="cpu_time_1"),
    Metric("cpu_time_1", mlflow=""),
    Metric("cpu_ms_128", "CPU ms, 128 images", mlflow="", ratio="cpu_time_128"),
    Metric("cpu_time_128", mlflow=""),
)
_register(
    "objectives",
    Metric("module_accuracy", "Modules %", percent, f.SUBSET),
    Metric("module_parameters_ratio", "Modules' parameters, %", percent, f.SIZE),
)
_register(
    "sensitivity",
    Metric("val_loss_points", "Validation loss, points", points, f.LOST),
    Metric("published_accuracy", "Published %", percent),
)
_register(
    "headline",
    Metric("gain_points", "Gain, points", points, f.AHEAD),
    Metric("gain_best_test_points", "Gain, best test", points, f.AHEAD),
    Metric("size_reduction", "Size reduction %", percent, f.SHARE),
    Metric("parameters_ratio", "Parameters, %", percent, f.SIZE),
    Metric("against_parameters_ratio", "Parameters of the other, %", percent, f.SIZE),
    Metric("loss_points", "Loss, points", points, f.LOST),
    Metric("against_loss_points", "Loss of the other", points, f.LOST),
)
_register(
    "alternatives",
    Metric("ahead_points", "Ahead, points", points, f.AHEAD),
    Metric("worst_points", "Worst classes", points, f.AHEAD),
    Metric("best_points", "Best classes", points, f.AHEAD),
    Metric("flops_ratio", "Its FLOPs, %", percent, f.SIZE),
    Metric("subsets_ahead", "Ahead in", f.whole, f.WINS),
    Metric("subsets", "Of", f.whole),
)
_register(
    "budgets",
    Metric("accuracy", "Accuracy %", percent, f.SUBSET),
    Metric("ahead_points", "Module ahead, points", points, f.AHEAD),
    Metric("make_seconds", "Making, s", f.seconds, f.MACHINE, middle=True),
    Metric("tune_seconds", "Fine-tuning, s", f.seconds, f.MACHINE, middle=True),
    Metric("parameters", "Parameters", f.count, f.SIZE),
    Metric("flops", "FLOPs", f.count, f.SIZE),
    Metric("val_accuracy", "", percent, f.SUBSET),
    Metric("lr", "", plain, f.CHOSEN),
)
_register(
    "gap",
    Metric("soft", "Soft", percent, f.STEP0),
    Metric("binary", "Binary", percent, f.AS_CUT),
    Metric("binary_bn", "Binary + BN", percent, f.STEP0),
    Metric("mean", "Mean", percent, f.STEP0),
    Metric("mean_bn", "Mean + BN", percent, f.STEP0),
    Metric("binary_low", "Binary, low", percent, f.AS_CUT),
    Metric("binary_bn_low", "Binary + BN, low", percent, f.STEP0),
    Metric("mean_low", "Mean, low", percent, f.STEP0),
    Metric("mean_bn_low", "Mean + BN, low", percent, f.STEP0),
)
_register(
    "costs",
    Metric("ms", "ms", f.tenth),
    Metric("ratio", "Ratio", plain),
    Metric("peak_mb", "Peak MB", f.tenth),
)

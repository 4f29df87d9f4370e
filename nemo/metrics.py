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
        spread: whether the standard deviation over seeds is shown.
        worst: whether the largest value over seeds is shown and not the mean: it is a bound.
        ratio: the metric whose percentage stands behind it in brackets.
    """

    name: str
    header: str = ""
    form: Form = plain
    tolerance: Tolerance = EXACT
    scope: str = "cell"
    value: Value | None = None
    mlflow: str | None = None
    spread: bool = True
    worst: bool = False
    ratio: str = ""
    integer: bool = False


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
    """A value that the file of results has under that key."""
    return lambda of: (of.cell if of.module is None else of.module).metrics.get(key)


def _timed(name: str) -> Value:
    return lambda of: of.times.get(name)


def _lost(key: str) -> Value:
    """Points lost against the standard model of the same seed."""

    def value(of: Subject) -> float | None:
        if of.standard is None or not of.cell.modular:
            return None
        return 100 * float(of.standard.metrics[key] - of.cell.metrics[key])

    return value


def _best_test(of: Subject) -> float | None:
    """The paper's protocol: the best epoch on the test images, where they were watched."""
    part = of.cell if of.module is None else of.module
    watched = [row["test_accuracy"] for row in part.history if "test_accuracy" in row]
    if best := part.metrics.get("best_test_accuracy"):
        watched.append(best)
    return max(part.metrics["accuracy"], *watched) if watched else None


def _whole_standard(of: Subject) -> float | None:
    return _subset(of.standard, of)


def _whole_modular(of: Subject) -> float | None:
    return None if of.alternative or not of.cell.modular else _subset(of.cell, of)


def _subset(cell: CellResult | None, of: Subject) -> float | None:
    assert of.module is not None
    return None if cell is None else cell.subsets.get(of.module.subset)


def _of_standard(key: str) -> Value:
    """A module's accuracy or size over that of the standard model for the same classes."""

    def value(of: Subject) -> float | None:
        assert of.module is not None
        mine = of.module.metrics.get(key)
        if mine is None or of.standard is None:
            return None
        size = key in ("parameters", "flops")
        theirs = of.standard.metrics[key] if size else _whole_standard(of)
        return float(mine / theirs) if theirs else None

    return value


def _classes(of: Subject) -> float | None:
    assert of.module is not None
    return len(of.module.metrics["classes"]) if "classes" in of.module.metrics else None


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
    Metric("dead_layers", "Dead layers", f.whole, f.DEAD, spread=False, integer=True),
    Metric("layers", integer=True),
    Metric("neurons", integer=True),
    Metric("parameters", "Parameters", f.count, spread=False, integer=True),
    Metric("generator_parameters", integer=True),
    Metric("flops", "FLOPs", f.count, spread=False, integer=True),
    Metric("epochs", integer=True),
    Metric("cpu_time", "CPU time", value=_timed("cpu_time"), mlflow=""),
)
_register(
    "module",
    Metric("classes", value=_classes, integer=True),
    Metric("accuracy_standard", "Standard", percent, f.SUBSET, value=_whole_standard),
    Metric("accuracy_modular", "Modular", percent, f.SUBSET, value=_whole_modular),
    Metric("accuracy_step0", "Step 0", percent, f.STEP0, ratio="step0_ratio"),
    Metric("step0_ratio", "", percent, f.STEP0, value=_of_standard("accuracy_step0")),
    Metric("accuracy", "Fine-tuned", percent, f.SUBSET, ratio="accuracy_ratio"),
    Metric("accuracy_ratio", "", percent, f.SUBSET, value=_of_standard("accuracy")),
    Metric("best_test_accuracy", "Best test", percent, f.SUBSET, value=_best_test),
    Metric("nrr", "NRR", plain, f.MASKS),
    Metric("parameters", "Parameters", f.count, f.SIZE, spread=False, ratio="parameters_ratio",
           integer=True),
    Metric("parameters_ratio", "", percent, f.SIZE, value=_of_standard("parameters")),
    Metric("bytes", "", f.count, f.SIZE, integer=True),
    Metric("flops", "FLOPs", f.count, f.SIZE, spread=False, ratio="flops_ratio", integer=True),
    Metric("flops_ratio", "", percent, f.SIZE, value=_of_standard("flops")),
    Metric("blocked", integer=True),
    Metric("certificate", "Certificate", f.small, f.ROUNDING, spread=False, worst=True),
    *(
        entry
        for batch, text in ((1, "1 image"), (128, "128 images"))
        for entry in (
            Metric(f"cpu_ms_{batch}", f"CPU ms, {text}", plain, value=_timed(f"cpu_ms_{batch}"),
                   mlflow="", ratio=f"cpu_time_{batch}"),
            Metric(f"cpu_time_{batch}", value=_timed(f"cpu_time_{batch}"), mlflow=""),
        )
    ),
)  # fmt: skip
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
    Metric("subsets_ahead", "Ahead in", f.whole, f.WINS, spread=False, integer=True),
    Metric("subsets", "Of", f.whole, spread=False, integer=True),
)
_register(
    "gap",
    *(
        Metric(name + low, text + (", low" if low else ""), percent, f.STEP0)
        for low in ("", "_low")
        for name, text in (
            ("soft", "Soft"), ("binary", "Binary"), ("binary_bn", "Binary + BN"),
            ("mean", "Mean"), ("mean_bn", "Mean + BN"),
        )
        if name + low != "soft_low"
    ),
)  # fmt: skip
_register(
    "costs",
    Metric("ms", "ms", f.tenth),
    Metric("ratio", "Ratio", plain),
    Metric("peak_mb", "Peak MB", f.tenth),
)

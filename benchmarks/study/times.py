"""T6 and the latencies of T2: what a finished unit costs in time and memory.

Needs the unit's weights in study/ and a quiet machine. Latencies and training steps take turns in
one process on the same images, so that ratios of their medians mean something; the other calls run
once. Each memory peak is the growth of the resident set in a process of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.module_speed import medians, peak, reset_peak
from benchmarks.study.plan import Unit
from benchmarks.study.provenance import provenance
from benchmarks.study.run import unit_layout
from benchmarks.training_overhead import stepper
from nemo.cells import MODULAR, Cell, Layout
from nemo.config import CnnShape, DeitShape, Params
from nemo.cut import decompose
from nemo.data import Batches, Prepared, parse_subset
from nemo.data.prepared import Split
from nemo.evaluation.modular import load_class_masks, measure_masks
from nemo.files import write_json
from nemo.masking.generators import Modular, modularize
from nemo.models import build_model, family_of
from nemo.module.files import load
from nemo.trained import load_cell, weights_sha256
from nemo.training.fit import Plan
from nemo.training.tasks import Task, cross_entropy, make_task

ROUNDS = 9
BURST = {1: 5, 128: 1}  # timed calls in a turn, by batch
MASK_IMAGES = 2560
Row = dict[str, Any]


def measure_times(unit: Unit, profile: Params, data: Prepared, file: Path) -> None:
    """Write what `unit` costs to `file`.

    Raises:
        FileNotFoundError: the unit's weights are not in study/.
    """
    params = unit.params(profile)
    layout = unit_layout(params, unit, data)
    write_json(
        file,
        {
            "provenance": provenance(params),
            "latency": latencies(params, unit, data, layout),
            "training": training_steps(params, unit, data),
            "operations": operations(params, unit, data, layout),
        },
    )


def latencies(params: Params, unit: Unit, data: Prepared, layout: Layout) -> list[Row]:
    """Milliseconds of a batch, of the standard model and every module."""
    standard = Cell(data.name, unit.model, "standard", unit.seed)
    names: list[tuple[str, str]] = [("standard", "all")]
    models = [load_cell(layout.train(standard))]
    for method in MODULAR:
        for subset in unit.subsets_of(params):
            names.append((method, subset))
            cell = Cell(data.name, unit.model, method, unit.seed)
            models.append(load(layout.module(cell, subset)))
    models = [_like_in_use(model) for model in models]
    rows = []
    for batch, burst in BURST.items():
        images = _images(data, batch)
        with torch.inference_mode():
            seconds = medians([partial(model, images) for model in models], ROUNDS, burst)
        for (method, subset), spent in zip(names, seconds, strict=True):
            row = {"method": method, "subset": subset, "batch": batch}
            rows.append({**row, "ms": 1000 * spent, "ratio": spent / seconds[0]})
    return rows


def training_steps(params: Params, unit: Unit, data: Prepared) -> list[Row]:
    """Milliseconds of a training step by each method, and its memory."""
    steps = [training_step(params, unit, data, method) for method in unit.methods]
    seconds = medians(steps, ROUNDS, 1)
    del steps
    raw = params.model_dump()  # params themselves cannot be pickled
    peaks = [_alone(_training_peak, raw, unit, data, method) for method in unit.methods]
    return [
        {"method": method, "ms": 1000 * spent, "ratio": spent / seconds[0], "peak_mb": size / 1e6}
        for method, spent, size in zip(unit.methods, seconds, peaks, strict=True)
    ]


def operations(params: Params, unit: Unit, data: Prepared, layout: Layout) -> list[Row]:
    """Seconds and memory of class masks and of each module's cutting; a step of its fine-tuning."""
    cell = Cell(data.name, unit.model, "nemo", unit.seed)
    rows = [{"what": "class masks of 1,000 images", **_alone(_class_masks, layout, cell, data)}]
    for subset in unit.subsets_of(params):
        made = _alone(_decompose, layout, cell, data, subset)
        rows.append({"what": "decompose", "subset": subset, **made})
        made = _alone(_finetuning, params.model_dump(), layout, cell, data, subset)
        rows.append({"what": "fine-tuning step", "subset": subset, **made})
    return rows


def training_step(params: Params, unit: Unit, data: Prepared, method: Any) -> Callable[[], None]:
    """One step of training the unit's model by `method`, on a fixed batch."""
    shape = params.architecture.of(unit.model)
    torch.manual_seed(0)
    base = build_model(unit.model, len(data.classes), data.size[0], shape)
    teacher = None
    if isinstance(shape, DeitShape):
        teacher = build_model("resnet18", len(data.classes), data.size[0], shape.teacher)
        base.set_distilled_training(True)  # type: ignore[operator]
    family = family_of(unit.model, base)
    model = base if method == "standard" else modularize(base)
    if family == "cnn":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan.of(params.train, family)
    return _step(model, make_task(params, method, family, teacher), plan, data)


def _step(model: nn.Module, task: Task, plan: Plan, data: Prepared) -> Callable[[], None]:
    labels = torch.arange(128) % 2  # every module has two classes
    return stepper(model, task, plan, _images(data, 128), labels)


def _class_masks(layout: Layout, cell: Cell, data: Prepared) -> Row:
    modular = load_cell(layout.train(cell))
    assert isinstance(modular, Modular)
    part = data.splits["train"]
    some = Split(part.images[:MASK_IMAGES], part.labels[:MASK_IMAGES])
    batches = Batches(some, data.mean, data.std, 256)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "masks"
        row = _timed(lambda: measure_masks(modular, batches, 0.9, out, ""))
    return row | {"seconds": row["seconds"] / MASK_IMAGES * 1000}


def _decompose(layout: Layout, cell: Cell, data: Prepared, subset: str) -> Row:
    modular = load_cell(layout.train(cell))
    assert isinstance(modular, Modular)
    every = load_class_masks(layout.masks(cell), modular.layers, weights_sha256(layout.train(cell)))
    masks = every.select(parse_subset(subset, data.classes))
    small = build_model("resnet18", 10, 32, CnnShape(width=0.1))
    decompose(small, {})  # imports, and what torch sets up once
    return _timed(lambda: decompose(modular, masks))


def _finetuning(raw: Row, layout: Layout, cell: Cell, data: Prepared, subset: str) -> Row:
    module = load(layout.module(cell, subset))
    plan = Plan.of(Params.model_validate(raw).finetune, module.info["family"])
    step = _step(module, Task(cross_entropy), plan, data)
    first = _timed(step)  # the one that allocates, the optimizer's state too
    rest = _timed(lambda: [step() for _ in range(ROUNDS)])
    return {"seconds": rest["seconds"] / ROUNDS, "peak_mb": first["peak_mb"]}


def _timed(call: Callable[[], Any]) -> Row:
    reset_peak()
    before, begin = peak(), time.perf_counter()
    call()
    spent = time.perf_counter() - begin
    return {"seconds": spent, "peak_mb": (peak() - before) / 1e6}


def _training_peak(raw: Row, unit: Unit, data: Prepared, method: Any) -> int:
    """Growth of the resident set over two steps, the optimizer's state included."""
    step = training_step(Params.model_validate(raw), unit, data, method)
    reset_peak()
    before = peak()
    step()
    step()
    return peak() - before


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a fresh process with as many threads as this one."""
    with get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def _like_in_use(model: nn.Module) -> nn.Module:
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _images(data: Prepared, batch: int) -> Tensor:
    images = torch.randn(batch, 3, *data.size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)

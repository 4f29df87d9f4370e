"""T6 and the latencies of T2: what the finished cells of a model cost in time and memory.

    python -m benchmarks.times --params profiles/cifar10-cpu.yaml            # every model
    python -m benchmarks.times --params profiles/cifar10-cpu.yaml vgg16      # one

Needs the weights of the first seed's cells in runs/, and a quiet machine's CPU. The rows go to
results/PROFILE/times/, from where `nemo report` takes them. Latencies and training steps take turns
in one process on the same images, so that ratios of their medians mean something; the other calls
run once. Each memory peak is the growth of the resident set in a process of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring import Row, alone, medians, timed
from benchmarks.training_overhead import MeanCutPass, stepper
from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params, check_params, load_params
from nemo.cut import decompose
from nemo.data import Batches, Prepared, parse_subset
from nemo.data.prepared import Split
from nemo.evaluation.modular import load_class_masks, measure_masks
from nemo.files import write_json
from nemo.masking.generators import Modular, modularize
from nemo.models import build_model, family_of
from nemo.models.shapes import CnnShape, DeitShape
from nemo.module.files import load
from nemo.pipeline.inputs import images
from nemo.provenance import provenance
from nemo.results import times_file
from nemo.trained import load_cell, weights_sha256
from nemo.training.fit import Plan
from nemo.training.tasks import Task, cross_entropy, make_task

ROUNDS = 9
BURST = {1: 5, 128: 1}  # timed calls in a turn, by batch
MASK_IMAGES = 2560


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="Params file.")
    parser.add_argument("models", nargs="*", help="Models of the params; all by default.")
    arguments = parser.parse_args()
    params = load_params(arguments.params)
    for dataset in params.datasets:
        for model in arguments.models or params.models:
            cell = Cell(dataset, model, STANDARD, params.seeds[0])
            file = times_file(Path(), params.profile, cell)
            measure_times(params, cell, Layout(), file)
            print(file)


def measure_times(params: Params, cell: Cell, layout: Layout, file: Path) -> None:
    """Write what the cells of one data set, model and seed cost to `file`.

    Args:
        cell: the standard one.

    Raises:
        FileNotFoundError: a cell of another method, or a module of it, is not finished.
    """
    data = images(params, cell.dataset, layout)
    every = [Cell(cell.dataset, cell.model, method, cell.seed) for method in params.methods]
    modular = [own for own in every if params.base_of(own.method).modular]
    write_json(
        file,
        {
            "provenance": provenance(torch.device("cpu")),
            "latency": latencies(params, cell, modular, data, layout),
            "training": training_steps(params, every, data),
            "operations": operations(params, modular[-1], data, layout) if modular else [],
        },
    )


def latencies(
    params: Params, standard: Cell, modular: list[Cell], data: Prepared, layout: Layout
) -> list[Row]:
    """Milliseconds of a batch, of the standard model and every module."""
    names: list[tuple[str, str]] = [(STANDARD, "all")]
    models = [load_cell(layout.train(standard))]
    for cell in modular:
        for subset in params.subsets:
            names.append((cell.method, subset))
            models.append(load(layout.module(cell, subset)))
    models = [_like_in_use(model) for model in models]
    rows = []
    for batch, burst in BURST.items():
        pixels = _pixels(data, batch)
        with torch.inference_mode():
            seconds = medians([partial(model, pixels) for model in models], ROUNDS, burst)
        for (method, subset), spent in zip(names, seconds, strict=True):
            row = {"method": method, "subset": subset, "batch": batch}
            rows.append({**row, "ms": 1000 * spent, "ratio": spent / seconds[0]})
    return rows


def training_steps(params: Params, cells: list[Cell], data: Prepared) -> list[Row]:
    """Milliseconds of a training step by each method, and its memory."""
    steps = [training_step(params, cell, data) for cell in cells]
    seconds = medians(steps, ROUNDS, 1)
    del steps
    raw = params.model_dump()  # params themselves cannot be pickled
    peaks = [alone(_training_peak, raw, cell, data) for cell in cells]
    return [
        {"method": cell.method, "ms": 1000 * spent, "ratio": spent / seconds[0],
         "peak_mb": size}
        for cell, spent, size in zip(cells, seconds, peaks, strict=True)
    ]  # fmt: skip


def operations(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[Row]:
    """Seconds and memory of class masks and of each module's cutting; a step of its fine-tuning."""
    raw = params.model_dump()
    masks = alone(_class_masks, raw, layout, cell, data)
    rows = [{"what": "class masks of 1,000 images", **masks}]
    for subset in params.subsets:
        made = alone(_decompose, raw, layout, cell, data, subset)
        rows.append({"what": "decompose", "subset": subset, **made})
        made = alone(_finetuning, raw, layout, cell, data, subset)
        rows.append({"what": "fine-tuning step", "subset": subset, **made})
    return rows


def training_step(params: Params, cell: Cell, data: Prepared) -> Callable[[], None]:
    """One step of a cell's training, on a fixed batch; with the cut pass, where it has one."""
    own, method = params.for_method(cell.method), params.base_of(cell.method)
    shape = own.architecture.of(cell.model)
    torch.manual_seed(0)
    base = build_model(cell.model, len(data.classes), data.size[0], shape)
    teacher = None
    if isinstance(shape, DeitShape):
        teacher = build_model("resnet18", len(data.classes), data.size[0], shape.teacher)
        base.set_distilled_training(True)  # type: ignore[operator]
    family = family_of(cell.model, base)
    model = modularize(base) if method.modular else base
    if family == "cnn":
        model.to(memory_format=torch.channels_last)
    labels, device = data.splits["train"].labels, torch.device("cpu")
    section, cut_pass = own.section(method.section), None
    if isinstance(model, Modular) and getattr(section, "cut", None) is not None:
        cut_pass = MeanCutPass(section.cut, model, len(data.classes))
    task = make_task(method, section, family, labels, device, teacher, cut_pass)
    return _step(model, task, Plan.of(own.train, family), data, len(data.classes))


def _step(
    model: nn.Module, task: Task, plan: Plan, data: Prepared, classes: int
) -> Callable[[], None]:
    labels = torch.arange(128) * classes // 128  # the first k of the classes have their share
    return stepper(model, task, plan, _pixels(data, 128), labels)


def _class_masks(raw: Row, layout: Layout, cell: Cell, data: Prepared) -> Row:
    chosen = check_params(raw).for_method(cell.method).masks
    modular = load_cell(layout.train(cell))
    assert isinstance(modular, Modular)
    part = data.splits["train"]
    some = Split(part.images[:MASK_IMAGES], part.labels[:MASK_IMAGES])
    batches = Batches(some, data.mean, data.std, 256)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "masks"
        row = timed(lambda: measure_masks(modular, batches, chosen, out, ""))
    return row | {"seconds": row["seconds"] / MASK_IMAGES * 1000}


def _decompose(raw: Row, layout: Layout, cell: Cell, data: Prepared, subset: str) -> Row:
    modular = load_cell(layout.train(cell))
    assert isinstance(modular, Modular)
    every = load_class_masks(layout.masks(cell), modular.layers, weights_sha256(layout.train(cell)))
    masks = every.select(parse_subset(check_params(raw).text_of(subset), data.classes))
    small = build_model("resnet18", 10, 32, CnnShape(width=0.1))
    decompose(small, {})  # imports, and what torch sets up once
    return timed(lambda: decompose(modular, masks))


def _finetuning(raw: Row, layout: Layout, cell: Cell, data: Prepared, subset: str) -> Row:
    module = load(layout.module(cell, subset))
    plan = Plan.of(check_params(raw).for_method(cell.method).finetune, module.info["family"])
    step = _step(module, Task(cross_entropy), plan, data, 2)  # every module has two classes
    first = timed(step)  # the one that allocates, the optimizer's state too
    rest = timed(lambda: [step() for _ in range(ROUNDS)])
    return {"seconds": rest["seconds"] / ROUNDS, "peak_mb": first["peak_mb"]}


def _training_peak(raw: Row, cell: Cell, data: Prepared) -> float:
    """Growth of the resident set over two steps in MB, the optimizer's state included."""
    step = training_step(check_params(raw), cell, data)
    return float(timed(lambda: [step(), step()])["peak_mb"])


def _like_in_use(model: nn.Module) -> nn.Module:
    return model.eval().to(memory_format=torch.channels_last)


def _pixels(data: Prepared, batch: int) -> Tensor:
    pixels = torch.randn(batch, 3, *data.size, generator=torch.Generator().manual_seed(0))
    return pixels.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()

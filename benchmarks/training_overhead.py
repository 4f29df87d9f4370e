"""What a modular training step costs over the standard step of the same model.

    python benchmarks/training_overhead.py            # prints the table
    python benchmarks/training_overhead.py --write    # and writes it to reports/
    python benchmarks/training_overhead.py --device cuda --write    # GPU: CUDA graphs, AMP

Both steps (forward, loss, backward, SGD) run on the same random batch, interleaved in one process;
the ratio is that of the medians. Goals: at most 1.15 at full width, at most 1.35 at width 0.25.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from nemo.device import repeatable
from nemo.masking.generators import modularize
from nemo.masking.objectives.nemo import LossParams, contrastive
from nemo.models import build_model
from nemo.models.registry import Shape
from nemo.models.shapes import CnnShape, VitShape
from nemo.training.fit import Gradients, Plan, RecordedGradients
from nemo.training.tasks import Task, cross_entropy

FORMS = {  # AMP, and whether the step is a CUDA graph
    "cpu": ((False, False),),
    "cuda": ((False, False), (False, True), (True, False), (True, True)),
}
WARM = RecordedGradients.WARM + 1  # rounds that are not counted
CASES: list[tuple[str, str, Shape, int]] = [
    ("vgg16", "full width", CnnShape(), 64),
    ("resnet18", "full width", CnnShape(), 64),
    ("vit_small", "full width", VitShape(), 64),
    ("vit_small", "full width", VitShape(), 128),
    ("vgg16", "width 0.25", CnnShape(width=0.25), 128),
    ("resnet18", "width 0.25", CnnShape(width=0.25), 128),
    ("vit_small", "dim 96, depth 6", VitShape(dim=96, depth=6, heads=6), 128),
]


def make_step(
    name: str,
    shape: Shape,
    batch: int,
    modular: bool,
    device: str = "cpu",
    amp: bool = False,
    recorded: bool = False,
) -> Callable[[], None]:
    torch.manual_seed(0)
    base = build_model(name, 10, 32, shape)
    model = modularize(base) if modular else base
    if isinstance(shape, CnnShape):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.to(device)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last).to(device)
    labels = torch.arange(batch, device=device) % 10
    penalty = contrastive(LossParams(alpha=1.0, tau=0.2, form="equation"), "cnn")  # type: ignore[arg-type]
    task = Task(cross_entropy, penalty if modular else None)
    plan = Plan(1, "sgd", 0.01, 0.9, 0.0, 1)
    return stepper(model, task, plan, images, labels, amp, recorded)


def stepper(
    model: nn.Module,
    task: Task,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    amp: bool = False,
    recorded: bool = False,
) -> Callable[[], None]:
    """A training step of `model`, always on the same batch."""
    optimizer, device = plan.make_optimizer(model.train()), images.device
    gradients = Gradients(model, task, device, amp)
    if recorded:
        gradients = RecordedGradients(model, task, device, amp, len(images))

    def step() -> None:
        gradients(images, labels)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def measure(
    name: str,
    label: str,
    shape: Shape,
    batch: int,
    rounds: int,
    device: str = "cpu",
    amp: bool = False,
    recorded: bool = False,
) -> dict[str, object]:
    steps = [
        make_step(name, shape, batch, modular, device, amp, recorded) for modular in (False, True)
    ]
    seconds: list[list[float]] = [[], []]
    with repeatable(torch.device(device)):  # as in training
        for round_ in range(rounds + WARM):
            for step, times in zip(steps, seconds, strict=True):
                begin = time.perf_counter()
                step()
                if round_ >= WARM:
                    times.append(time.perf_counter() - begin)
    standard, modular = (statistics.median(times) for times in seconds)
    return {
        "model": name,
        "shape": label,
        "batch": batch,
        "precision": "bfloat16" if amp else "float32",
        "step": "recorded" if recorded else "eager",
        "standard_ms": round(1000 * standard, 1),
        "modular_ms": round(1000 * modular, 1),
        "ratio": round(modular / standard, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    device, rows = arguments.device, []
    for case in CASES:
        for amp, recorded in FORMS[device]:
            rows.append(measure(*case, arguments.rounds, device, amp, recorded))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False))
    if arguments.write:
        out, name = Path("reports"), "training_overhead" + ("-gpu" if device == "cuda" else "")
        table.to_csv(out / f"{name}.csv", index=False, lineterminator="\n")
        threads = f"{torch.get_num_threads()} CPU threads"
        gpu = "float32 with convolutions in TF32, {}"
        where = threads if device == "cpu" else gpu.format(torch.cuda.get_device_name())
        caption = (
            f"Modular over standard step: medians of {arguments.rounds} interleaved rounds, "
            f"images 3 x 32 x 32, {where}, torch {torch.__version__.split('+')[0]}.\n\n"
        )
        (out / f"{name}.md").write_text(caption + table.to_markdown(index=False) + "\n")


if __name__ == "__main__":
    main()

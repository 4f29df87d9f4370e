"""What a modular training step costs over the standard step of the same model.

    python -m benchmarks.training_overhead            # prints the table
    python -m benchmarks.training_overhead --write    # and writes it to reports/
    python -m benchmarks.training_overhead --device cuda --write    # GPU: CUDA graphs, AMP

The steps (forward, loss, backward, SGD) run on the same random batch, interleaved in one process;
the ratios are those of the medians. Goals: at most 1.06 at full width, at most 1.15 at width 0.25.
"cut" is a modular step with the cut pass of five of the ten classes, the mean of what is drawn by
default. By default, the pass runs in the last 30 % of the epochs only.
"compiled" is torch.compile of the model's call, on a CPU for narrow models only: the others compile
for long. The cut pass is not compiled; it calls the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.measuring import DEVICES, Row, medians, parser, show, where
from nemo.device import repeatable
from nemo.masking.generators import Modular, modularize
from nemo.masking.objectives import CutPassParams
from nemo.masking.objectives.nemo import LossParams, contrastive
from nemo.models import build_model
from nemo.models.registry import Shape
from nemo.models.shapes import CnnShape, VitShape
from nemo.training.cut_pass import ScheduledCutPass
from nemo.training.fit import Plan
from nemo.training.gradients import Gradients, RecordedGradients
from nemo.training.tasks import Task, cross_entropy

FORMS: dict[str, list[dict[str, bool]]] = {  # options of `stepper`
    "cpu": [{}, {"compiled": True}],
    "cuda": [{}, {"recorded": True}, {"amp": True}, {"amp": True, "recorded": True}],
}
CASES: list[tuple[str, str, Shape, int]] = [
    ("vgg16", "full width", CnnShape(), 64),
    ("resnet18", "full width", CnnShape(), 64),
    ("vit_small", "full width", VitShape(), 64),
    ("vit_small", "full width", VitShape(), 128),
    ("vgg16", "width 0.25", CnnShape(width=0.25), 128),
    ("resnet18", "width 0.25", CnnShape(width=0.25), 128),
    ("vit_small", "dim 96, depth 6", VitShape(dim=96, depth=6, heads=6), 128),
]
Method = Literal["standard", "modular", "cut"]
METHODS: tuple[Method, ...] = ("standard", "modular", "cut")
CLASSES = 10


def make_step(
    name: str,
    shape: Shape,
    batch: int,
    method: Method,
    device: str,
    **how: bool,
) -> Callable[[], None]:
    torch.manual_seed(0)
    base = build_model(name, CLASSES, 32, shape)
    model = base if method == "standard" else modularize(base)
    if isinstance(shape, CnnShape):
        model.to(memory_format=torch.channels_last)
    model.to(device)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last).to(device)
    labels = torch.arange(batch, device=device) % CLASSES
    task = Task(cross_entropy)
    if isinstance(model, Modular):
        penalty = contrastive(LossParams(alpha=1.0, tau=0.2, form="equation"), "cnn")
        cut = MeanCutPass(CutPassParams(), model, CLASSES) if method == "cut" else None
        task = Task(cross_entropy, penalty, cut_pass=cut)
    plan = Plan(1, "sgd", 0.01, 0.9, 0.0, 1)
    return stepper(model, task, plan, images, labels, **how)


class MeanCutPass(ScheduledCutPass):
    """A cut pass at every step, of as many classes as it draws on the mean."""

    def __init__(self, params: CutPassParams, model: Modular, classes: int) -> None:
        always = params.model_copy(update={"after": 0, "last": None, "every": 1})
        super().__init__(always, model, classes, 1, 0)

    def draw(self) -> Tensor:
        classes = len(self.frequency)
        sizes = [*(size for size in self.sizes if size < classes), classes]
        return torch.arange(int(sum(sizes) / len(sizes) + 0.5))


def stepper(
    model: nn.Module,
    task: Task,
    plan: Plan,
    images: Tensor,
    labels: Tensor,
    amp: bool = False,
    recorded: bool = False,
    compiled: bool = False,
) -> Callable[[], None]:
    """A training step of `model`, always on the same batch."""
    if compiled:
        model.compile()
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
    how: dict[str, bool] | None = None,
) -> Row:
    """The row of a model; `how` are the options of `stepper`."""
    how = how or {}
    steps = [make_step(name, shape, batch, method, device, **how) for method in METHODS]
    with repeatable(torch.device(device)):  # as in training
        for step in steps * (RecordedGradients.WARM if how.get("recorded") else 1):
            step()
        standard, modular, cut = medians(steps, rounds, 1)
    return {
        "model": name,
        "shape": label,
        "batch": batch,
        "rounds": rounds,
        "precision": "bfloat16" if how.get("amp") else "float32",
        "step": next((form for form in ("recorded", "compiled") if how.get(form)), "eager"),
        "standard_ms": round(1000 * standard, 1),
        "modular_ms": round(1000 * modular, 1),
        "cut_ms": round(1000 * cut, 1),
        "ratio": round(modular / standard, 3),
        "cut_ratio": round(cut / standard, 3),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, help="By default 9, of slow steps 3.")
    options.add_argument("--device", **DEVICES)
    arguments = options.parse_args()
    gpu, rows = arguments.device == "cuda", []
    for case in CASES:
        for form in FORMS[arguments.device]:
            if form.get("compiled") and case[1] == "full width":
                continue
            slow = not gpu and case[1] == "full width"
            rounds = arguments.rounds or (3 if slow else 9)
            row = measure(*case, rounds, arguments.device, form)
            print(row, flush=True)
            rows.append(row)
    caption = (
        "Training steps, modular over standard: medians of interleaved rounds, images 3 x 32 x 32, "
        f"float32{' with convolutions in TF32' if gpu else ''}; cut is modular with the cut pass "
        f"on half of the images; {where(arguments.device)}."
    )
    show(f"training_overhead{'-gpu' if gpu else ''}", caption, pd.DataFrame(rows), arguments.write)


if __name__ == "__main__":
    main()

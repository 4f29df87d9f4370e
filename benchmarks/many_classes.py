"""What masks and their figures cost with 1,000 classes and 40,000 neurons, on synthetic bits.

    python -m benchmarks.many_classes            # prints the table
    python -m benchmarks.many_classes --write    # and writes it to reports/

Each row runs in a process of its own. Memory is what it grows by beyond its input. Goals for 10,000
samples: class masks in 3 s and 1 GiB; the contrastive loss at most 15 % of vit_small's step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.measuring import Row, alone, parser, show, timed, where
from benchmarks.training_overhead import make_step
from nemo.evaluation.modular import measure_masks
from nemo.masking.class_masks import (
    ClassMasks,
    coupling_matrix,
    mask_frequency,
    masks_from_frequency,
)
from nemo.masking.losses import contrastive_loss
from nemo.masking.observed import Observed
from nemo.models.shapes import VitShape
from nemo.sections import mask_params

CLASSES, LAYERS, WIDTH, BATCH = 1000, 20, 2000, 256
NEURONS = LAYERS * WIDTH
STEP = "vit_small's training step"
LOSS = "contrastive loss and gradient"


class Known(nn.Module):
    """In place of a modular model: its inputs are the masks, eight bits to a byte."""

    layers: ClassVar[dict[str, int]] = {str(number): WIDTH for number in range(LAYERS)}

    def forward(self, packed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1))
        return packed, dict(zip(self.layers, bits.split(WIDTH, 1), strict=True))


def observed(samples: int) -> Observed:
    """Bits of which each class has a random tenth, with one in a hundred flipped per sample."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, samples, BATCH):
            labels = torch.arange(start, min(start + BATCH, samples)) % CLASSES
            flipped = torch.rand(len(labels), NEURONS, generator=generator) < 0.01
            bits = np.packbits((prototypes[labels] ^ flipped).numpy(), axis=1)
            yield torch.from_numpy(bits), labels

    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(CLASSES, NEURONS, generator=generator) < 0.1
    model: Any = Known()
    return Observed(model, list(batches()))


def class_masks(samples: int) -> Callable[[], ClassMasks]:
    found = observed(samples)
    return lambda: masks_from_frequency(mask_frequency(found.bits()), 0.9)


def stage(samples: int) -> Callable[[], None]:
    found, how = observed(samples), mask_params("frequency").model_validate({"threshold": 0.9})

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            measure_masks(found.modular, found.batches, how, Path(folder) / "masks", "")

    return run


def coupling(classes: int) -> Callable[[], Tensor]:
    bits = torch.rand(classes, NEURONS, generator=torch.Generator().manual_seed(0)) < 0.1
    return lambda: coupling_matrix({"all": bits})


def contrast(images: int) -> Callable[[], None]:
    soft = {str(i): torch.rand(images, WIDTH, requires_grad=True) for i in range(LAYERS)}
    labels = torch.arange(images) % CLASSES
    return lambda: contrastive_loss(soft, labels, 0.2).backward()


def vit_step(images: int) -> Callable[[], None]:
    return make_step("vit_small", VitShape(), images, "standard", "cpu")


Prepare = Callable[[int], Callable[[], object]]
CASES: list[tuple[str, Prepare, str, tuple[int, ...]]] = [
    ("class masks", class_masks, "samples", (5_000, 10_000)),
    ("class masks, their figures and file", stage, "samples", (5_000, 10_000)),
    ("coupling matrix", coupling, "classes", (500, 1_000)),
    (LOSS, contrast, "images", (64, 128)),
    (STEP, vit_step, "images", (64, 128)),
]


def measure(what: str, prepare: Prepare, unit: str, size: int) -> Row:
    """Seconds of a call, those of all its threads, and MiB that this process grows by."""
    work = prepare(size)
    if unit == "images":
        work()  # the step that allocates gradients, and what torch sets up once
    begin = time.process_time()
    row = timed(work)
    return {
        "what": what,
        "of": f"{size:,} {unit}",
        "seconds": round(row["seconds"], 2),
        "cpu seconds": round(time.process_time() - begin, 2),
        "MiB": round(row["peak_mb"] * 1e6 / 2**20),
    }


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rows = []
    for what, prepare, unit, sizes in CASES:
        for size in sizes:
            rows.append(alone(measure, what, prepare, unit, size))
            print(rows[-1], flush=True)
    steps = {row["of"]: row["cpu seconds"] for row in rows if row["what"] == STEP}
    for row in rows:
        share = row["cpu seconds"] / steps[row["of"]] if row["what"] == LOSS else None
        row["of vit_small's step"] = "" if share is None else f"{share:.1%}"
    caption = (
        f"{CLASSES:,} classes, {NEURONS:,} neurons in {LAYERS} layers, synthetic bits, one run, "
        f"{where()}. CPU seconds are those of all threads. MiB: beyond the model and its input."
    )
    show("many_classes", caption, pd.DataFrame(rows), arguments.write)


if __name__ == "__main__":
    main()

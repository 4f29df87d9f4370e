"""What masks and their metrics cost with 1,000 classes and 40,000 neurons, on synthetic bits.

    python -m benchmarks.class_scale            # prints the table
    python -m benchmarks.class_scale --write    # and writes it to reports/

Each row runs in a process of its own, and memory is the peak of that process, torch and the input
included. Twice the samples should cost twice the time and no more memory, but for cohesion's input,
the bits, a byte each.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator

import pandas as pd
import torch
from torch import Tensor

from benchmarks.measuring import Row, alone, parser, show, where
from nemo.masking import class_masks as masks
from nemo.masking.losses import contrastive_loss

CLASSES, LAYERS, WIDTH, BATCH = 1000, 20, 2000, 256
NEURONS = LAYERS * WIDTH


def batches(samples: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Bits of which each class has a random tenth, with one in a hundred flipped per sample."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(CLASSES, NEURONS, generator=generator) < 0.1
    for start in range(0, samples, BATCH):
        labels = torch.arange(start, min(start + BATCH, samples)) % CLASSES
        bits = prototypes[labels] ^ (torch.rand(len(labels), NEURONS, generator=generator) < 0.01)
        yield dict(zip(map(str, range(LAYERS)), bits.split(WIDTH, 1), strict=True)), labels


def class_masks(samples: int) -> Callable[[], object]:
    return lambda: masks.masks_from_frequency(masks.mask_frequency(batches(samples)), 0.9)


def coupling(samples: int) -> Callable[[], object]:
    found = masks.masks_from_frequency(masks.mask_frequency(batches(samples)), 0.9)
    return lambda: masks.coupling(found)


def cohesion(samples: int) -> Callable[[], object]:
    every, labels = zip(*batches(samples), strict=True)
    bits = {layer: torch.cat([batch[layer] for batch in every]) for layer in every[0]}
    found = masks.masks_from_frequency(masks.mask_frequency(batches(samples)), 0.9)
    return lambda: masks.cohesion(bits, torch.cat(labels), found)


def contrast(samples: int) -> Callable[[], object]:
    soft = {str(i): torch.rand(samples, WIDTH, requires_grad=True) for i in range(LAYERS)}
    labels = torch.arange(samples) % CLASSES
    return lambda: contrastive_loss(soft, labels, 0.2).backward()  # type: ignore[no-untyped-call]


CASES: list[tuple[str, Callable[[int], Callable[[], object]], tuple[int, int]]] = [
    ("class masks (streamed)", class_masks, (5_000, 10_000)),
    ("coupling", coupling, (1_000, 2_000)),
    ("cohesion", cohesion, (5_000, 10_000)),
    ("contrastive loss and gradient, one batch", contrast, (256, 512)),
]


def measure(what: str, prepare: Callable[[int], Callable[[], object]], samples: int) -> Row:
    """Seconds, and MiB of peak memory of this process."""
    work = prepare(samples)
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"what": what, "samples": samples, "seconds": round(seconds, 2), "MiB": round(peak)}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    rows = [
        alone(measure, name, prepare, samples)
        for name, prepare, sizes in CASES
        for samples in sizes
    ]
    caption = (
        f"{CLASSES:,} classes, {NEURONS:,} neurons in {LAYERS} layers, synthetic bits, one run, "
        f"{where()}."
    )
    show("class_scale", caption, pd.DataFrame(rows), arguments.write)


if __name__ == "__main__":
    main()

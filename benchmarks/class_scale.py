"""What masks and their metrics cost with 1,000 classes and 40,000 neurons, on synthetic bits.

    python benchmarks/class_scale.py            # prints the table
    python benchmarks/class_scale.py --write    # and writes it to reports/

Each row runs in a process of its own, and memory is the peak of that process, torch and the input
included. Twice the samples should cost twice the time and no more memory, but for cohesion's input,
the bits, a byte each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

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


def measure(prepare: Callable[[int], Callable[[], object]], samples: int) -> tuple[float, float]:
    """Seconds, and MiB of peak memory."""
    work = prepare(samples)
    begin = time.perf_counter()
    work()
    seconds = time.perf_counter() - begin
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    rows = []
    fresh = multiprocessing.get_context("spawn")
    for name, prepare, sizes in CASES:
        for samples in sizes:
            with fresh.Pool(1) as pool:
                seconds, memory = pool.apply(measure, (prepare, samples))
            rows.append(
                {
                    "what": name,
                    "samples": samples,
                    "seconds": round(seconds, 2),
                    "MiB": round(memory),
                }
            )
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_markdown(index=False))
    if arguments.write:
        out = Path("reports")
        table.to_csv(out / "class_scale.csv", index=False, lineterminator="\n")
        caption = (
            f"{CLASSES:,} classes, {NEURONS:,} neurons in {LAYERS} layers, synthetic bits, "
            f"one run, {torch.get_num_threads()} CPU threads, "
            f"torch {torch.__version__.split('+')[0]}.\n\n"
        )
        (out / "class_scale.md").write_text(caption + table.to_markdown(index=False) + "\n")


if __name__ == "__main__":
    main()

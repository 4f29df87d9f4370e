"""How much faster a module is than the model it was cut from, against its saving of FLOPs.

    python benchmarks/module_speed.py            # prints the tables
    python benchmarks/module_speed.py --write    # and writes them to reports/
    python benchmarks/module_speed.py --device cuda --write    # the first one, of a GPU

A random half of every maskable layer's neurons is kept, by number. All contenders run on the same
random batch in one process, in eval mode under inference_mode and channels_last, and take turns:
in a turn one runs once to bring its weights into the cache, as a model in use has them there, and
then against the clock. The ratio is that of the medians. Goal: `share`, the time ratio over the
FLOPs ratio, is at least 0.8. "like for like" compares with the full model after the same treatment:
decomposed without masks, and folded where the module is.

The second table is what `nemo.cut` costs at keep .3, each in a process of its own, with its
peak memory: the growth of the resident set over the call, in sizes of the model's parameters.
Goals: 8 s on resnet18, 15 s on vit_small, under 4 models.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from nemo.cost import count_flops, count_parameters
from nemo.cut import decompose
from nemo.masking.sites import find_sites
from nemo.models import build_model
from nemo.models.registry import Shape
from nemo.models.shapes import CnnShape

MODELS = ("vgg16", "resnet18", "vit_small")
ROUNDS = {1: 41, 128: 7}  # by batch
BURST = {1: 5, 128: 1}  # timed calls in a turn
SIZE = 32


def make(name: str, shape: Shape | None = None) -> nn.Module:
    """The model, with BatchNorm statistics of random images, so that nothing fades or explodes."""
    torch.manual_seed(0)
    model = build_model(name, 10, SIZE, shape)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    with torch.no_grad():
        model(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def masks_of(model: nn.Module, keep: float) -> dict[str, Tensor]:
    """{layer: bool (N_l,)} with round(keep * N_l) random neurons."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for site in find_sites(model):
        if site.skip is None:
            mask = torch.zeros(site.neurons, dtype=torch.bool)
            order = torch.randperm(site.neurons, generator=generator)
            mask[order[: round(keep * site.neurons)]] = True
            masks[site.layer] = mask
    return masks


def medians(calls: Sequence[Callable[[], Any]], rounds: int, burst: int) -> list[float]:
    """Seconds of each call: medians over `rounds` turns of `burst` timed calls."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times, strict=True):
            call()
            for _ in range(burst):
                begin = time.perf_counter()
                call()
                spent.append(time.perf_counter() - begin)
    return [statistics.median(spent) for spent in times]


def measure(
    name: str, rounds: dict[int, int], shape: Shape | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """The rows of a model: per batch, the module as cut and folded."""
    model = make(name, shape)
    module, whole = decompose(model, masks_of(model, 0.5)), decompose(model, {})
    example = torch.zeros(1, 3, SIZE, SIZE)
    saving = count_flops(model, example) / count_flops(module, example)
    models = [model, whole, module, whole.optimize_for_inference(), module.optimize_for_inference()]
    for contender in models:
        contender.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = []
    for batch, count in rounds.items():
        images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        calls = [partial(_call, m, images.to(device)) for m in models]
        with torch.inference_mode():
            seconds = medians(calls, count, BURST.get(batch, 1))
        full = seconds[0]
        for form, same, mine in (("as cut", *seconds[1:3]), ("folded", *seconds[3:])):
            rows.append({
                "model": name, "batch": batch, "module": form,
                "full_ms": round(1000 * full, 2), "module_ms": round(1000 * mine, 2),
                "time_ratio": round(full / mine, 2), "flops_ratio": round(saving, 2),
                "share": round(full / mine / saving, 3),
                "like_for_like": round(same / mine / saving, 3),
            })  # fmt: skip
    return rows


def _call(model: nn.Module, images: Tensor) -> None:
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def cost(name: str) -> dict[str, Any]:
    """Seconds and peak memory of one decomposition at keep .3; call it in a fresh process."""
    model = make(name)
    masks = masks_of(model, 0.3)
    decompose(make("resnet18", CnnShape(width=0.1)), {})  # imports, and what torch sets up once
    size = 4 * count_parameters(model)
    reset_peak()
    before, begin = peak(), time.perf_counter()
    decompose(model, masks)
    seconds = time.perf_counter() - begin
    return {
        "model": name,
        "seconds": round(seconds, 1),
        "model_mb": round(size / 1e6, 1),
        "peak_mb": round((peak() - before) / 1e6, 1),
        "peak_models": round((peak() - before) / size, 2),
    }


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM becomes the present size


def peak() -> int:
    """The largest resident set so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    gpu, costs = arguments.device == "cuda", None
    if not gpu:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            costs = pd.DataFrame(pool.map(cost, MODELS, chunksize=1))
        print(costs.to_markdown(index=False), flush=True)
    rows = []
    for name in MODELS:
        rows += measure(name, ROUNDS, device=arguments.device)
        print(*rows[-2 * len(ROUNDS) :], sep="\n", flush=True)
    speeds = pd.DataFrame(rows)
    print(speeds.to_markdown(index=False))
    if arguments.write:
        out, name = Path("reports"), "module_speed-gpu" if gpu else "module_speed"
        speeds.to_csv(out / f"{name}.csv", index=False, lineterminator="\n")
        if costs is not None:
            costs.to_csv(out / "module_cost.csv", index=False, lineterminator="\n")
        (out / f"{name}.md").write_text(report(speeds, costs, arguments.device))


def report(speeds: pd.DataFrame, costs: pd.DataFrame | None, device: str) -> str:
    """The tables in Markdown; `costs` are of a CPU only."""
    where = f"float32, channels_last, {torch.get_num_threads()} CPU threads"
    if device == "cuda":
        where = f"float32 (convolutions in TF32), channels_last, {torch.cuda.get_device_name()}"
    rounds = ", ".join(f"{n} x {BURST[batch]} at batch {batch}" for batch, n in ROUNDS.items())
    page = (
        "Modules at keep .5 over the full model: medians of interleaved turns with warm weights "
        f"({rounds}), images 3 x {SIZE} x {SIZE}, "
        f"{where}, torch {torch.__version__.split('+')[0]}. "
        "Share: the time ratio over the FLOPs ratio. "
        "Like for like: the same against the full model, decomposed without masks and, where the "
        "module is, folded.\n\n"
        f"{speeds.to_markdown(index=False)}\n"
    )
    if costs is None:
        return page
    return (
        f"{page}\nWhat cutting at keep .3 costs, in a fresh process; peak: growth of the resident "
        f"set.\n\n{costs.to_markdown(index=False)}\n"
    )


if __name__ == "__main__":
    main()

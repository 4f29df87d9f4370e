"""How much faster a module is than the model it was cut from, against its saving of FLOPs.

    python -m benchmarks.module_speed            # prints the tables
    python -m benchmarks.module_speed --write    # and writes them to reports/
    python -m benchmarks.module_speed --device cuda --write    # the first one, of a GPU

A random half of every maskable layer's neurons is kept, by number. All contenders run on the same
random batch in one process, in eval mode under inference_mode and channels_last, and take turns:
in a turn one runs once to bring its weights into the cache, as a model in use has them there, and
then against the clock. The ratio is that of the medians. Goal: `share`, the time ratio over the
FLOPs ratio, is at least 0.8. "like for like" compares with the full model after the same treatment:
decomposed without masks, and folded where the module is. On a CPU, ONNX Runtime runs the folded
modules too, as `nemo export` writes them, with as many threads, which sleep where they wait.

The second table is what `nemo.cut` costs at keep .3, each in a process of its own, with its
peak memory: the growth of the resident set over the call, in sizes of the model's parameters.
Goals: 8 s on resnet18, 15 s on vit_small, under 4 models.
"""

from __future__ import annotations

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import nemo
from benchmarks.measuring import DEVICES, Row, alone, medians, parser, show, timed, where
from nemo.cost import count_flops, count_parameters
from nemo.cut import decompose
from nemo.masking.sites import find_sites
from nemo.models import build_model
from nemo.models.registry import Shape
from nemo.models.shapes import CnnShape
from nemo.module.export import export

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


def measure(
    name: str, rounds: dict[int, int], shape: Shape | None = None, device: str = "cpu"
) -> list[Row]:
    """The rows of a model: per batch, the module as cut, folded, and on a CPU by ONNX Runtime."""
    model = make(name, shape)
    module, whole = decompose(model, masks_of(model, 0.5)), decompose(model, {})
    example = torch.zeros(1, 3, SIZE, SIZE)
    saving = count_flops(model, example) / count_flops(module, example)
    folded = [whole.optimize_for_inference(), module.optimize_for_inference()]
    sessions = [onnx_session(m) for m in folded] if device == "cpu" else []
    models = [model, whole, module, *folded]
    for contender in models:
        contender.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = []
    for batch, count in rounds.items():
        images = torch.randn(batch, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
        calls = [partial(_call, m, images.to(device)) for m in models]
        feed = {"images": images.contiguous().numpy()}
        calls += [partial(session.run, None, feed) for session in sessions]
        with torch.inference_mode():
            seconds = medians(calls, count, BURST.get(batch, 1))
        full, wholes, modules = seconds[0], seconds[1::2], seconds[2::2]
        forms = ("as cut", "folded", "ONNX Runtime")
        for form, same, mine in zip(forms, wholes, modules, strict=False):
            rows.append({
                "model": name, "batch": batch, "module": form,
                "full_ms": round(1000 * full, 2), "module_ms": round(1000 * mine, 2),
                "time_ratio": round(full / mine, 2), "flops_ratio": round(saving, 2),
                "share": round(full / mine / saving, 3),
                "like_for_like": round(same / mine / saving, 3),
            })  # fmt: skip
    return rows


def onnx_session(module: nemo.DecomposedModule) -> Any:
    """What `nemo export` writes of a module, as ONNX Runtime reads it."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its idle threads take turns with those of the model that is timed next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with TemporaryDirectory() as folder:
        nemo.save(module, folder)
        file = export(folder, "onnx").path
        return InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _call(model: nn.Module, images: Tensor) -> None:
    model(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def cost(name: str) -> Row:
    """Seconds and peak memory of one decomposition at keep .3; call it in a fresh process."""
    model = make(name)
    masks = masks_of(model, 0.3)
    decompose(make("resnet18", CnnShape(width=0.1)), {})  # imports, and what torch sets up once
    size, spent = 4 * count_parameters(model) / 1e6, timed(partial(decompose, model, masks))
    return {
        "model": name,
        "seconds": round(spent["seconds"], 1),
        "model_mb": round(size, 1),
        "peak_mb": round(spent["peak_mb"], 1),
        "peak_models": round(spent["peak_mb"] / size, 2),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", **DEVICES)
    arguments = options.parse_args()
    device, write = arguments.device, arguments.write
    if device == "cpu":
        caption = (
            "What cutting at keep .3 costs, in a fresh process; peak: growth of the resident set."
        )
        costs = pd.DataFrame([alone(cost, name) for name in MODELS])
        show("module_cost", caption, costs, write)
    speeds = pd.DataFrame([row for name in MODELS for row in measure(name, ROUNDS, device=device)])
    rounds = ", ".join(f"{n} x {BURST[batch]} at batch {batch}" for batch, n in ROUNDS.items())
    caption = (
        "Modules at keep .5 over the full model: medians of interleaved turns with warm weights "
        f"({rounds}), images 3 x {SIZE} x {SIZE}, "
        f"float32{' (convolutions in TF32)' if device == 'cuda' else ''}, channels_last, "
        f"{where(device)}. Share: the time ratio over the FLOPs ratio. Like for like: the same "
        "against the full model, decomposed without masks and, where the module is, folded."
    )
    show(f"module_speed{'-gpu' if device == 'cuda' else ''}", caption, speeds, write)


if __name__ == "__main__":
    main()

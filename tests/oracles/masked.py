"""A masked model, literally: forward hooks that count calls. Knows nothing of sites or graphs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[str, int]  # a module's name, and which of its calls in the forward pass


def masked_logits(model: nn.Module, masks: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """What `model` says in float64, when each layer's output is multiplied by its mask.

    That of a convolution which a single BatchNorm reads is multiplied after this BatchNorm.

    Args:
        masks: {layer: (N_l,)}; "x.q", "x.k" and "x.v" are the thirds of a Linear "x.qkv".
    """
    model = _double(model, *inputs)
    inputs = tuple(map(_wide, inputs))
    factors: dict[Call, Tensor] = {}
    for layer, mask in masks.items():
        module, rows = _rows(model, layer, mask)
        for call in _after(model, module, inputs):
            factors[call] = factors.get(call, torch.ones(len(rows))) * rows
    assert factors or not masks
    counts: Counter[str] = Counter()

    def multiply(name: str, output: Tensor) -> Tensor:
        rows = factors.get((name, counts[name]), torch.ones(()))
        counts[name] += 1
        last = isinstance(model.get_submodule(name), nn.Linear)
        return output * (rows if last or rows.ndim == 0 else rows.view(-1, 1, 1)).double()

    for name in {name for name, _ in factors}:
        module = model.get_submodule(name)
        fused = getattr(module, "act", None)  # timm's BatchNormAct2d calls its activation itself
        if isinstance(fused, nn.Module):
            fused.register_forward_pre_hook(lambda m, args, name=name: multiply(name, args[0]))
        else:
            module.register_forward_hook(lambda m, args, y, name=name: multiply(name, y))
    with torch.no_grad():
        return model(*inputs)


def _double(model: nn.Module, *inputs: Tensor, **named: Tensor) -> nn.Module:
    with torch.no_grad():  # or computed weights hang on the graph of a loss, and cannot be copied
        model(*inputs, **named)
    return copy.deepcopy(model).double().eval()


def _rows(model: nn.Module, layer: str, mask: Tensor) -> tuple[str, Tensor]:
    """The module whose output a mask is for, and the factors of all its rows."""
    if layer in dict(model.named_modules()):
        return layer, mask.float()
    prefix, _, part = layer.rpartition(".")
    rows = torch.ones(3, len(mask))
    rows["qkv".index(part)] = mask.float()
    return f"{prefix}.qkv".lstrip("."), rows.flatten()


def _after(model: nn.Module, layer: str, inputs: tuple[Tensor, ...]) -> list[Call]:
    """The calls after which the mask of a layer acts."""
    outputs: list[Tensor] = []
    reads: list[tuple[str, int, Tensor]] = []
    counts: Counter[str] = Counter()

    def note(name: str, module: nn.Module, x: Tensor, output: Tensor) -> None:
        if name == layer:
            outputs.append(output)
        elif isinstance(module, nn.BatchNorm2d):
            reads.append((name, counts[name], x))
        counts[name] += 1

    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: note(name, m, args[0], y))
        for name, module in model.named_modules()
        if name == layer or isinstance(module, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    assert outputs, f"{layer} is not called"
    if isinstance(model.get_submodule(layer), nn.Linear):
        return [(layer, i) for i in range(len(outputs))]
    norms = [(n, i) for n, i, x in reads if any(x is output for output in outputs)]
    return norms if len(norms) == len(outputs) else [(layer, i) for i in range(len(outputs))]


class Fixed(nn.Module):
    """In place of a mask generator: the same mask whatever it is given."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, pooled: Tensor) -> Tensor:
        return self.get_buffer("mask").expand(len(pooled), -1)


def modular_logits(
    modular: Any, masks: Mapping[str, Tensor], *inputs: Tensor, **named: Tensor
) -> Any:
    """What a modular model says in float64 when its generators put out `masks`, or ones.

    Layers that are masked here, and have no generator, are given one.
    """
    fixed = _double(modular, *inputs, **named)
    fixed.sites = [
        replace(site, skip=None) for site in fixed.found if site.skip is None or site.layer in masks
    ]
    fixed._keys = {site.layer: f"g{i}" for i, site in enumerate(fixed.sites)}
    fixed.generators = nn.ModuleDict(
        {
            fixed._keys[site.layer]: Fixed(masks.get(site.layer, torch.ones(site.neurons)))
            for site in fixed.sites
        }
    )
    fixed.double()
    with torch.no_grad():
        return fixed(*map(_wide, inputs), **{k: _wide(x) for k, x in named.items()})[0]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x

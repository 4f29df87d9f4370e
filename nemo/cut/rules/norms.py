"""The rules of normalisation layers (ours). Letters: B batch, C channels, G groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import layer_norm

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten
from nemo.cut.rules.base import OneInput, Shape, rule
from nemo.cut.rules.linear import parameters
from nemo.module.program import Ref


def _scaled(x: Tensor, weight: Tensor | None) -> Tensor:
    """x (B, C, ...) times one weight per channel; without a weight x itself."""
    return x if weight is None else x * weight.view(-1, *[1] * (x.ndim - 2))


@rule(aten.batch_norm.default)
class BatchNorm(OneInput):
    """x (B, C, ...), each channel on its own."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        return _scaled(args[0], args[1])

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        held = parameters(build.facts, node, weight=1, bias=2, running_mean=3, running_var=4)
        tensors = {name: value[kept[1]] for name, value in held.items()}
        momentum, averaged = arg(node, 6), node.meta.get("averaged")
        if averaged is not None:  # a cumulative average goes on from where it is
            momentum, tensors["num_batches_tracked"] = None, torch.tensor(averaged)
        config = {"momentum": momentum, "eps": arg(node, 7)}
        return build.layer(node, f"BatchNorm{max(1, len(kept) - 2)}d", config, tensors, x)


@rule(aten.layer_norm.default)
class LayerNorm(OneInput):
    """Normalises over the last dimensions, at full width: the mean needs every channel."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        mixed = x.sum(list(range(-len(args[1]), 0)), keepdim=True).expand(shape)
        return mixed if len(args) < 3 or args[2] is None else mixed * args[2]

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for vector in kept[-len(arg(node, 1)) :]:
            vector[:] = True

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        held = parameters(build.facts, node, weight=2, bias=3)
        tensors = {name: value.clone() for name, value in held.items()}
        config = {"shape": list(arg(node, 1)), "eps": arg(node, 4, 1e-5)}
        return build.layer(node, "LayerNorm", config, tensors, x)


def narrow_layer_norm(
    x: Tensor, index: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm over the channels `index` of the last dimension; the others become zero."""
    scale, shift = (None if p is None else p[index] for p in (weight, bias))
    normed = layer_norm(x[..., index], [len(index)], scale, shift, eps)
    return torch.zeros_like(x).index_copy(-1, index, normed)


@rule(narrow_layer_norm)
class NarrowLayerNorm(OneInput):
    """`narrow_layer_norm`; as a layer, it is a plain LayerNorm of what is left."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x, index, weight = args[:3]
        mixed = x.index_select(-1, index).sum(-1, keepdim=True).expand(*shape[:-1], len(index))
        wide = torch.zeros(shape).index_copy(-1, index, mixed)
        return wide if weight is None else wide * weight

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        kept[-1] = torch.zeros_like(kept[-1])
        kept[-1][facts.value[arg(node, 1)]] = True

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        held = parameters(build.facts, node, weight=2, bias=3)
        tensors = {name: value[kept[-1]] for name, value in held.items()}
        config = {"shape": [int(kept[-1].sum())], "eps": arg(node, 4)}
        return build.layer(node, "LayerNorm", config, tensors, x)


@rule(aten.group_norm.default)
class GroupNorm(OneInput):
    """x (B, C, ...), normalised over each of G groups of channels; dead groups go."""

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0]
        grouped = x.reshape(x.shape[0], args[1], -1)
        mixed = grouped.sum(2, keepdim=True).expand_as(grouped).reshape(shape)
        return _scaled(mixed, args[2] if len(args) > 2 else None)

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        for vector in kept[2:]:
            vector[:] = True
        table = kept[1].view(arg(node, 1), -1)
        table[table.any(1)] = True

    def write(self, build: Builder, node: fx.Node, kept: Kept, x: Ref) -> Ref:
        held = parameters(build.facts, node, weight=2, bias=3)
        tensors = {name: value[kept[1]] for name, value in held.items()}
        if "weight" in tensors:  # torch's layer has both or none
            tensors.setdefault("bias", torch.zeros_like(tensors["weight"]))
        groups = int(kept[1].view(arg(node, 1), -1).any(1).sum())
        config = {"groups": groups, "channels": int(kept[1].sum()), "eps": arg(node, 4, 1e-5)}
        return build.layer(node, "GroupNorm", config, tensors, x)

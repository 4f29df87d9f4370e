"""The layers a decomposed module may hold: torch's own, and small ones that move channels.

A layer is described by its kind, a small config and its tensors; widths are read off the tensors,
never off the config. `build` is the only way in, for the decomposer and for loaded files alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Config = dict[str, Any]
Tensors = Mapping[str, Tensor]


class LayerSpec(NamedTuple):
    """All there is to know of a layer."""

    kind: str
    config: Config
    tensors: Tensors


class Constant(nn.Module):
    """A tensor that does not depend on the image: a position embedding, a class token."""

    def __init__(self, value: Tensor, trainable: bool) -> None:
        super().__init__()
        if trainable:
            self.value: Tensor = nn.Parameter(value)
        else:
            self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


class Cast(nn.Module):
    """The type of the module's weights, for what is made of ids and masks."""

    like: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("like", like)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.like.dtype)


def _fast_dim(x: Tensor, dim: int) -> int:
    """-1 if `dim` is the innermost one in memory, as with channels_last, else `dim`.

    With `dim` moved there, indexed ops copy runs of memory, and keep the memory format.
    """
    return -1 if x.stride(dim) == 1 else dim


class Select(nn.Module):
    """Keep the entries `index` of dimension `dim`."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)


class Place(nn.Module):
    """Spread x over a wider dimension `dim`, to the entries `index`; `template` fills the others.

    template: the wide shape, where every dimension but `dim` may be 1: it repeats.
    """

    index: Tensor
    template: Tensor

    def __init__(self, dim: int, index: Tensor, template: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)
        self.register_buffer("template", template)

    def forward(self, x: Tensor) -> Tensor:
        dim = _fast_dim(x, self.dim)
        x, template = x.movedim(self.dim, dim), self.template.movedim(self.dim, dim)
        repeats = [n if t == 1 else n // t for n, t in zip(x.shape, template.shape, strict=True)]
        repeats[dim] = 1
        wide = template.repeat(repeats).to(x.dtype)
        return wide.index_copy_(dim, self.index, x).movedim(dim, self.dim)


class Tile(nn.Module):
    """Repeat a constant along `dim` to `repeats` entries per image: a class token of a batch."""

    def __init__(self, dim: int, repeats: int) -> None:
        super().__init__()
        self.dim = dim
        self.repeats = repeats

    def forward(self, constant: Tensor, images: Tensor) -> Tensor:
        repeats = [1] * constant.ndim
        repeats[self.dim] = images.shape[0] * (self.repeats // constant.shape[self.dim])
        return constant.repeat(repeats)


class AddInto(nn.Module):
    """x + y, where y holds only the entries `index` of dimension `dim` of x."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor, y: Tensor, in_place: bool = False) -> Tensor:
        dim = _fast_dim(x, self.dim)
        x, y = x.movedim(self.dim, dim), y.movedim(self.dim, dim)
        if x.dtype != y.dtype:  # under autocast; + would promote them, index_add does not
            kind = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(kind), y.to(kind)
        wide = x.index_add_(dim, self.index, y) if in_place else x.index_add(dim, self.index, y)
        return wide.movedim(dim, self.dim)


CONVOLUTIONS = tuple(f"Conv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3))


def _conv(name: str) -> Callable[[Config, Tensors], nn.Module]:
    kind = getattr(nn, name)

    def make(config: Config, tensors: Tensors) -> nn.Module:
        weight, groups = tensors["weight"], config["groups"]
        wide, narrow = weight.shape[0], weight.shape[1] * groups
        channels = (wide, narrow) if "Transpose" in name else (narrow, wide)
        made: nn.Module = kind(
            *channels, tuple(weight.shape[2:]), **config, bias="bias" in tensors, device="meta"
        )
        return made

    return make


def _linear(config: Config, tensors: Tensors) -> nn.Module:
    rows, columns = tensors["weight"].shape
    return nn.Linear(columns, rows, bias="bias" in tensors, device="meta")


def _embedding(config: Config, tensors: Tensors) -> nn.Module:
    rows, columns = tensors["weight"].shape
    return nn.Embedding(rows, columns, config["padding_idx"], device="meta")


def _batch_norm(rank: int) -> Callable[[Config, Tensors], nn.Module]:
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]

    def make(config: Config, tensors: Tensors) -> nn.Module:
        width = len(tensors["running_mean"])
        affine = "weight" in tensors
        return kind(width, config["eps"], config["momentum"], affine=affine, device="meta")

    return make


def _layer_norm(config: Config, tensors: Tensors) -> nn.Module:
    shape, affine = config["shape"], "weight" in tensors
    bias = "bias" in tensors or not affine
    return nn.LayerNorm(shape, config["eps"], affine, bias=bias, device="meta")


def _group_norm(config: Config, tensors: Tensors) -> nn.Module:
    affine = "weight" in tensors
    return nn.GroupNorm(config["groups"], config["channels"], config["eps"], affine, device="meta")


BUILDERS: dict[str, Callable[[Config, Tensors], nn.Module]] = {
    **{name: _conv(name) for name in CONVOLUTIONS},
    "Linear": _linear,
    "Embedding": _embedding,
    "BatchNorm1d": _batch_norm(1),
    "BatchNorm2d": _batch_norm(2),
    "BatchNorm3d": _batch_norm(3),
    "LayerNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "Dropout": lambda config, _: nn.Dropout(config["p"]),
    "Dropout2d": lambda config, _: nn.Dropout2d(config["p"]),
    "Constant": lambda config, tensors: Constant(tensors["value"], config["trainable"]),
    "Cast": lambda config, tensors: Cast(tensors["like"]),
    "Select": lambda config, tensors: Select(config["dim"], tensors["index"]),
    "Place": lambda c, tensors: Place(c["dim"], tensors["index"], tensors["template"]),
    "Tile": lambda config, _: Tile(config["dim"], config["repeats"]),
    "AddInto": lambda config, tensors: AddInto(config["dim"], tensors["index"]),
}


def build(spec: LayerSpec) -> nn.Module:
    """The layer; it holds the tensors themselves, not copies; parameters are trainable.

    Raises:
        ValueError: an unknown kind, or tensors that are missing, left over or of the wrong shape.
    """
    kind, config, tensors = spec
    if kind not in BUILDERS:
        raise ValueError(f"unknown kind of layer {kind!r}")
    layer = BUILDERS[kind](config, tensors)
    held = {**layer._parameters, **layer._buffers}
    expected = {name: value for name, value in held.items() if value is not None}
    if "num_batches_tracked" in expected and "num_batches_tracked" not in tensors:
        tensors = {**tensors, "num_batches_tracked": torch.zeros((), dtype=torch.long)}
    if set(expected) != set(tensors):
        raise ValueError(f"{kind} needs the tensors {sorted(expected)}, got {sorted(tensors)}")
    for name, value in tensors.items():
        shape = tuple(expected[name].shape)
        if value.shape != shape:
            raise ValueError(f"{kind}.{name} must have shape {shape}, got {tuple(value.shape)}")
        if name in layer._parameters:
            setattr(layer, name, nn.Parameter(value))
        else:
            layer._buffers[name] = value
    return layer

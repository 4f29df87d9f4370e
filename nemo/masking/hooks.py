"""Where masks act: hooks that multiply the outputs of layers, for one forward pass (ours).

A convolution is masked after the BatchNorm that reads it. A BatchNorm may be called for several
layers: it is masked where it reads the output of the masked layer, and there only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nemo.masking.functional import FunctionalLinears, Part
from nemo.masking.pooling import by_row
from nemo.masking.sites import Site

Scale = Callable[[Tensor, Tensor, str], Tensor]
Reading = Callable[[Sequence[Site], Tensor], Tensor]
Act = Callable[[Sequence[Site], Tensor], Tensor]
Unread = list[tuple[Tensor, Sequence[Site]]]
ONE_AT_A_TIME = threading.RLock()  # two threads in one model would mask with each other's masks


@contextmanager
def acting(
    model: nn.Module,
    sites: Sequence[Site],
    masks: Mapping[str, Tensor],
    scale: Scale,
    reading: Reading | None = None,
) -> Iterator[None]:
    """In this context, masks act on each forward pass of `model`.

    Args:
        masks: {layer: (B or 1, N_l)} of all sites, read once the layer has run; or (B, ..., N_l),
            a mask for each position of the output.
        scale: the product of an output and its mask, which broadcasts to it; it is also told the
            name of the module whose output it is.
        reading: is shown the input of a layer, with its sites, and gives the one to use.

    Raises:
        RuntimeError: a BatchNorm did not read what its layer put out, so that no mask acted.
    """
    groups: dict[tuple[str, str | None], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.module, site.part), []).append(site)
    unread: Unread = []  # outputs of layers, until their BatchNorm runs

    def act(group: Sequence[Site], output: Tensor) -> Tensor:
        site = group[0]
        channels = 1 if isinstance(model.get_submodule(site.module), _ConvNd) else output.ndim - 1
        mask = _beside([masks[site.layer] for site in group], site, output, channels)
        return scale(output, mask, site.norm or site.module)

    with ONE_AT_A_TIME, ExitStack() as stack:
        functional = {(name, part): group for (name, part), group in groups.items() if part}
        for (name, part), group in groups.items():
            if part is None:
                for handle in _on_layer(model.get_submodule(name), group, act, reading, unread):
                    stack.callback(handle.remove)
        for norm in {site.norm for site in sites if site.norm is not None}:
            for handle in _on_norm(model.get_submodule(norm), act, unread):
                stack.callback(handle.remove)
        if functional:
            stack.enter_context(_on_functions(model, functional, act, reading))
        yield
    if unread:
        missed = unread[0][1][0]
        raise RuntimeError(
            f"{missed.layer}: its mask did not act, since {missed.norm} did not read its output"
        )


def _on_layer(
    layer: nn.Module, group: Sequence[Site], act: Act, reading: Reading | None, unread: Unread
) -> list[Any]:
    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert reading is not None
        return reading(group, args[0]), *args[1:]

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if group[0].norm is None:
            return act(group, output)
        unread.append((output, group))
        return None

    handles = [] if reading is None else [layer.register_forward_pre_hook(enter)]
    return [*handles, layer.register_forward_hook(leave)]


def _on_functions(
    model: nn.Module, groups: Mapping[Part, Sequence[Site]], act: Act, reading: Reading | None
) -> FunctionalLinears:
    def around(part: Part, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        group = groups.get(part)
        if group is None:
            return compute(x)
        return act(group, compute(x if reading is None else reading(group, x)))

    owners = dict.fromkeys(name for name, _ in groups)
    return FunctionalLinears([(name, model.get_submodule(name)) for name in owners], around)


def _on_norm(norm: nn.Module, act: Act, unread: Unread) -> list[Any]:
    reading: list[Sequence[Site]] = []  # the sites whose output the norm is reading

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reading[:] = [group for output, group in unread if _same(args[0], output)]
        unread[:] = [entry for entry in unread if not _same(args[0], entry[0])]

    def leave(output: Tensor) -> Tensor:
        return act(reading.pop(), output) if reading else output

    handles = [norm.register_forward_pre_hook(enter)]
    inner = getattr(norm, "act", None)
    if isinstance(inner, nn.Module):
        # timm's BatchNormAct2d applies its activation itself: the mask goes in between
        handles.append(inner.register_forward_pre_hook(lambda m, args: leave(args[0])))
    # also where the activation is not called as a module
    handles.append(norm.register_forward_hook(lambda m, args, output: leave(output)))
    return handles


def _same(x: Tensor, output: Tensor) -> bool:
    """Whether x is a layer's output; a backward hook on either module makes a view of it."""
    if x is output or x._base is None:
        return x is output
    return x._base is (output if output._base is None else output._base) and x.shape == output.shape


def _beside(masks: Sequence[Tensor], site: Site, output: Tensor, channels: int) -> Tensor:
    """Masks (B or 1, N) or (B, ..., N) of parts of one output, side by side, shaped to broadcast to
    it."""
    mask = masks[0] if len(masks) == 1 else _joined(masks, site)
    batch = site.batch or 0  # where it is not known, one row is for all samples
    if mask.ndim > 2:
        mask = by_row(mask, site.fold).movedim((0, -1), (batch, channels))
        if mask.shape != output.shape:
            raise ValueError(
                f"{site.layer}: a mask for each position is {tuple(mask.shape)}, the output "
                f"{tuple(output.shape)}; accepted: a pool that gives one mask per sample here"
            )
        return mask
    if site.fold and len(mask) > 1:  # each sample's row for all of its windows
        times = output.shape[batch] // len(mask)
        outer = site.fold == "outer"
        mask = mask.repeat_interleave(times, 0) if outer else mask.repeat(times, 1)
    shape = [1] * output.ndim
    shape[batch], shape[channels] = mask.shape
    return mask.view(shape)


def _joined(masks: Sequence[Tensor], site: Site) -> Tensor:
    if len({mask.ndim for mask in masks}) > 1:
        raise ValueError(
            f"{site.module}: some of its parts have a mask per sample, others one per position; "
            "accepted: a pool that gives the same for all of them"
        )
    return torch.cat(list(masks), -1)

"""Where masks act: hooks that multiply the outputs of layers, for one forward pass (ours).

A convolution is masked after the BatchNorm that reads it. A BatchNorm may be called for several
layers: it is masked where it reads the output of the masked layer, and there only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo.masking.sites import Site

Scale = Callable[[Tensor, Tensor, str], Tensor]
Unread = list[tuple[Tensor, Sequence[Site]]]


@contextmanager
def acting(
    model: nn.Module, sites: Sequence[Site], masks: Mapping[str, Tensor], scale: Scale
) -> Iterator[None]:
    """In this context, masks act on each forward pass of `model`.

    Args:
        masks: {layer: (B or 1, N_l)} of all sites, read once the layer has run.
        scale: the product of an output and its mask, which broadcasts to it; it is also told the
            name of the module whose output it is.

    Raises:
        RuntimeError: a BatchNorm did not read what its layer put out, so that no mask acted.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.module, []).append(site)
    unread: Unread = []  # outputs of layers, until their BatchNorm runs

    def act(group: Sequence[Site], output: Tensor) -> Tensor:
        norm, name = group[0].norm, group[0].module
        last = norm is None and isinstance(model.get_submodule(name), nn.Linear)
        mask = _beside([masks[site.layer] for site in group], output.ndim, -1 if last else 1)
        return scale(output, mask, norm or name)

    handles = []
    for name, group in groups.items():

        def ran(module: nn.Module, args: Any, output: Tensor, group: Any = group) -> Tensor | None:
            if group[0].norm is None:
                return act(group, output)
            unread.append((output, group))
            return None

        handles.append(model.get_submodule(name).register_forward_hook(ran))
    for norm in {site.norm for site in sites if site.norm is not None}:
        handles += _on_norm(model.get_submodule(norm), act, unread)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if unread:
        missed = unread[0][1][0]
        raise RuntimeError(
            f"{missed.layer}: its mask did not act, since {missed.norm} did not read its output"
        )


def _on_norm(
    norm: nn.Module, act: Callable[[Sequence[Site], Tensor], Tensor], unread: Unread
) -> list[Any]:
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
    else:
        handles.append(norm.register_forward_hook(lambda m, args, output: leave(output)))
    return handles


def _same(x: Tensor, output: Tensor) -> bool:
    """Whether x is a layer's output; a backward hook on either module makes a view of it."""
    if x is output or x._base is None:
        return x is output
    return x._base is (output if output._base is None else output._base) and x.shape == output.shape


def _beside(masks: Sequence[Tensor], rank: int, channels: int) -> Tensor:
    """Masks (B, N) of parts of one output, side by side, shaped to broadcast to it."""
    mask = masks[0] if len(masks) == 1 else torch.cat(list(masks), 1)
    shape = [mask.shape[0], *[1] * (rank - 1)]
    shape[channels] = mask.shape[1]
    return mask.view(shape)

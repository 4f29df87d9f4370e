"""Phase 1: the masked model, as a float64 copy whose masked rows are zero parameters (ours).

A mask multiplies the output of a layer by 0 or 1, so it is the same as zeroing the rows of the
parameters that produce this output: gamma and beta of the BatchNorm the mask acts after, else the
weight and the bias of the layer. The masked model needs no other change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nemo.masking.sites import Site


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor], sites: Sequence[Site]) -> nn.Module:
    """A float64 copy of `model` on the CPU, in eval mode, with masked rows zeroed.

    Args:
        masks: {layer: bool (N_l,)}; a fused layer may also be named by its module, at full width.

    Raises:
        ValueError: a layer that does not exist, or a mask of the wrong type or length.
    """
    places = _places(sites)
    double = copy.deepcopy(model).cpu().double().eval().requires_grad_(False)
    for layer, mask in masks.items():
        if layer not in places:
            known = ", ".join(sorted(places)) or "none"
            raise ValueError(f"masks: no layer called {layer!r}; the model has: {known}")
        module, norm, start, stop = places[layer]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise ValueError(f"masks[{layer!r}] must be a bool tensor, got {kind}")
        if mask.shape != (stop - start,):
            got = tuple(mask.shape)
            raise ValueError(f"masks[{layer!r}] must have shape ({stop - start},), got {got}")
        off = start + (~mask.cpu()).nonzero().flatten()
        _zero(double.get_submodule(module), off)
        if norm is not None:
            _zero(double.get_submodule(norm), off)
    return double


def by_module(masks: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """{path of the module after which a mask acts: bool (rows,)}, for masks of whole modules."""
    return {
        site.norm or site.module: masks[site.layer].cpu()
        for site in sites
        if site.layer in masks and site.layer == site.module
    }


def _places(sites: Sequence[Site]) -> dict[str, tuple[str, str | None, int, int]]:
    """Where each maskable name lives: module, norm, first and last row; fused modules included."""
    places: dict[str, tuple[str, str | None, int, int]] = {}
    for site in sites:
        start, stop = places.get(site.module, (None, None, site.start, site.stop))[2:]
        places[site.module] = (site.module, None, min(start, site.start), max(stop, site.stop))
    for site in sites:
        places[site.layer] = (site.module, site.norm, site.start, site.stop)
    return places


def _zero(module: nn.Module, rows: Tensor) -> None:
    """Make the output of `module` zero at `rows`, given a zero input there if it is a norm."""
    # A norm without affine parameters gives (0 - 0) / std.
    for name in ("weight", "bias") if module.weight is not None else ("running_mean",):
        value = getattr(module, name, None)
        if value is not None:
            value.data[rows] = 0.0

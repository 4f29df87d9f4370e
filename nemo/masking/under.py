"""A model under given masks: constants where a modular model has mask generators (ours)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nemo.masking.hooks import acting
from nemo.masking.sites import CLASSIFIER, UNCALLED, Site
from nemo.signature import Signature
from nemo.tracing import check_traceable

Masks = Mapping[str, Tensor]


class Under(nn.Module):
    """`model` with constant masks, which act exactly where those of mask generators do.

    It is called as the model is, and returns what the model returns. It holds the model itself, not
    a copy; outside its own forward pass the model is not masked.

    Attributes:
        masks: {layer: (B or 1, N_l)}, in the model's dtype; of layers with a mask, and those fused
            with them.
        found: the sites of all layers.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], masks: Masks) -> None:
        super().__init__()
        self.model = model
        self.found = list(sites)
        given = by_layer(masks, sites)
        modules = {site.module for site in sites if site.layer in given}
        self.sites = [site for site in sites if site.module in modules]
        like = next(model.parameters(), torch.zeros(()))
        rows = max((len(mask) for mask in given.values() if mask.ndim > 1), default=1)
        for i, site in enumerate(self.sites):  # of a fused layer all parts, masked or not
            mask = given.get(site.layer, torch.ones(site.neurons)).to(like)
            own = 1 if site.batch is None else rows
            self.register_buffer(f"mask_{i}", mask.expand(own, -1))

    @property
    def masks(self) -> dict[str, Tensor]:
        return {site.layer: self.get_buffer(f"mask_{i}") for i, site in enumerate(self.sites)}

    @contextmanager
    def acting(self) -> Iterator[None]:
        """In this context, the masks act on the model itself."""
        with acting(self.model, self.sites, self.masks, lambda output, mask, _: output * mask):
            yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.acting():
            return self.model(*args, **kwargs)

    def in_double(self) -> Under:
        """A float64 copy on the CPU, in eval mode, without gradients."""
        tensors = [v for m in self.modules() for v in vars(m).values() if isinstance(v, Tensor)]
        # computed weights (weight_norm, prune) that still hang on a graph, which deepcopy refuses
        memo = {id(value): value.detach().clone() for value in tensors if not value.is_leaf}
        return copy.deepcopy(self, memo).cpu().double().eval().requires_grad_(False)


def check_early(model: nn.Module, takes: Signature) -> None:
    """Refuse before a training what cannot be proved or cut after it.

    Raises:
        ValueError: the model does not run in float64, or cannot be traced.
    """
    double = Under(model, [], {}).in_double().model
    try:
        with torch.no_grad():
            takes.run(double, takes.draw(1, 0))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the model does not run in float64, in which modules are proved: {reason}; accepted: "
            "x.to(weight.dtype) instead of x.float(), and torch.zeros(n, dtype=x.dtype)"
        ) from error
    check_traceable(double, takes)


def by_layer(masks: Masks, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Masks by the names of layers only, checked: those of whole fused modules become parts."""
    if not isinstance(masks, Mapping):
        raise ValueError(f"masks: a {type(masks).__name__}; accepted: {{layer: bool (N_l,)}}")
    layers = {site.layer: site for site in sites}
    fused = {site.module: site for site in sites if site.module not in layers}  # its last part
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        site = layers.get(name) or fused.get(name)
        if site is None:
            known = ", ".join(sorted({*layers, *fused})) or "none"
            raise ValueError(f"masks: no layer called {name!r}; the model has: {known}")
        if site.skip == UNCALLED:
            raise ValueError(f"masks[{name!r}]: this layer cannot be masked: it is {UNCALLED}")
        if site.skip == CLASSIFIER:
            raise ValueError(
                f"masks[{name!r}]: this layer is the classifier, and without a neuron it lacks a "
                "logit; accepted: classes=[...] of decompose, which selects logits"
            )
        if not isinstance(mask, Tensor) or not (
            mask.dtype == torch.bool or mask.is_floating_point()
        ):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"masks[{name!r}] must be a bool tensor, got {kind}")
        width = site.neurons if name in layers else site.stop
        if mask.ndim not in (1, 2) or mask.shape[-1] != width:
            wanted = f"(B, {width}) or ({width},)"
            raise ValueError(f"masks[{name!r}] must have shape {wanted}, got {tuple(mask.shape)}")
        if mask.ndim == 2 and site.batch is None:
            raise ValueError(
                f"masks[{name!r}]: which rows of this layer are a sample's is not known; "
                f"accepted: one mask ({width},) for all samples"
            )
        parts = [site] if name in layers else [s for s in sites if s.module == name]
        for part in parts:
            start = part.start if name not in layers else 0
            found[part.layer] = mask[..., start : start + part.neurons]
    return found

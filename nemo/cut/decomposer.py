"""The phases of a decomposition, in order; see `nemo.cut`."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo.cost import count_flops, count_parameters
from nemo.cut.builder import Builder
from nemo.cut.facts import analyse
from nemo.cut.passes.compact import drop_streams
from nemo.cut.passes.dead_norms import merge_dead
from nemo.cut.passes.heads import order_heads
from nemo.cut.passes.split import split_projections
from nemo.cut.plan import blocked, plan
from nemo.cut.rewrite import rewrite
from nemo.cut.rules import rule_of
from nemo.cut.trace import Traced, evaluate, trace
from nemo.cut.verify import verify
from nemo.cut.zeroing import by_module, masked_copy
from nemo.masking.sites import Site, example_input, find_sites
from nemo.module.check import logits_of
from nemo.module.decomposed import DecomposedModule

MODES = ("exact", "compact")


def decompose(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    classes: Sequence[int] | None = None,
    *,
    mode: str = "exact",
    example: Tensor | None = None,
    tolerance: float = 1e-9,
) -> DecomposedModule:
    """Cut the masked neurons out of a copy of `model`.

    Args:
        model: any module that torch.export accepts and that maps (B, C, H, W) images to one tensor,
            or a modular model, whose base is taken.
        masks: {layer: bool (N_l,)}, False for the neurons to remove.
        classes: the classes whose logits are returned, in this order. The default is
            `masks.classes` if the masks have it, else all.
        mode: "exact" computes what the masked model computes, proved by a check in float64.
            "compact" also drops channels of residual streams that their last writer masks off. It
            is smaller and not exact; the check is against the model without these channels.
        example: (B >= 1, C, H, W), of which only the shape matters. The default is the size that
            `modularize` saw, or that the model declares.
        tolerance: of the check, relative to the standard deviation of the output.

    Raises:
        ValueError: unknown layers, masks that do not fit, classes that do not exist.
        ExactnessError: the check failed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    base = _base(model)
    classes = getattr(masks, "classes", None) if classes is None else classes
    example = example_input(model) if example is None else example
    images = torch.zeros(2, *example.shape[1:])
    reference = next(base.parameters())
    sites = find_sites(base, images.to(reference))
    parent = masked_copy(base, masks, sites)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()
    traced = trace(parent, noise)
    chosen = _check_classes(classes, traced)
    size = tuple(images.shape[1:])
    expected, loss = logits_of(parent, size, chosen), {}
    if mode == "compact":
        exact, dropped = expected, drop_streams(traced, by_module(masks, sites))
        expected = logits_of(lambda x: evaluate(traced, x)[traced.output], size, chosen)
        loss = {"dropped": dropped, "deviation": float((expected - exact).abs().max())}
    names = {(site.module, site.start): site.layer for site in sites}
    split_projections(traced, noise[:1], names)
    del parent
    gc.collect()  # of cycles from torch.export; they hold what the graph no longer uses
    build = _reduce(traced, noise[:1], chosen)
    module = DecomposedModule(build.program(size)).eval()
    module.certificate = {"mode": mode, **verify(module, expected, build, tolerance), **loss}
    module.classes = chosen
    module = module.to(reference)
    module.report = _report(base, module, masks, sites, build, images.to(reference))
    return module


def _base(model: nn.Module) -> nn.Module:
    """The model itself, or the one inside a modular model."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) and hasattr(model, "generators") else model


def _check_classes(classes: Sequence[int] | None, traced: Traced) -> list[int] | None:
    if classes is None:
        return None
    dims = traced.output.meta["dims"]
    count = dims[-1]
    chosen = [int(c) for c in classes]
    if len(dims) != 2 or count is None:
        raise ValueError(f"classes need a model that returns (B, classes), this one returns {dims}")
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < count for c in chosen):
        raise ValueError(f"classes must be distinct, at least one, in 0..{count - 1}, got {chosen}")
    return chosen


def _reduce(traced: Traced, image: Tensor, classes: list[int] | None) -> Builder:
    """From the graph to the steps of the module."""
    wanted = None
    if classes is not None:
        wanted = torch.zeros(traced.output.meta["dims"][-1], dtype=torch.bool)
        wanted[classes] = True
    facts = analyse(traced, rule_of, image, wanted)
    edits = [order_heads(facts), merge_dead(facts)]
    if any(edits):
        del facts  # it holds about as much as the model
        facts = analyse(traced, rule_of, image, wanted)
    kept = plan(facts)
    return rewrite(facts, kept, classes)


def _report(
    parent: nn.Module,
    module: DecomposedModule,
    masks: Mapping[str, Tensor],
    sites: Sequence[Site],
    build: Builder,
    images: Tensor,
) -> dict[str, Any]:
    """What was kept, what is left, and which ops stood in the way."""
    layers = {
        site.layer: {
            "kept": int(masks[site.layer].sum()) if site.layer in masks else site.neurons,
            "total": site.neurons,
        }
        for site in sites
    }
    return {
        "layers": layers,
        "rows_left": dict(sorted(build.left.items())),
        "blocked": blocked(build.facts, build.kept),
        "parameters": count_parameters(module),
        "parent_parameters": count_parameters(parent),
        "flops": count_flops(module, images),
        "parent_flops": count_flops(parent, images),
    }

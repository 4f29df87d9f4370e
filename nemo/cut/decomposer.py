"""The phases of a decomposition, in order; see `nemo.cut`."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo.cost import count_flops, count_parameters
from nemo.cut.compact import drop_streams
from nemo.cut.dead_norms import merge_dead
from nemo.cut.facts import analyse
from nemo.cut.heads import order_heads
from nemo.cut.masking import by_module, masked_copy
from nemo.cut.ops import rule_of
from nemo.cut.plan import blocked, plan
from nemo.cut.rewrite import Builder, assemble, rewrite
from nemo.cut.split import split_projections
from nemo.cut.trace import Traced, evaluate, trace
from nemo.cut.verify import logits_of, verify
from nemo.masking.sites import Site, example_input, find_sites
from nemo.module.program import DecomposedModule

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
    """`nemo.cut.decompose`, which says what it takes and gives."""
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
    expected = masked = logits_of(parent, size, chosen)
    if mode == "compact":
        dropped = drop_streams(traced, by_module(masks, sites))
        expected = logits_of(lambda x: evaluate(traced, x)[traced.output], size, chosen)
    names = {(site.module, site.start): site.layer for site in sites}
    split_projections(traced, noise[:1], names)
    del parent
    gc.collect()  # of cycles from torch.export; they hold what the graph no longer uses
    build = _reduce(traced, noise[:1], chosen)
    module = assemble(build, size).eval()
    module.certificate = {"mode": mode, **verify(module, expected, build, tolerance)}
    if mode == "compact":
        module.certificate["dropped"] = dropped
        module.certificate["deviation"] = float((expected - masked).abs().max())
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

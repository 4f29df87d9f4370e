"""The phases of a decomposition, in order; see `nemo.cut`."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from nemo.cost import count_flops, count_parameters
from nemo.cut.builder import Builder
from nemo.cut.difference import first_difference
from nemo.cut.facts import analyse
from nemo.cut.passes.compact import drop_streams
from nemo.cut.passes.constants import fold_constants
from nemo.cut.passes.dead_norms import merge_dead
from nemo.cut.passes.heads import order_heads
from nemo.cut.passes.names import name_functions
from nemo.cut.passes.split import split_projections
from nemo.cut.passes.straighten import straighten
from nemo.cut.plan import blocked, plan
from nemo.cut.rewrite import rewrite
from nemo.cut.rules import rule_of
from nemo.cut.trace import Traced, evaluate, trace
from nemo.masking.generators import takes_of, under
from nemo.masking.labels import positions
from nemo.masking.sites import Site
from nemo.masking.under import by_layer
from nemo.module.check import ExactnessError
from nemo.module.decomposed import DecomposedModule
from nemo.proof import at_other_sizes, certify, expected_of
from nemo.signature import bare, moved

MODES = ("exact", "compact")


def decompose(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    classes: Sequence[int] | None = None,
    *,
    mode: str = "exact",
    example: Any = None,
    output: str | int | None = None,
    tolerance: float = 1e-9,
) -> DecomposedModule:
    """Cut the masked neurons out of a copy of `model`.

    Args:
        model: any module that torch.export accepts, or a modular model.
        masks: {layer: bool (N_l,)}, False for the neurons to remove.
        classes: the classes whose logits are returned, in this order. The default is
            `masks.classes` if the masks have it, else all.
        mode: "exact" computes what the masked model computes, proved by a check in float64.
            "compact" also drops channels of residual streams that their last writer masks off. It
            is smaller and not exact; the check is against the model without these channels.
        example, output: of a plain model, as for `modularize`; a modular one knows them.
        tolerance: of the check, relative to the standard deviation of the output.

    Returns:
        A module that is called as the model is, by the same names, and returns one tensor, of which
        `classes` are entries of the last dimension.

    Raises:
        ValueError: unknown layers, masks that do not fit, classes that do not exist, logits that
            are not finite; what `modularize` raises.
        ExactnessError: the check failed.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(tolerance, Real) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: {tolerance!r}; accepted: a number, 0 or above")
    classes = getattr(masks, "classes", None) if classes is None else classes
    wanted = None if classes is None else positions(classes)
    model, reference = bare(model), next(model.parameters())
    takes = takes_of(model, example, output)
    masked = under(model, masks, takes)
    sites, masks = masked.found, _checked(masks, masked.found)
    noise, double = takes.draw(2, 1), masked.in_double()
    with double.acting():
        traced = trace(double.model, takes, noise)
    chosen = _check_classes(wanted, traced)
    expected, loss = expected_of(partial(takes.run, double), takes, chosen), {}
    elsewhere = at_other_sizes(partial(takes.run, double), takes, chosen)
    del double
    names = {(site.module, site.start): site.layer for site in sites}
    name_functions(traced, names)
    fold_constants(traced)
    if mode == "compact":
        exact, dropped = expected, drop_streams(traced, _whole(masks, sites))
        expected = expected_of(lambda x: evaluate(traced, x)[traced.output], takes, chosen)
        loss = {"dropped": dropped, "deviation": float((expected - exact).abs().max())}
        elsewhere = None  # the model without these channels is a graph, of one size
    sample = [x[:1] for x in noise]
    straighten(traced, sample)
    split_projections(traced, sample, names)
    gc.collect()  # of cycles from torch.export; they hold what the graph no longer uses
    build = _reduce(traced, sample, chosen)
    module = DecomposedModule(build.program()).eval()
    try:
        certificate = certify(module, expected, tolerance, elsewhere)
    except ExactnessError as error:
        where = first_difference(module, build, tolerance)
        raise ExactnessError(f"{error}; the difference starts at {where}") from error
    module.certificate = {"mode": mode, **certificate, **loss}
    module.classes = chosen
    module = module.to(reference)
    module.report = _report(masked.model, module, masks, sites, build)
    return module


def _checked(masks: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """By the names of layers, fused ones in parts; only bool, since what is cut is gone."""
    found = by_layer(masks, sites)
    for layer, mask in found.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"masks[{layer!r}] must be a bool tensor, got {mask.dtype}")
        if mask.ndim != 1:
            got = tuple(mask.shape)
            raise ValueError(
                f"masks[{layer!r}] must have one dimension, got shape {got}; of class masks, take "
                "those of some classes: class_masks.select([3, 5])"
            )
    return {layer: mask.cpu() for layer, mask in found.items()}


def _whole(masks: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Tensor]:
    """{module after which a mask acts: bool (rows,)}, of masks that act alone, on whole modules."""
    acting = Counter(site.norm or site.module for site in sites)
    return {
        site.norm or site.module: masks[site.layer]
        for site in sites
        if site.layer in masks and acting[site.norm or site.module] == 1
    }


def _check_classes(chosen: list[int] | None, traced: Traced) -> list[int] | None:
    if chosen is None:
        return None
    dims = traced.output.meta["dims"]
    count = dims[-1]
    if len(dims) < 2 or count is None:
        raise ValueError(f"classes need a model that returns (B, classes), this one returns {dims}")
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= c < count for c in chosen):
        raise ValueError(f"classes must be distinct, at least one, in 0..{count - 1}, got {chosen}")
    return chosen


def _reduce(traced: Traced, sample: list[Tensor], classes: list[int] | None) -> Builder:
    """From the graph to the steps of the module."""
    wanted = None
    if classes is not None:
        wanted = torch.zeros(traced.output.meta["dims"][-1], dtype=torch.bool)
        wanted[classes] = True
    facts = analyse(traced, rule_of, sample, wanted)
    edits = [order_heads(facts), merge_dead(facts)]
    if any(edits):
        del facts  # it holds about as much as the model
        facts = analyse(traced, rule_of, sample, wanted)
    kept = plan(facts)
    return rewrite(facts, kept, classes)


def _report(
    parent: nn.Module,
    module: DecomposedModule,
    masks: Mapping[str, Tensor],
    sites: Sequence[Site],
    build: Builder,
) -> dict[str, Any]:
    """What was kept, what is left, and which ops stood in the way."""
    takes = module.takes
    sample = takes.batch(moved(takes.draw(1, 0), next(parent.parameters())))
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
        "flops": count_flops(module, sample),
        "parent_flops": count_flops(parent, sample),
    }

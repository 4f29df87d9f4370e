"""Cut some classes out of a model that was trained elsewhere, to a given size (ours)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from nemo.cut.decomposer import decompose
from nemo.masking.generators import Modular, as_modular
from nemo.masking.observed import Observed, choose
from nemo.masking.selectors import SELECTORS
from nemo.module.decomposed import DecomposedModule

SIZES = ("parameters", "flops")
CLOSE = 0.98  # of the share that is asked for: near enough


def shrink(
    modular: Modular,
    loader: Iterable[tuple[Any, Tensor]],
    classes: Sequence[int],
    *,
    keep: float,
    of: str = "parameters",
    selector: str = "taylor",
) -> DecomposedModule:
    """Cut `classes` out of a trained model, as large as `keep` allows.

    The selector's own setting `keep`, the share of each layer's neurons that a class keeps, is
    found by bisection: every module on the way is cut and counted. `info["settings"]` of the result
    has it, so that `class_masks` gives the same masks again.

    Args:
        modular: from `nemo.modularize`, of the trained model; its generators stay unused.
        loader: as for `class_masks`: the training images of all classes. Run through once.
        classes: positions, in the order that the module's logits shall have.
        keep: the share of the model's parameters or FLOPs that the module has at most; above 0,
            below 1.
        of: parameters, or flops of one sample.
        selector: taylor, activation, or one of your own that has a setting `keep`.

    Raises:
        ValueError: no modular model, no such selector or class, or even one neuron a layer and
            class is more than `keep`; the message has the smallest share.
        ExactnessError: a module is not exact; see `decompose`.
    """
    if of not in SIZES:
        raise ValueError(f"of: {of!r}; accepted: {', '.join(SIZES)}")
    if not isinstance(keep, Real) or not 0 < keep < 1:
        raise ValueError(f"keep: {keep!r}; accepted: a share of the {of}, above 0 and below 1")
    if "keep" not in SELECTORS.named(selector).params.model_fields:
        raise ValueError(
            f"selector: {selector!r} has no setting keep; accepted: taylor, activation, or one of "
            "yours that has it"
        )
    modular = as_modular(modular)
    observed, best, share = Observed(modular, loader), None, 1.0
    low, high = 0.0, 1.0  # shares of neurons: of a module that fits, and of one that may not
    while high - low > 0.5 / max(modular.layers.values()):
        middle = (low + high) / 2
        masks = choose(observed, selector, {"keep": middle})
        module = decompose(modular, masks.select(classes))
        share = module.report[of] / module.report[f"parent_{of}"]
        if share > keep:
            high = middle
            continue
        module.info["settings"] = {"masks.selector": selector, "masks.keep": middle}
        low, best = middle, module
        if share >= CLOSE * keep:
            break
    if best is None:
        raise ValueError(
            f"keep: {keep} of the {of}, and one neuron a layer and class already has {share:.3f}; "
            "accepted: more than that"
        )
    return best

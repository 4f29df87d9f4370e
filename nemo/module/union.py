"""Two modules as one model, with logits that can be compared (ours).

The union of class subsets of one parent is an OR of masks: `class_masks.select([...])`. Modules of
different parents share nothing, and nothing ties the scale of one's logits to the other's. So each
module keeps its weights and gets two numbers, a scale and a bias, that minimise the cross-entropy
of all the logits together on validation images. The result is one more module: both programs,
side by side, and a concatenation.

Shapes: B images, N validation images, T_a and T_b classes of the modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo.module.decomposed import DecomposedModule
from nemo.module.layers import LayerSpec
from nemo.module.program import Program, Ref, Step
from nemo.predict import accuracy, predict


class Calibration(NamedTuple):
    """What a module's logits are multiplied by, and what is then added to them."""

    scale: float = 1.0
    bias: float = 0.0


def merge(
    a: DecomposedModule, b: DecomposedModule, loader: Iterable[tuple[Any, Tensor]]
) -> DecomposedModule:
    """One module for the classes of `a` and then those of `b`.

    It is called as `a` is. If `b` was trained on images normalised differently, they are
    converted inside. It holds copies of the weights, and is saved, loaded and run like any module.
    `info["merged"]` names the parts with their scales and biases.

    Args:
        a, b: modules with disjoint classes that are called alike, cut from whatever parents.
        loader: batches of held-out inputs, images normalised as for `a`, on its device, and labels
            (B,) of integers in 0..T_a+T_b-1; some of each module's classes.

    Raises:
        ValueError: see `check_mergeable`; or a layer that was replaced or has a hook; or no
            batches of (inputs, labels), or logits or labels that do not fit, or are not finite.
    """
    for module in (a, b):
        if not isinstance(module, DecomposedModule):
            kind = type(module).__name__
            raise ValueError(f"a {kind} cannot be merged; accepted: what nemo.decompose returns")
        module.check_layers("merge")
    names = check_mergeable(a, b)
    raw, labels = predict(_assemble(a, b, Calibration(), Calibration()), loader)
    labels = labels.long()
    if raw.ndim != 2 or len(raw) != len(labels):
        raise ValueError(
            f"the logits of {len(labels)} labels have shape {tuple(raw.shape)}; accepted: "
            "(samples, classes)"
        )
    if not raw.isfinite().all():
        raise ValueError("the modules' logits are not finite; accepted: finite inputs and weights")
    count = len(class_names(a))
    if not 0 <= labels.min() < count <= labels.max() < len(names):
        raise ValueError(
            f"labels must lie in 0..{len(names) - 1}, some below {count} and some not, "
            f"got {labels.min()}..{labels.max()}"
        )
    parts = calibrate(raw, labels, count)
    merged = _assemble(a, b, *parts)
    merged.report, merged.certificate = _report(a, b), _certificate(a, b)
    merged.info = _info(a, b, parts)
    if "finetuned" in a.info and "finetuned" in b.info:
        measured = accuracy(apply(raw, parts, count), labels)
        merged.info["finetuned"] = {"val_accuracy": round(measured, 6)}
    return merged


def check_mergeable(a: DecomposedModule, b: DecomposedModule) -> list[str]:
    """The names of the merged module's classes.

    Raises:
        ValueError: a class in both, different inputs, outputs or dtypes, a module that does not
            name its classes, or only one that says how its images are normalised.
    """
    first, second = class_names(a), class_names(b)
    both = sorted(set(first) & set(second))
    if both:
        raise ValueError(f"both modules have the classes {', '.join(both)}; accepted: disjoint")
    if a.takes.plain and b.takes.plain and a.takes != b.takes:
        sizes = [" x ".join(map(str, m.input_size)) for m in (a, b)]
        raise ValueError(
            f"the modules take images of {sizes[0]} and {sizes[1]}; accepted: one size"
        )
    if a.takes != b.takes:
        raise ValueError(
            f"the modules take {a.takes}, and {b.takes}; accepted: the same inputs and output"
        )
    kinds = [str(next(m.parameters()).dtype).removeprefix("torch.") for m in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"the modules compute in {kinds[0]} and {kinds[1]}; accepted: one dtype")
    if ("preprocessing" in a.info) != ("preprocessing" in b.info):
        raise ValueError("only one module says how images are normalised; accepted: both or none")
    return [*first, *second]


def class_names(module: DecomposedModule) -> list[str]:
    """The names a module was saved with, or its parent's numbers for them.

    Raises:
        ValueError: it has neither.
    """
    names = module.info.get("class_names") or module.classes
    if not names:
        raise ValueError("a module does not name its classes; cut it with `classes`")
    return [str(name) for name in names]


def calibrate(logits: Tensor, labels: Tensor, count: int) -> tuple[Calibration, Calibration]:
    """The scale and bias of each module that minimise the cross-entropy, a convex problem.

    The prior is that logits are right as they are, give or take 1: it weighs as much as one image
    or so, and keeps the numbers finite where all images are told apart without an error.

    Args:
        logits: (N, T_a+T_b), uncalibrated.
        labels: (N,).
        count: T_a.
    """
    # the copies are ordinary tensors, which those of inference mode are not
    logits, labels = logits.double().clone(), labels.clone()
    scales = torch.ones(2, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scales, biases], max_iter=100, line_search_fn="strong_wolfe")
    widths = torch.tensor([count, logits.shape[1] - count])

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = logits * scales.repeat_interleave(widths) + biases.repeat_interleave(widths)
        prior = 0.5 * ((scales - 1).square().sum() + biases.square().sum())
        loss = F.cross_entropy(scaled, labels) + prior / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = zip(scales.tolist(), biases.tolist(), strict=True)
    first, second = (Calibration(round(scale, 6), round(bias, 6)) for scale, bias in found)
    return first, second


def apply(logits: Tensor, parts: tuple[Calibration, Calibration], count: int) -> Tensor:
    """Calibrated logits (N, T_a+T_b) from uncalibrated ones, of which the first `count` are a's."""
    sides = zip(logits.split([count, logits.shape[1] - count], 1), parts, strict=True)
    return torch.cat([side * part.scale + part.bias for side, part in sides], 1)


def _assemble(
    a: DecomposedModule, b: DecomposedModule, of_a: Calibration, of_b: Calibration
) -> DecomposedModule:
    """Both programs and their concatenation; names of a's steps begin with a_, of b's with b_."""
    layers, steps = _renormalise(a, b)
    normalised = {a.takes.names[0]: steps[-1].name} if steps else {}
    for side, module, entry, part in (("a", a, {}, of_a), ("b", b, normalised, of_b)):
        program = module.definition().prefixed(f"{side}_", entry)
        for name, (kind, config, tensors) in program.layers.items():
            copies = {key: value.clone() for key, value in tensors.items()}
            layers[name] = LayerSpec(kind, config, copies)
        steps += program.steps
        output, scaled = Ref(program.output), Ref(f"scaled_{side}")
        steps.append(Step(scaled.name, "aten.mul.Scalar", False, (output, part.scale)))
        steps.append(Step(f"logits_{side}", "aten.add.Scalar", False, (scaled, part.bias)))
    both = [Ref("logits_a"), Ref("logits_b")]
    steps.append(Step("logits", "aten.cat.default", False, (both, 1)))
    unlisted = {**a.unlisted, **b.unlisted}
    return DecomposedModule(Program(layers, steps, "logits", a.takes, unlisted)).eval()


def _renormalise(
    a: DecomposedModule, b: DecomposedModule
) -> tuple[dict[str, LayerSpec], list[Step]]:
    """Layers and steps from an image as `a` takes it to one as `b` does; none if they agree."""
    how = [module.info.get("preprocessing", {}) for module in (a, b)]
    if all(how[0].get(key) == how[1].get(key) for key in ("mean", "std")):
        return {}, []
    (mean_a, std_a), (mean_b, std_b) = [
        [torch.tensor(h[key]).double().view(1, -1, 1, 1) for key in ("mean", "std")] for h in how
    ]
    reference = next(b.parameters())
    values = {"factor": std_a / std_b, "offset": (mean_a - mean_b) / std_b}
    layers = {
        name: LayerSpec("Constant", {"trainable": False}, {"value": value.to(reference)})
        for name, value in values.items()
    }
    return layers, [
        Step("factor", "factor", True),
        Step("offset", "offset", True),
        Step("multiplied", "aten.mul.Tensor", False, (Ref(a.takes.names[0]), Ref("factor"))),
        Step("renormalised", "aten.add.Tensor", False, (Ref("multiplied"), Ref("offset"))),
    ]


def _report(a: DecomposedModule, b: DecomposedModule) -> dict[str, Any]:
    """Sums, and the layers of both."""
    sides = (("a", a.report), ("b", b.report))
    added = ("parameters", "parent_parameters", "flops", "parent_flops")
    return {
        **{key: a.report[key] + b.report[key] for key in added},
        **{
            key: {f"{side}.{name}": value for side, r in sides for name, value in r[key].items()}
            for key in ("layers", "rows_left")
        },
        "blocked": sorted({op for _, r in sides for op in r["blocked"]}),
    }


def _certificate(a: DecomposedModule, b: DecomposedModule) -> dict[str, Any]:
    """Each side's logits are its module's, scaled and shifted: the larger error is that of both."""
    parts = [a.certificate, b.certificate]
    return {
        "mode": "merge",
        "error": max(part["error"] for part in parts),
        "fixed_size": any(part.get("fixed_size", True) for part in parts),
        "parts": parts,
    }


def _info(
    a: DecomposedModule, b: DecomposedModule, parts: tuple[Calibration, Calibration]
) -> dict[str, Any]:
    """Where the parts come from, how they are calibrated, and what `a` says of its images."""
    info: dict[str, Any] = {"class_names": [*class_names(a), *class_names(b)]}
    if "preprocessing" in a.info:
        info["preprocessing"] = a.info["preprocessing"]
    for key in ("cell", "parent_sha256"):
        if key in a.info and key in b.info:
            info[key] = f"{a.info[key]} and {b.info[key]}"
    info["merged"] = [
        {"info": module.info, "scale": part.scale, "bias": part.bias}
        for module, part in ((a, parts[0]), (b, parts[1]))
    ]
    return info

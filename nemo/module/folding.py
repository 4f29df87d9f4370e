"""Phase 7, on request: a module that only predicts, with its BatchNorms folded away (ours).

In eval mode a BatchNorm is y = a x + c per channel, which the convolution before it can do by
itself. The result is a program of fewer steps over the same layers, so it is saved and loaded like
any module; but its normalisation is gone, so it is frozen.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch

from nemo.cost import count_parameters
from nemo.cut.verify import ExactnessError, logits_of
from nemo.module.layers import LayerSpec
from nemo.module.program import DecomposedModule
from nemo.module.steps import Step

TOLERANCE = 1e-9  # of the largest logit, in float64


def optimize_for_inference(module: DecomposedModule) -> DecomposedModule:
    """A frozen copy of `module` in eval mode, without BatchNorms that a convolution can absorb.

    Its certificate also says what folding changed: `folding_error`, in float64, relative to the
    largest logit. In float32 the two differ by rounding.

    Raises:
        ExactnessError: on random images the two differ by more than float64's rounding.
    """
    wide = copy.deepcopy(module).cpu().double().eval()
    folded = _folded(wide)
    expected, actual = (logits_of(m, module.input_size, None) for m in (wide, folded))
    error = float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-300))
    if not error <= TOLERANCE:
        raise ExactnessError(f"folding changed the logits by {error:.3g} of the largest")
    reference = next(module.parameters(), torch.zeros(0))
    folded = folded.to(reference).requires_grad_(False)
    folded.classes, folded.info = copy.deepcopy((module.classes, module.info))
    folded.report = {**copy.deepcopy(module.report), "parameters": count_parameters(folded)}
    folded.certificate = {**copy.deepcopy(module.certificate), "folding_error": error}
    return folded


def _folded(module: DecomposedModule) -> DecomposedModule:
    """The same program without dropouts, and without norms that follow a convolution alone."""
    layers = {name: _spec(module, name) for name in module.kinds}
    readers = Counter(name for step in module.steps for name in step.reads())
    readers[module.output] += 1
    calls = Counter(step.target for step in module.steps)
    steps: list[Step] = []
    makers: dict[str, str] = {}  # the layer that makes a value
    instead: dict[str, str] = {}
    for old in module.steps:
        step = old.renamed(instead)
        kind = layers[step.target].kind if step.is_layer else ""
        source = step.reads()[0] if step.reads() else ""
        maker = makers.get(source, "")
        if kind.startswith("BatchNorm") and maker and readers[source] == 1:
            layers[maker] = fold(layers[maker], layers[step.target])
        elif not kind.startswith("Dropout"):
            steps.append(step)
            if kind.startswith("Conv") and calls[step.target] == 1:
                makers[step.name] = step.target
            continue
        instead[step.name] = source
        readers[source] += readers[step.name] - 1
    held = {step.target: layers[step.target] for step in steps if step.is_layer}
    output = instead.get(module.output, module.output)
    return DecomposedModule(held, steps, output, module.input_size, module.unlisted).eval()


def fold(conv: LayerSpec, norm: LayerSpec) -> LayerSpec:
    """One convolution that computes norm(conv(x)) in eval mode."""
    scale = (norm.tensors["running_var"] + norm.config["eps"]).rsqrt()
    scale = scale * norm.tensors.get("weight", 1.0)
    shift = norm.tensors.get("bias", 0.0) - norm.tensors["running_mean"] * scale
    weight = conv.tensors["weight"]
    tensors = {
        "weight": weight * scale.view(-1, *[1] * (weight.ndim - 1)),
        "bias": conv.tensors.get("bias", 0.0) * scale + shift,
    }
    return LayerSpec(conv.kind, conv.config, tensors)


def _spec(module: DecomposedModule, name: str) -> LayerSpec:
    kind, config = module.kinds[name]
    return LayerSpec(kind, config, dict(module.get_submodule(name).state_dict()))

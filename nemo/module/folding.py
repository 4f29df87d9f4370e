"""A program that only predicts, with its BatchNorms folded away (ours).

In eval mode a BatchNorm is y = a x + c per channel, which the convolution before it can do by
itself. The result is a program of fewer steps over the same layers, so it is saved and loaded like
any module; but its normalisation is gone, so it is frozen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from nemo.module.layers import LayerSpec
from nemo.module.program import Program, Step


def folded(program: Program) -> Program:
    """The same program without dropouts, and without norms that follow a convolution alone."""
    layers = dict(program.layers)
    readers = Counter(name for step in program.steps for name in step.reads())
    readers[program.output] += 1
    calls = Counter(step.target for step in program.steps)
    steps: list[Step] = []
    makers: dict[str, str] = {}  # the layer that makes a value
    instead: dict[str, str] = {}
    for old in program.steps:
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
    output = instead.get(program.output, program.output)
    return replace(program, layers=layers, steps=steps, output=output).trimmed()


def fold(conv: LayerSpec, norm: LayerSpec) -> LayerSpec:
    """One convolution that computes norm(conv(x)) in eval mode."""
    scale = (norm.tensors["running_var"] + norm.config["eps"]).rsqrt()
    scale = scale * norm.tensors.get("weight", 1.0)
    shift = norm.tensors.get("bias", 0.0) - norm.tensors["running_mean"] * scale
    weight, each = conv.tensors["weight"], scale[:, None]
    if "Transpose" in conv.kind:  # (in, out / groups, ...): the inputs of a group make its outputs
        groups = conv.config["groups"]
        each = scale.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    tensors = {
        "weight": weight * each.view(*each.shape, *[1] * (weight.ndim - 2)),
        "bias": conv.tensors.get("bias", 0.0) * scale + shift,
    }
    return LayerSpec(conv.kind, conv.config, tensors)

"""Phase 2a: what does not depend on the inputs becomes parameters of layers (ours).

Computed weights (weight_norm, standardised or tied ones) are constants in eval mode, and cut like
any other. A mask that multiplies what a layer alone puts out is zero rows of its parameters; where
it is not, the product stays in the graph.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from nemo.cut.graph import arg, aten
from nemo.cut.trace import Traced, evaluate, module_path

# Layers, the dimension of their channels, and their parameters that have a row for each channel.
LAYERS: dict[Any, int] = {
    aten.linear.default: -1, aten.conv1d.default: 1, aten.conv2d.default: 1,
    aten.conv3d.default: 1, aten.conv1d.padding: 1, aten.conv2d.padding: 1,
    aten.conv3d.padding: 1, aten.batch_norm.default: 1,
}  # fmt: skip
ROWS = ((1, "weight"), (2, "bias"))


def fold_constants(traced: Traced) -> None:
    """Fold computed parameters and masks into the layers, in place."""
    values = evaluate(traced)
    for node in traced.calls():
        if node.target in LAYERS and node not in values:
            _fold_parameters(traced, node, values)
        elif node.target is aten.embedding.default and node in values:  # of places, say
            path = traced.paths.get(arg(node, 0))
            node.replace_all_uses_with(traced.constant(f"{node.name}_folded", values[node], path))
        elif node.target is aten.reshape.default and arg(node, 0) in traced.paths:
            _fold_reshaped(traced, node)
    for node in traced.calls():
        if node.target is aten.mul.Tensor and arg(node, 1) in traced.constants:
            _fold_mask(traced, node)
    traced.graph.eliminate_dead_code()
    traced.drop_unused()


def _fold_parameters(traced: Traced, layer: fx.Node, values: dict[fx.Node, Any]) -> None:
    for position, kind in ROWS:
        old = arg(layer, position)
        if isinstance(old, fx.Node) and old in values and old not in traced.constants:
            path = f"{module_path(layer)}.{kind}"
            new = traced.constant(f"{old.name}_folded", values[old], path)
            layer.update_arg(position, new)


def _fold_reshaped(traced: Traced, node: fx.Node) -> None:
    """A parameter in another shape, such as the slopes of a PReLU, stays trainable."""
    if all(user.target not in LAYERS for user in node.users):
        held = arg(node, 0)
        value = traced.constants[held].reshape(node.meta["dims"])
        new = traced.constant(f"{node.name}_folded", value, traced.paths[held])
        node.replace_all_uses_with(new)


def _fold_mask(traced: Traced, node: fx.Node) -> None:
    """Zero rows for the product of what a layer alone puts out and a mask of its channels."""
    layer, factor, shape = arg(node, 0), arg(node, 1), node.meta["dims"]
    held = [p for p, _ in ROWS if layer.target in LAYERS and arg(layer, p) is not None]
    if not held or len(layer.users) > 1 or any(layer.args[p] not in traced.constants for p in held):
        return
    axis, mask = LAYERS[layer.target] % len(shape), traced.constants[factor]
    rows = [size if d == axis else 1 for d, size in enumerate(shape)]
    binary = bool(((mask == 0) | (mask == 1)).all())
    if factor in traced.paths or list(mask.shape) != rows or not binary:
        return
    for position in held:
        own = traced.own(layer, position)
        value = traced.constants[own]
        off = (mask == 0).view(-1, *[1] * (value.ndim - 1))
        traced.constants[own] = value.masked_fill(off, 0)
    node.replace_all_uses_with(layer)

"""Phase 2: the model as a functional graph of a small set of ops (ours).

torch.export with a dynamic batch gives ATen ops; many of them say the same thing in different
words. Here the graph is brought to a normal form: no in-place op, every op has one output, every
rearrangement is one of reshape, permute, expand, slice and cat. `meta["dims"]` of a node is its
shape, with None where the batch size enters (alone, or merged with other dimensions).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from nemo.cut.graph import arg, aten, run
from nemo.cut.normal import normalise
from nemo.signature import Signature
from nemo.tracing import export

# Ops that may return their input, or a view of it, though their schema does not say so.
ALIASING = {
    aten.reshape.default, aten.contiguous.default, aten.dropout.default, aten.flatten.using_ints,
    aten.feature_dropout.default, aten.to.dtype, aten.type_as.default, aten.lift_fresh.default,
    aten.chunk.default, operator.getitem,
}  # fmt: skip


@dataclass
class Traced:
    """A graph in normal form; `constants` holds the values of its parameters and buffers."""

    graph: fx.Graph
    takes: Signature
    inputs: list[fx.Node]
    constants: dict[fx.Node, Tensor]
    paths: dict[fx.Node, str]  # of parameters only: their names in the model

    @property
    def output(self) -> fx.Node:
        """The node whose value the model returns."""
        return arg(next(iter(reversed(self.graph.nodes))), 0)  # type: ignore[no-any-return]

    def calls(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "call_function"]

    def moving(self) -> set[fx.Node]:
        """The inputs, and all tensors that depend on them."""
        found = set(self.inputs)
        for node in self.calls():
            # Sizes, too, come from the inputs, but are not tensors.
            if node.meta["dims"] is not None and found.intersection(node.all_input_nodes):
                found.add(node)
        return found

    def owned(self, node: Any) -> bool:
        """Whether a parameter, if there is one, is read by a single op."""
        return node is None or (node in self.constants and len(node.users) == 1)

    def own(self, node: fx.Node, position: int) -> fx.Node:
        """A constant among a node's arguments, made its own if others read it, too."""
        held: fx.Node = arg(node, position)
        if len(held.users) > 1:
            value, path = self.constants[held], self.paths.get(held)
            held = self.constant(f"{held.name}_own", value, path)
            node.update_arg(position, held)
        return held

    def constant(self, name: str, value: Tensor, path: str | None) -> fx.Node:
        """Add a constant of the graph; with a path, it is a parameter of this name."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        node.meta["dims"] = tuple(value.shape)
        self.constants[node] = value
        if path is not None:
            self.paths[node] = path
        return node

    def drop_unused(self) -> None:
        """Forget constants that nothing reads."""
        for node in [node for node in self.constants if not node.users]:
            self.graph.erase_node(node)
            del self.constants[node]
            self.paths.pop(node, None)


def trace(model: nn.Module, takes: Signature, inputs: Sequence[Tensor]) -> Traced:
    """Export `model` (its parameters are shared, not copied) and bring the graph to normal form.

    Args:
        model: in float64.
        inputs: a batch of 2.

    Raises:
        ValueError: see `nemo.tracing.export`.
    """
    exported = export(model, takes, inputs)
    nested = any(node.op == "get_attr" for node in exported.graph.nodes)  # such as autocast
    if nested or not _functionalise(exported.graph):
        exported = exported.run_decompositions({})
    signature = exported.graph_signature
    outputs = [s for s in signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    graph = exported.graph
    nodes = {node.name: node for node in graph.nodes}
    constants: dict[fx.Node, Tensor] = {}
    paths, lifted, entries = {}, set(), []
    for spec in signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            entries.append(node)
            continue
        held = exported.state_dict if spec.target in exported.state_dict else exported.constants
        constants[node] = held[spec.target].detach()
        if spec.kind == InputKind.PARAMETER:
            paths[node] = spec.target
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            lifted.add(node)
    returns = next(node for node in graph.nodes if node.op == "output")
    returns.args = (nodes[outputs[0].arg.name],)
    _fold_lifted(graph, constants, lifted)
    normalise(graph, entries)
    _mark_averages(graph, model)
    _narrow(graph, constants)
    return Traced(graph, takes, entries, constants, paths)


def _fold_lifted(graph: fx.Graph, constants: dict[fx.Node, Tensor], lifted: set[fx.Node]) -> None:
    """What is made of lifted constants, such as masks, alone becomes a constant itself."""
    for node in list(graph.nodes):
        inputs = node.all_input_nodes
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        if node.op == "call_function" and is_tensor and inputs and lifted.issuperset(inputs):
            args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
            with graph.inserting_before(inputs[0]):
                new = graph.placeholder(f"{node.name}_folded")
            constants[new], new.meta = run(node, *args, **kwargs), node.meta
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            lifted.add(new)


def _narrow(graph: fx.Graph, constants: dict[fx.Node, Tensor]) -> None:
    """The least float64, as in torch.finfo(x.dtype).min, becomes the least float32: the module may
    run in that."""
    largest = torch.finfo(torch.float32).max

    def fits(value: Any) -> Any:
        if isinstance(value, float) and largest < abs(value) < math.inf:
            return math.copysign(largest, value)
        return value

    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), fits)
    for node, value in constants.items():
        if value.dtype == torch.float64 and (value.abs() > largest).any():
            constants[node] = torch.where(value.isinf(), value, value.clamp(-largest, largest))


def evaluate(traced: Traced, inputs: Sequence[Tensor] = ()) -> dict[fx.Node, Any]:
    """The value of every node, parameters included; without inputs, of those that need none."""
    values: dict[fx.Node, Any] = dict(zip(traced.inputs, inputs, strict=False))
    values.update(traced.constants)
    with torch.no_grad():
        for node in traced.calls():
            if all(n in values for n in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = run(node, *args, **kwargs)
    return values


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that called this op; "" at the top."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _mark_averages(graph: fx.Graph, model: nn.Module) -> None:
    """`meta["averaged"]` of a BatchNorm without a momentum: the batches that its cumulative average
    has seen. The graph has a momentum of 0.0 there, as if it never moved."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        norm = modules.get(module_path(node)) if node.target is aten.batch_norm.default else None
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.momentum is None:
            seen = norm.num_batches_tracked
            node.meta["averaged"] = None if seen is None else int(seen)


def _functionalise(graph: fx.Graph) -> bool:
    """Replace in-place ops by functional ones; False if a view of the changed value is read later.

    (Then functionalisation by torch.export is needed; it is slower, and it drops dropout.)
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        changed = arg(node, 0)
        others = [member for member in _family(changed, node) if member is not changed]
        later = any(order[user] > order[node] for member in others for user in member.users)
        packet = getattr(aten, node.target._schema.name.split("::")[1].removesuffix("_"), None)
        overload = getattr(packet, node.target._overloadname, None)
        if later or overload is None:
            return False
        node.target = overload
        changed.replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)
    return True


def _family(node: fx.Node, without: fx.Node) -> list[fx.Node]:
    """All nodes that may share memory with `node`, except those made by way of `without`."""

    def aliases(child: fx.Node) -> bool:
        """Whether `child` may share memory with its first argument."""
        if child.target in ALIASING:
            return True
        schema = getattr(child.target, "_schema", None)
        return schema is not None and any(r.alias_info is not None for r in schema.returns)

    root = node
    while root.op == "call_function" and aliases(root) and isinstance(root.args[0], fx.Node):
        root = root.args[0]
    members, queue = [root], [root]
    while queue:
        member = queue.pop()
        children = [c for c in member.users if aliases(c) and c.args[0] is member]
        children = [child for child in children if child not in (without, *members)]
        members += children
        queue += children
    return members

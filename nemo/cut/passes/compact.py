"""Compact mode: the channels that the last writer of a residual stream masks off leave it (ours).

The paper (section 4.4) removes whole channels of the residual stream, which is smaller than exact
and not exact: what earlier writers and the embedding put there is lost. Here the loss is an edit
of the graph, and the edited graph is then decomposed exactly like any other. Per stream, D is what
the mask of its last writer turns off; D becomes zero in every writer, in position embeddings and
class tokens; LayerNorms that read the stream normalise over the other channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from nemo.cut.graph import Rewriter, arg, aten, dims, unexpanded
from nemo.cut.rules.along import Along
from nemo.cut.rules.base import RULES
from nemo.cut.rules.linear import Conv, Linear
from nemo.cut.rules.moves import runs_of
from nemo.cut.rules.norms import BatchNorm, LayerNorm, narrow_layer_norm
from nemo.cut.rules.pointwise import Pointwise
from nemo.cut.trace import Traced, module_path


@dataclass
class Stream:
    """A residual stream: what is summed, and all that leads there and treats channels alike."""

    values: dict[fx.Node, int] = field(default_factory=dict)  # with the axis of their channels
    writers: list[fx.Node] = field(default_factory=list)  # Linear, Conv and norms
    constants: dict[fx.Node, int] = field(default_factory=dict)  # parameters, with their axis
    understood: bool = True  # False if it comes from an op that is not known to keep channels


def drop_streams(traced: Traced, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Edit the graph in place.

    Args:
        masks: {path of a module: bool (rows,)}, of the module after which the mask acts.

    Returns:
        {path of a stream's last writer: the number of channels that left its stream}.
    """
    dropped = {}
    for stream in find_streams(traced, masks):
        path = module_path(stream.writers[-1])
        keep = masks[path]
        if bool(keep.all()) or not bool(keep.any()):
            continue  # an empty stream would leave nothing to normalise
        for writer in stream.writers:
            first = 2 if writer.target is aten.layer_norm.default else 1
            for position in (first, first + 1):
                if arg(writer, position) is not None:
                    _silence(traced, traced.own(writer, position), 0, keep)
        for constant, axis in stream.constants.items():
            _silence(traced, constant, axis, keep)
        # in their order, which names the layers
        readers = dict.fromkeys(reader for value in stream.values for reader in value.users)
        for reader in readers:
            if reader.target is aten.layer_norm.default and arg(reader, 0) in stream.values:
                _narrow(traced, reader, keep)
        dropped[path] = int((~keep).sum())
    return dropped


def find_streams(traced: Traced, masks: Mapping[str, Tensor]) -> list[Stream]:
    """The streams whose last writer has a mask, found from their last sums upwards."""
    live = traced.moving()
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    streams: list[Stream] = []
    for node in reversed(traced.calls()):
        sides = [n for n in node.all_input_nodes if n in live and dims(n) == dims(node)]
        if node.target is not aten.add.Tensor or len(sides) < 2:
            continue
        if any(node in stream.values for stream in streams):
            continue
        for axis in dict.fromkeys((1, len(dims(node)) - 1)):
            stream = Stream()
            _collect(traced, stream, live, node, axis)
            stream.writers.sort(key=order.__getitem__)
            last = module_path(stream.writers[-1]) if stream.writers else ""
            if stream.understood and last in masks and len(masks[last]) == dims(node)[axis]:
                streams.append(stream)
                break
    return streams


def _collect(traced: Traced, stream: Stream, live: set[fx.Node], node: fx.Node, axis: int) -> None:
    """Add to a stream a value, whose channels are along `axis`, and what leads to it."""
    if node in stream.values:
        return
    if node not in live:
        _collect_constant(traced, stream, node, axis)
        return
    rule, rank = RULES.get(node.target), len(dims(node))
    if (isinstance(rule, (Conv, BatchNorm)) and axis == 1) or (
        isinstance(rule, (Linear, LayerNorm)) and axis == rank - 1
    ):
        stream.writers.append(node)
        return
    stream.values[node] = axis
    source = arg(node, 0)
    if node.target is aten.permute.default:
        _collect(traced, stream, live, source, arg(node, 1)[axis])
    elif node.target is aten.reshape.default:
        before = _axis_before(dims(source), dims(node), axis)
        if before is None:
            stream.understood = False
        else:
            _collect(traced, stream, live, source, before)
    elif node.target is aten.cat.default and arg(node, 1) != axis:
        for piece in source:
            _collect(traced, stream, live, piece, axis)
    elif node.target is aten.mul.Tensor:  # a zero in one factor is enough
        factors = [n for n in node.all_input_nodes if n in live and dims(n) == dims(node)]
        _collect(traced, stream, live, factors[0], axis)
    elif isinstance(rule, Pointwise) or node.target is aten.linear.default:
        for n in node.all_input_nodes if isinstance(rule, Pointwise) else [source]:
            _collect(traced, stream, live, n, axis - rank + len(dims(n)))
    elif (isinstance(rule, Along) and axis not in rule.dims(node, rank)) or (
        node.target is aten.slice.Tensor and arg(node, 1) != axis
    ):
        _collect(traced, stream, live, source, axis)
    else:
        stream.understood = False


def _collect_constant(traced: Traced, stream: Stream, node: fx.Node, axis: int) -> None:
    source = unexpanded(node)
    aligned = axis - len(dims(node)) + len(dims(source))
    if source in traced.constants and dims(source)[aligned] == dims(node)[axis]:
        stream.constants[source] = aligned
    else:
        stream.understood = False


def _axis_before(
    before: tuple[int | None, ...], after: tuple[int | None, ...], axis: int
) -> int | None:
    """The dimension of a reshape's input that becomes `axis` unchanged."""
    if before.count(None) != 1 or after.count(None) != 1 or before[0] or after[0]:
        return None
    for ins, outs in runs_of((1, *before[1:]), (1, *after[1:])):  # type: ignore[arg-type]
        if outs == [axis] and len(ins) == 1:
            return ins[0]
    return None


def _silence(traced: Traced, parameter: fx.Node, axis: int, keep: Tensor) -> None:
    """Zero the entries of a parameter that leave the stream."""
    value = traced.constants[parameter]
    shape = [1] * value.ndim
    shape[axis] = -1
    traced.constants[parameter] = value * keep.view(shape)


def _narrow(traced: Traced, node: fx.Node, keep: Tensor) -> None:
    """Let a LayerNorm over the channels normalise over those that stay."""
    if len(arg(node, 1)) != 1:
        return
    index = traced.constant(f"{node.name}_index", keep.nonzero().flatten(), None)
    args = (arg(node, 0), index, arg(node, 2), arg(node, 3), arg(node, 4, 1e-5))
    new = Rewriter(traced.graph, node).call(narrow_layer_norm, args, dims(node))
    node.replace_all_uses_with(new)
    traced.graph.erase_node(node)

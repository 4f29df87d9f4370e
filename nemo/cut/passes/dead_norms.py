"""Phase 3c: what a LayerNorm makes of dead channels is one channel (ours).

A LayerNorm reads every channel, so nothing it writes is constant. But where its input is zero it
writes w_c s + b_c, with s = -mean / std of the token for all such channels c. A layer that reads it
is linear in s: its columns of dead channels are merged into one of them, the others become zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from nemo.cut.facts import Analysis
from nemo.cut.graph import arg, aten, lstm_outputs, run
from nemo.cut.passes.split import MOVES
from nemo.cut.rules.recurrent import first_layer
from nemo.cut.trace import Traced, module_path

# Layers that are linear in what they read, and the dimension of their input's channels.
READERS: dict[Any, int] = {aten.linear.default: -1, aten.conv2d.default: 1, lstm_outputs: -1}
# What may lie between a norm and its reader: it moves elements, and pads with zeros.
PADS = {aten.constant_pad_nd.default, aten.pad.default}
BETWEEN = {*MOVES, aten.roll.default, *PADS}


class Columns(NamedTuple):
    """What a reader's columns know of the norm: all tensors are (columns,)."""

    dead: Tensor  # bool: this channel of the norm's input is zero
    scale: Tensor  # the norm's weight
    shift: Tensor  # and its bias


def merge_dead(facts: Analysis) -> bool:
    """Edit the parameters of readers in `facts.traced`; True if something changed."""
    changed = False
    for node in facts.traced.calls():
        if node.target not in READERS or not facts.present(node):
            continue
        columns = _columns(facts, node)
        if columns is not None:
            changed |= _merge(facts.traced, node, columns)
    return changed


def _columns(facts: Analysis, reader: fx.Node) -> Columns | None:
    """What the columns of a Linear or Conv read, if it is all from one LayerNorm."""
    if reader.target is aten.conv2d.default and (arg(reader, 6, 1) != 1 or any(arg(reader, 4, ()))):
        return None  # zeros around the image are no output of a norm
    moves, norm = [], arg(reader, 0)
    while norm.target in BETWEEN:
        if norm.target in PADS and norm.args[2:] not in ((), (0,), (0.0,), ("constant",)):
            return None
        moves.append(norm)
        norm = arg(norm, 0)
    if norm.target is aten.layer_norm.default and len(arg(norm, 1)) == 1:
        axis = -1
    elif norm.target is aten.group_norm.default and arg(norm, 1) == 1:
        axis = 1
    else:
        return None
    shape = facts.live[norm].shape
    labels = torch.arange(1, shape[axis] + 1)  # 0 is padding
    labels = labels.view([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])
    labels = labels.expand(*shape)
    for move in reversed(moves):
        labels = run(move, labels, *move.args[1:])
    labels = labels.movedim(READERS[reader.target], -1).flatten(0, -2)
    if not bool((labels == labels[:1]).all()) or not bool(labels.all()):
        return None
    channels = labels[0] - 1
    nonzero = facts.nonzero(arg(norm, 0)).movedim(axis, -1).flatten(0, -2).any(0)
    parameters = [arg(norm, 2), arg(norm, 3)]
    if any(p is not None and facts.live[p].any() for p in parameters):
        return None
    ones = torch.ones(shape[axis], dtype=torch.float64)
    scale, shift = (default if p is None else facts.value[p]
                    for p, default in zip(parameters, (ones, 0 * ones), strict=True))  # fmt: skip
    return Columns(~nonzero[channels], scale[channels], shift[channels])


def _merge(traced: Traced, reader: fx.Node, columns: Columns) -> bool:
    """Edit the reader's weights (O, I, ...) and biases (O,); False if that saves nothing."""
    lstm = reader.target is lstm_outputs
    pairs = first_layer(reader) if lstm else [(arg(reader, 1), arg(reader, 2))]
    weights = [weight for weight, _ in pairs]
    if None in weights or not all(traced.owned(node) for pair in pairs for node in pair):
        return False
    used = columns.dead & torch.stack([_reads(traced.constants[w]) for w in weights]).any(0)
    first = int((columns.scale.abs() * used).argmax())
    if int(used.sum()) < 2 or not columns.scale[first] or (lstm and not arg(reader, 3)):
        return False
    ratio = torch.where(used, columns.scale / columns.scale[first], 0.0)
    extra = torch.where(used, columns.shift - ratio * columns.shift[first], 0.0)
    for weight, bias in pairs:
        old = traced.constants[weight]
        flat = old.reshape(*old.shape[:2], -1)  # (O, I, places of the kernel)
        new = torch.where(used[:, None], 0.0, flat)
        new[:, first] = torch.einsum("oik,i->ok", flat, ratio)
        traced.constants[weight] = new.view(old.shape)
        _add(traced, reader, bias, torch.einsum("oik,i->o", flat, extra))
    return True


def _reads(weight: Tensor) -> Tensor:
    """The input channels that a weight uses, bool (I,)."""
    return weight.transpose(0, 1).flatten(1).any(1)


def _add(traced: Traced, reader: fx.Node, bias: fx.Node | None, value: Tensor) -> None:
    """Add to the bias of a layer; make it one if it has none."""
    if bias is not None:
        traced.constants[bias] = traced.constants[bias] + value
    elif value.any():
        new = traced.constant(f"{reader.name}_bias", value, f"{module_path(reader)}.bias")
        reader.args = (*reader.args[:2], new, *reader.args[3:])

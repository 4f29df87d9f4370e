"""What rules write to: the steps and layers of the module, and any value at any indices (ours)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import aten, unexpanded
from nemo.cut.trace import module_path
from nemo.module.decomposed import RESERVED
from nemo.module.layers import Config, LayerSpec
from nemo.module.ops import OPS, name_of
from nemo.module.program import Program, Ref, Step, file_name


class Builder:
    """Collects steps and layers. `fetch` gives any node's value at any kept indices."""

    def __init__(self, facts: Analysis, kept: dict[fx.Node, Kept]) -> None:
        self.facts = facts
        self.kept = kept
        self.steps: list[Step] = []
        self.layers: dict[str, LayerSpec] = {}
        self.unlisted: dict[str, Any] = {}  # ops that are not in the op table
        self.values: dict[fx.Node, Ref] = {}  # at the node's kept indices
        self.output = ""  # the value that the module returns
        self.left: dict[str, int] = {}  # rows left of each layer, by module path
        self._made: dict[tuple[str, ...], list[str]] = {}  # layers, by their parameters
        self._adapted: dict[Any, Ref] = {}
        inputs = list(zip(facts.traced.inputs, facts.traced.takes.names, strict=True))
        self.values.update((node, Ref(name)) for node, name in inputs)
        self._value_names = set(facts.traced.takes.names)
        self._layer_names = set(RESERVED)

    # Steps

    def op(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> Ref:
        if target in (aten.dropout.default, aten.feature_dropout.default):
            kind = "Dropout" if target is aten.dropout.default else "Dropout2d"
            return self.layer(node, kind, {"p": float(args[1])}, {}, args[0])
        called = name_of(target)
        if OPS.get(called) is not target:
            called = str(target)
            self.unlisted[called] = target
        name = _fresh(node.name, self._value_names)
        self.steps.append(Step(name, called, False, _plain(args), kwargs))
        return Ref(name)

    def layer(
        self,
        node: fx.Node,
        kind: str,
        config: Config,
        tensors: dict[str, Tensor],
        *args: Ref,
        name: str | None = None,
    ) -> Ref:
        """A step that calls a new layer; it is called like the parent's module, if there is one."""
        path = module_path(node)
        wish = name or (path if hasattr(nn, kind) and path else node.name)
        spec = LayerSpec(kind, config, tensors)
        target = self._same(node, spec)
        if target is None:
            target = _fresh(wish, self._layer_names)
            self.layers[target] = spec
            self._made.setdefault(self._parameters(node), []).append(target)
        self.steps.append(Step(_fresh(target, self._value_names), target, True, args))
        return Ref(self.steps[-1].name)

    def _parameters(self, node: fx.Node) -> tuple[str, ...]:
        paths = self.facts.traced.paths
        return tuple(paths[n] for n in node.all_input_nodes if n in paths)

    def _same(self, node: fx.Node, spec: LayerSpec) -> str | None:
        """The layer that was cut alike from the same parameters: what is shared stays so."""
        source = self._parameters(node)
        made = self._made.get(source, []) if source else []
        return next((name for name in made if _equal(self.layers[name], spec)), None)

    def rows(self, node: fx.Node, rows: Tensor) -> None:
        """Note how many rows of a parent's layer are left."""
        path = module_path(node)
        self.left[path] = self.left.get(path, 0) + int(rows.sum())

    def program(self) -> Program:
        """What was written, as far as the output depends on it."""
        takes = self.facts.traced.takes
        whole = Program(self.layers, self.steps, self.output, takes, self.unlisted)
        return whole.trimmed()

    # Values

    def fetch(self, node: fx.Node, want: Kept, broadcast: bool = False) -> Any:
        """The value of `node` at the indices `want`, whatever is computed of it.

        Args:
            broadcast: a dimension along which the value repeats may be left at size 1.
        """
        if not isinstance(self.facts.value[node], Tensor):
            return self.values[node] if node in self.values else self._scalar(node)
        key = (node, broadcast, tuple(tuple(v.tolist()) for v in want))
        if key not in self._adapted:
            have = self.kept.get(node)
            if have is not None and all((h & w).any() for h, w in zip(have, want, strict=True)):
                self._adapted[key] = self._adapt(node, want)
            else:
                self._adapted[key] = self._constant(node, want, broadcast)
        return self._adapted[key]

    def missing(self, node: fx.Node, want: Kept) -> Kept:
        """Per dimension, the wanted indices that are not computed."""
        return [w & ~k for w, k in zip(want, self.kept[node], strict=True)]

    def template(self, node: fx.Node, want: Kept, missing: Kept) -> Tensor:
        """The constants at `want`, zero where something is computed."""
        absent = torch.zeros(self.facts.live[node].shape, dtype=torch.bool)
        for d, vector in enumerate(missing):
            absent |= vector.view(-1, *[1] * (absent.ndim - 1 - d))
        return taken(self.facts.constant(node) * absent, want)

    def _adapt(self, node: fx.Node, want: Kept) -> Ref:
        value, have = self.values[node], list(self.kept[node])
        for d, wanted in enumerate(want):
            if (have[d] & ~wanted).any():
                both = have[d] & wanted
                value = self._select(node, value, d, both[have[d]])
                have[d] = both
        for d, wanted in enumerate(want):
            if (wanted & ~have[d]).any():
                now = [*have[:d], wanted, *have[d + 1 :]]
                value = self._place(node, value, d, have[d][wanted], now)
                have = now
        return value

    def _select(self, node: fx.Node, value: Ref, dim: int, chosen: Tensor) -> Ref:
        index = chosen.nonzero().flatten()
        first, count = int(index[0]), len(index)
        if int(index[-1]) - first + 1 == count:  # neighbours: a view is enough
            return self.op(node, aten.slice.Tensor, value, dim, first, first + count, 1)
        name = f"{node.name}_select"
        return self.layer(node, "Select", {"dim": dim}, {"index": index}, value, name=name)

    def _place(self, node: fx.Node, value: Ref, dim: int, there: Tensor, want: Kept) -> Ref:
        constants = taken(self.facts.constant(node), want)
        shape = [1] * constants.ndim
        shape[dim] = len(there)
        constants = constants.masked_fill(there.view(shape), 0)
        tensors = {"index": there.nonzero().flatten(), "template": _squash(constants, {dim})}
        name = f"{node.name}_place"
        return self.layer(node, "Place", {"dim": dim}, tensors, value, name=name)

    def _constant(self, node: fx.Node, want: Kept, broadcast: bool) -> Ref:
        """A constant, or a value nobody needs, at the indices `want`."""
        source = self._parameter(node)
        value = taken(self.facts.constant(node), want)
        batch = {d for d, size in enumerate(node.meta.get("dims") or ()) if size is None}
        if source is None and broadcast:
            value = _squash(value, set())
        elif batch:
            value = _squash(value, set(range(value.ndim)) - batch)
        wish = self.facts.traced.paths[source] if source else f"{node.name}_constant"
        config = {"trainable": source is not None}
        ref = self.layer(node, "Constant", config, {"value": value.clone()}, name=wish)
        wide = [d for d in batch if not (broadcast and value.shape[d] == 1)]
        return self._tile(node, ref, wide, want) if wide else ref

    def _tile(self, node: fx.Node, value: Ref, dims: list[int], want: Kept) -> Ref:
        """Repeat a constant along its batch dimension, as often as there are samples."""
        config = {"dim": dims[0], "repeats": int(want[dims[0]].sum())}
        name = f"{node.name}_tile"
        first = self.values[self.facts.traced.inputs[0]]
        return self.layer(node, "Tile", config, {}, value, first, name=name)

    def _parameter(self, node: fx.Node) -> fx.Node | None:
        """The parameter that this node is, perhaps after an expand; it stays trainable."""
        node = unexpanded(node)
        return node if node in self.facts.traced.paths else None

    def _scalar(self, node: fx.Node) -> Any:
        """A size: a number of the trace, or computed from the batch at run time."""
        args = fx.map_arg(node.args, lambda n: self._scalar_argument(n))
        self.values[node] = self.op(node, node.target, *args)
        return self.values[node]

    def _scalar_argument(self, node: fx.Node) -> Any:
        return self.values[node] if node in self.facts.traced.inputs else self.fetch(node, [])


def _fresh(wish: str, taken: set[str]) -> str:
    """A name for files like `wish` that is not taken yet, and now is."""
    wish = file_name(wish)
    name, count = wish, 0
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    taken.add(name)
    return name


def _equal(one: LayerSpec, other: LayerSpec) -> bool:
    return (
        (one.kind, one.config, one.tensors.keys())
        == (other.kind, other.config, other.tensors.keys())
        and all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """fx's immutable lists as tuples and lists."""
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return [_plain(v) for v in value] if isinstance(value, list) else value


def taken(value: Tensor, want: Kept) -> Tensor:
    """A value at the indices `want`."""
    for d, vector in enumerate(want):
        if not vector.all():
            value = value.index_select(d, vector.nonzero().flatten())
    return value


def _squash(value: Tensor, but: set[int]) -> Tensor:
    """Reduce every dimension along which the value repeats to size 1, except those in `but`."""
    for d in range(value.ndim):
        if d not in but and value.shape[d] > 1 and bool((value == value.narrow(d, 0, 1)).all()):
            value = value.narrow(d, 0, 1)
    return value

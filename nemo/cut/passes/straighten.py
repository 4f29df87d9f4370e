"""Phase 2c: rearrangements that go by way of (batch x heads) become direct ones (ours).

nn.MultiheadAttention makes (tokens, batch, heads x channels) to (tokens, batch x heads, channels)
and only then to (batch, heads, tokens, channels). Nothing can be cut out of a dimension that holds
the batch. Where both ends are strided views of the same memory, one reshape and one permute do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from nemo.cut.graph import Dims, Rewriter, arg, aten, dims, run
from nemo.cut.trace import Traced, evaluate

MOVES = (aten.reshape.default, aten.permute.default)


def straighten(traced: Traced, sample: Sequence[Tensor]) -> None:
    """Rewrite such chains, in place; `sample` is a batch of one."""
    sizes = {n: v.shape for n, v in evaluate(traced, sample).items() if isinstance(v, Tensor)}

    def merged(node: fx.Node) -> bool:
        shape = sizes.get(node, dims(node))  # what was made here is direct
        return any(d is None and s and s > 1 for d, s in zip(dims(node), shape, strict=True))

    for node in traced.calls():
        chain = [node]
        while chain[-1].target in MOVES and (chain[-1] is node or merged(chain[-1])):
            chain.append(arg(chain[-1], 0))
        if len(chain) > 2 and dims(node).count(None) == 1 and not merged(node):
            source, *moves = reversed(chain)
            if not merged(source) and dims(source).count(None) == 1:
                _direct(traced, source, moves)
    traced.graph.eliminate_dead_code()


def _direct(traced: Traced, source: fx.Node, moves: list[fx.Node]) -> None:
    shape, node = dims(source), moves[-1]
    view = _moved(shape, moves, 2)
    origin = view[(0,) * view.ndim]
    strides = [int(view.select(d, -1).flatten()[0] - origin) // max(1, size - 1)
               for d, size in enumerate(view.shape)]  # fmt: skip
    order = sorted(range(view.ndim), key=lambda d: (view.shape[d] > 1, -strides[d]))
    apart: Dims = tuple(dims(node)[d] for d in order)
    rewriter = Rewriter(traced.graph, node)
    first = rewriter.reshape(source, apart)
    last = rewriter.permute(first, [order.index(d) for d in range(view.ndim)])
    new = [n for n in (first, last) if n is not source]
    if all(torch.equal(_moved(shape, new, b), _moved(shape, moves, b)) for b in (2, 3)):
        node.replace_all_uses_with(last)


def _moved(shape: Dims, moves: list[fx.Node], batch: int) -> Tensor:
    """Where each element comes from, at a batch size."""
    sizes = [batch if size is None else size for size in shape]
    value = torch.arange(int(torch.tensor(sizes).prod())).view(sizes)
    for move in moves:
        value = run(move, value, *move.args[1:])
    return value

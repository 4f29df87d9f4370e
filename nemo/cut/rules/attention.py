"""The rules of matrix products and attention (ours).

Letters: H heads, N/S query and key tokens, D/E channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from nemo.cut.builder import Builder
from nemo.cut.facts import Analysis, Kept
from nemo.cut.graph import arg, aten
from nemo.cut.rules.base import Demand, Rule, Shape, aligned, copied, full, rule
from nemo.module.program import Ref


def _distinct(facts: Analysis, node: fx.Node) -> bool:
    """Whether all operands are different values with two dimensions or more."""
    inputs = [n for n in node.args if isinstance(n, fx.Node)]
    return len(set(inputs)) == len(inputs) and min(facts.live[n].ndim for n in inputs) >= 2


@rule(aten.matmul.default)
class MatMul(Rule):
    """(..., M, K) @ (..., K, N): both sides hold the same k, those where both may be nonzero."""

    blocks, grows = False, True

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        return _distinct(facts, node)

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        return torch.matmul(args[0], args[1])

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        pass

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        left, right = arg(node, 0), arg(node, 1)
        a, b = facts.nonzero(left), facts.nonzero(right)
        inner = (a.any(-2) & b.any(-1)).reshape(-1, a.shape[-1]).any(0)
        return {
            left: [*aligned(kept[:-2], a.shape[:-2]), kept[-2].clone(), inner],
            right: [*aligned(kept[:-2], b.shape[:-2]), inner.clone(), kept[-1].clone()],
        }


@rule(aten.scaled_dot_product_attention.default)
class Attention(Rule):
    """q (..., H, N, D), k (..., H, S, D), v (..., H, S, E), the parent's scale; all S are kept."""

    blocks, grows = False, True

    def applies(self, facts: Analysis, node: fx.Node) -> bool:
        heads = {tuple(facts.live[arg(node, i)].shape[:-2]) for i in range(3)}
        grouped = node.kwargs.get("enable_gqa")
        return _distinct(facts, node) and len(heads) == 1 and not grouped

    def flow(self, node: fx.Node, shape: Shape, *args: Any, **kwargs: Any) -> Tensor:
        q, k, v = args[:3]
        score: Tensor = q @ k.transpose(-1, -2)
        if len(args) > 3 and args[3] is not None:
            score = score + args[3]
        # A weight depends on all scores of its row, and is never zero.
        weight = score.sum(-1, keepdim=True).expand(score.shape) + 1
        result: Tensor = weight @ v
        return result

    def close(self, facts: Analysis, node: fx.Node, kept: Kept) -> None:
        if arg(node, 5, False):  # causal: the position of a query matters
            kept[-2][:] = True

    def demand(self, facts: Analysis, node: fx.Node, kept: Kept) -> Demand:
        q, k, v, mask = (arg(node, i) for i in range(4))
        inner = (facts.nonzero(q).any(-2) & facts.nonzero(k).any(-2)).flatten(0, -2).any(0)
        if not inner.any():  # all scores are constants: one channel of zeros is enough
            inner[0] = True
        keys = full(facts, k)[-2]
        demand = {
            q: [*copied(kept[:-1]), inner],
            k: [*copied(kept[:-2]), keys, inner.clone()],
            v: [*copied(kept[:-2]), keys.clone(), kept[-1].clone()],
        }
        if mask is not None:
            demand[mask] = aligned([*kept[:-1], keys], facts.live[mask].shape)
        return demand

    def emit(self, build: Builder, node: fx.Node, kept: Kept) -> Ref:
        demand = self.demand(build.facts, node, kept)
        inputs = [arg(node, i) for i in range(4)]
        values = [None if n is None else build.fetch(n, demand[n]) for n in inputs]
        sizes = [int(demand[n][-1].sum()) for n in inputs[:3]]
        # Fast kernels want one width for all three; channels of zeros change nothing.
        for i, size in enumerate(sizes):
            if size < max(sizes):
                pad = [0, max(sizes) - size]
                values[i] = build.op(inputs[i], aten.constant_pad_nd.default, values[i], pad, 0.0)
        width = build.facts.live[inputs[0]].shape[-1]
        scale = node.kwargs.get("scale") or width**-0.5
        rest = (arg(node, 4, 0.0), arg(node, 5, False))
        result = build.op(node, node.target, *values, *rest, scale=scale)
        if sizes[2] == max(sizes):
            return result
        return build.op(node, aten.slice.Tensor, result, -1, 0, sizes[2], 1)

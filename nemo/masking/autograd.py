"""What a mask reads and where it acts, each with the gradient written by hand, for speed (ours)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CACHE_ELEMENTS = 2**18  # of a float32 tensor that fits a CPU core's cache


class Pool(torch.autograd.Function):
    """x itself, for the layer, and its mean over all but samples and channels, (B, C).

    The mean is of `part` of the first dimension of `over`, such as the first tokens. The layer
    alone reads this x. So its gradient can take up that of the mean `in_place`, where autograd
    would write out a third gradient of the size of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, over: tuple[int, ...], part: slice, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.over, ctx.part, ctx.in_place = over, part, in_place
        return x, _part(x, over, part).mean(over) if over else x.clone()

    @staticmethod
    def backward(ctx: Any, for_x: Tensor, for_mean: Tensor) -> tuple[Tensor, None, None, None]:
        for d in ctx.over:
            for_mean = for_mean.unsqueeze(d)
        for_x = for_x if ctx.in_place else for_x.clone()
        read = _part(for_x, ctx.over, ctx.part)
        read.add_(for_mean / math.prod(read.shape[d] for d in ctx.over))
        return for_x, None, None, None


def _part(x: Tensor, over: tuple[int, ...], part: slice) -> Tensor:
    return x[(slice(None),) * over[0] + (part,)] if over else x


class Scale(torch.autograd.Function):
    """`y * m` with m broadcast over space or tokens, written over y where nothing else needs y.

    The gradient for y has y's memory format; that of autograd may not, which slows the backward
    pass of what comes before. In place saves a feature map a layer: the gradient for m is then
    `sum(grad * y m) / m`, and 0 where m is 0, whose gradient the generator's relu drops anyway.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, m: Tensor, in_place: bool) -> Tensor:
        ctx.in_place = in_place
        # `data`: a Linear's output is a view, whose in-place autograd would copy the gradient twice
        out = y.data.mul_(m) if in_place else y * m
        ctx.save_for_backward(out if in_place else y, m)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y, m = ctx.saved_tensors
        over = [d for d in range(1, y.ndim) if m.shape[d] == 1]
        for_y = torch.empty_like(y)
        # only a CPU gains by parts; a GPU would pay for their many kernels
        rows = max(1, CACHE_ELEMENTS // y[0].numel()) if y.device.type == "cpu" else len(y)
        sums = []
        parts = zip(*(t.split(rows) for t in (grad, y, m, for_y)), strict=True)
        for grad_, y_, m_, for_y_ in parts:  # while a part is in cache, both products
            torch.mul(grad_, m_, out=for_y_)
            product = grad_ * y_
            sums.append(product.sum(over, keepdim=True) if over else product)
        for_m = sums[0] if len(sums) == 1 else torch.cat(sums)
        return for_y, torch.where(m > 0, for_m / m, 0) if ctx.in_place else for_m, None

"""What a user's own file may hold: an op, and the rule by which it is cut."""

from typing import Any

import torch
from torch import Tensor

from nemo.cut.rules import Pointwise, rule


@torch.library.custom_op("nemo_test::shrink", mutates_args=())
def shrink(x: Tensor) -> Tensor:
    return x * x.abs().gt(0.1)


@shrink.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, above: Tensor) -> Tensor:
    return above * ctx.saved_tensors[0].abs().gt(0.1)


shrink.register_autograd(_gradient, setup_context=_remember)


@rule(torch.ops.nemo_test.shrink.default)
class Shrink(Pointwise):
    """Element by element."""

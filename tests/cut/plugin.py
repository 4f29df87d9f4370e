"""What a user's own file may hold: an op, and the rule by which it is cut."""

import torch
from torch import Tensor

from nemo.cut.rules import Pointwise, rule


@torch.library.custom_op("nemo_test::shrink", mutates_args=())
def shrink(x: Tensor) -> Tensor:
    return x * x.abs().gt(0.1)


@shrink.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@rule(torch.ops.nemo_test.shrink.default)
class Shrink(Pointwise):
    """Element by element."""

"""Several processes that train one model together (ours, on torch.distributed).

Each process runs the model on its part of every batch, and `all_gather` gives all of them the
outputs for the whole batch: each computes the loss of the whole batch, whatever it compares, and
`ddp` averages their gradients. A process that is alone takes none of these ways.

Shapes: B images in a batch, b of them in this process.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from nemo.data.batches import Part, share

T = TypeVar("T")


def rank_and_world_size() -> Part:
    """The number of this process, and how many there are; (0, 1) where it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank_and_world_size()[0] == 0


def distributed() -> bool:
    return rank_and_world_size()[1] > 1


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the first process; the others wait for it instead of calling it."""
    if not distributed():
        return make()
    box: list[Any] = [make() if is_main() else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def main_only(context: AbstractContextManager[T]) -> AbstractContextManager[T | None]:
    """`context` in the first process; in the others None, and nothing is entered."""
    return context if is_main() else nullcontext()


def ddp(model: nn.Module) -> nn.Module:
    """`model`, with its gradients averaged over the processes as they are computed.

    The graph is declared static, which allows for weights that a model has and never uses.
    """
    if not distributed():
        return model
    return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)


def all_gather(output: Any, count: int) -> Any:
    """The output for a batch of `count` images, given that for this process's part of it.

    Args:
        output: (b, ...), a tuple of outputs, or masks {layer: (b, N_l)}.

    Returns:
        The same with B rows, in every process. The gradient that comes back to this process's rows
        is that of the sum of all processes' losses; they are equal, and `ddp` averages.
    """
    if not distributed():
        return output
    if isinstance(output, tuple):
        return tuple(all_gather(part, count) for part in output)
    if isinstance(output, dict):  # one exchange for all layers
        whole = all_gather(torch.cat(list(output.values()), 1), count)
        widths = [mask.shape[1] for mask in output.values()]
        return dict(zip(output, whole.split(widths, 1), strict=True))
    return _Gather.apply(output, count)


class _Gather(torch.autograd.Function):
    """(b, ...) -> (B, ...): a sum of this process's rows and the others', with zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, count: int) -> Tensor:
        ctx.rows = share(count, rank_and_world_size())
        whole = mine.new_zeros(count, *mine.shape[1:])
        whole[ctx.rows] = mine
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.rows] * rank_and_world_size()[1], None


def sync_batch_norm() -> AbstractContextManager[Any]:
    """While this is entered, BatchNorm in training has the statistics of the whole batch."""
    return _WholeBatchNorm() if distributed() else nullcontext()


class _WholeBatchNorm(TorchFunctionMode):
    """Takes the place of `F.batch_norm`, where torch's and timm's layers arrive.

    torch's own SyncBatchNorm refuses the CPU, and replaces layers of the model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, in training over the images of all processes: x is (b, C, ...)."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    over = [d for d in range(x.ndim) if d != 1]
    per_channel = (1, -1, *(1,) * (x.ndim - 2))
    wide = x if x.dtype == torch.float64 else x.float()
    here = wide.new_full((1,), x.numel() // x.shape[1])
    sums = _Sum.apply(torch.cat([wide.sum(over), here]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(per_channel)
    variance = _Sum.apply(centred.square().sum(over)) / count
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.detach(), momentum)
        running_var.lerp_(variance.detach() * (count / (count - 1)), momentum)
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    y: Tensor = centred * scale.view(per_channel)
    return (y if bias is None else y + bias.view(per_channel)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes, of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total

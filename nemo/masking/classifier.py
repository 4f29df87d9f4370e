"""Which layers put out the logits, seen by gradients (ours)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nemo.masking.probe import Call, samples, watched
from nemo.signature import Signature

NOISE = 1e-3  # relative size of a gradient, or difference of two, that is rounding
LOGITS = 8  # that are looked at one by one
SIGNS = 4  # sums of all logits with random signs that are looked at
Key = tuple[str, str | None]
# dimension of the channels, zeros added to an output, and their sum
Added = dict[Key, tuple[int, Tensor, Tensor]]


def classifiers(model: nn.Module, takes: Signature) -> set[Key]:
    """The (name, part) of layers that put out the logits, however these are rearranged later.

    Each value of such a layer reaches at most one logit, and each logit is reached by one channel
    at most. Where no layer is like that, a sum of logits over all but one of their dimensions will
    do for a logit. One softmax after the logits, or its logarithm, is seen through: then it is two
    channels at most that reach the difference of two logits.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = copy.deepcopy(model).float()  # rounding would hide what is the same
    added: Added = {}

    def seen(call: Call, x: Tensor | None, y: Tensor) -> Tensor:
        zero = torch.zeros_like(y, requires_grad=True)
        total = y + zero
        added[call.name, call.part] = (call.channels, zero, total)
        return total

    with watched(model, seen, lambda name, x: None), _frozen(model), torch.enable_grad():
        logits = takes.run(model, samples(model, takes, 0))
        return _of(logits, added) if logits.requires_grad else set()


def _of(logits: Tensor, added: Added) -> set[Key]:
    logits, softmax = _before_softmax(logits)
    shape = logits.shape[1:]
    views = [shape]
    if len(shape) > 1:
        axes = range(len(shape))
        views += [torch.Size(n if d == axis else 1 for d, n in enumerate(shape)) for axis in axes]
    for view in views:
        found = (
            set()
            if softmax is not None and view[softmax] == 1
            else _owners(logits, view, softmax, dict(added))
        )
        if found:
            return found
    return set()


def _before_softmax(logits: Tensor) -> tuple[Tensor, int | None]:
    """Logits up to a constant, and the dimension (of a sample's) along which a softmax ran."""
    values = logits.detach()
    for axis in range(1, logits.ndim):
        if bool((values.exp().sum(axis) - 1).abs().max() < NOISE):
            return logits, axis - 1
        if bool((values.sum(axis) - 1).abs().max() < NOISE) and bool((values > 0).all()):
            return logits.log(), axis - 1
    return logits, None


def _owners(logits: Tensor, view: torch.Size, softmax: int | None, left: Added) -> set[Key]:
    """Those layers of `left` that put out the logits, in sums of the shape `view`."""
    random = torch.Generator().manual_seed(0)
    signed: dict[Key, list[Tensor]] = {key: [] for key in left}
    for _ in range(SIGNS):  # two of them leave few layers, near the logits
        for key, size in _gradients(logits, _signs(view, softmax, random), left).items():
            signed[key].append(size)
        left = {key: left[key] for key in left if not _mixed(torch.stack(signed[key]))}
    left = {key: left[key] for key in left if any(bool(size.any()) for size in signed[key])}
    allowed = 1 if softmax is None else 2  # a softmax takes one amount off all: weights add up to 0
    for chosen in torch.randperm(view.numel(), generator=random)[:LOGITS].tolist():
        weights = torch.zeros(view)
        weights.view(-1)[chosen] = 1
        if softmax is not None:
            weights -= weights.roll(1, softmax)
        for key, size in _gradients(logits, weights, left).items():
            reached = int((size > NOISE * size.max()).flatten(0, -2).any(0).sum())
            hidden = softmax is not None and view[softmax] == 2 and not _alike(size)
            if reached > allowed or (hidden and _read(key, left)):
                del left[key]
    return set(left)


def _alike(sizes: Tensor) -> bool:
    """Whether two channels reach the difference of two logits by as much, as these themselves do;
    two neurons right before two logits do not."""
    two = sizes.flatten(0, -2).sum(0).topk(min(2, sizes.shape[-1])).values
    return bool(two[0] - two[-1] <= NOISE * two[0])


def _read(key: Key, by: Added) -> bool:
    """Whether what another of these layers puts out is computed from this one."""
    _, zero, _ = by[key]
    others = [total.sum() for other, (_, _, total) in by.items() if other != key]
    (grad,) = torch.autograd.grad(others, [zero], retain_graph=True, allow_unused=True)
    return grad is not None


def _gradients(logits: Tensor, weights: Tensor, of: Added) -> dict[Key, Tensor]:
    """Sizes of the gradients of a weighted sum of logits, (..., channels)."""
    if not of:
        return {}
    total = (logits * weights.to(logits)).sum()
    return {
        key: (torch.zeros_like(zero) if grad is None else grad).abs().movedim(channels, -1)
        for (key, (channels, zero, _)), grad in zip(of.items(), _grads(total, of), strict=True)
    }


def _grads(total: Tensor, of: Added) -> list[Tensor | None]:
    zeros = [zero for _, zero, _ in of.values()]
    try:
        return list(torch.autograd.grad(total, zeros, retain_graph=True, allow_unused=True))
    except (RuntimeError, NotImplementedError):
        if len(of) == 1:  # an operation after it has no gradient, so it is none that moves logits
            return [None]
        return [grad for item in of.items() for grad in _grads(total, dict([item]))]


def _signs(view: torch.Size, softmax: int | None, random: torch.Generator) -> Tensor:
    """A random sign for each sum of logits; along a softmax, as many of either."""
    signs = torch.randint(0, 2, view, generator=random) * 2.0 - 1
    if softmax is None:
        return signs
    count = view[softmax]
    along = torch.arange(count) % 2 * 2.0 - 1
    along[2 * (count // 2) :] = 0
    along = along[torch.randperm(count, generator=random)]
    shape = [count if d == softmax else 1 for d in range(len(view))]
    return signs.narrow(softmax, 0, 1) * along.view(shape)


def _mixed(sizes: Tensor) -> bool:
    """Whether a value reaches several logits: signs (dimension 0) then change the size of its
    gradient, and not only to 0, where its logit does not count."""
    largest = sizes.amax(0)
    noise = NOISE * largest.max()
    return bool(((largest - sizes > noise) & (sizes > noise)).any())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, to which a computed weight would stay attached."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True

"""What running a model shows of its layers: their order, and where their samples are (ours).

Names say nothing certain about a layer. So two random samples are run, then each of them is
replaced by another: the rows of a layer's input that change are the sample's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from nemo.masking.functional import FunctionalLinears
from nemo.signature import Signature, evaluating, moved

DRAWS = 100  # until two samples differ
SAME = 1e-6  # relative change of an input's row that is rounding


@dataclass
class Call:
    """One call of a layer, seen in several runs.

    Attributes:
        part: the parameter, or q, k or v, of a layer that is called as a function.
        dims: of its input.
        width: channels of its output.
        norms: the BatchNorms that read its output.
        rows: for each run, one number for each vector of the input (..., C) of a Linear, or for
            each sample (B, C, ...) of a convolution.
    """

    name: str
    module: nn.Module
    part: str | None
    dims: int
    width: int
    norms: list[str] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    @property
    def is_conv(self) -> bool:
        return isinstance(self.module, _ConvNd)

    @property
    def channels(self) -> int:
        """The dimension of the channels in its output."""
        return 1 if self.is_conv else -1


Seen = Callable[["Call", "Tensor | None", Tensor], "Tensor | None"]
Read = Callable[[str, Tensor], None]


def is_layer(module: nn.Module) -> bool:
    return isinstance(module, (_ConvNd, nn.Linear)) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is the Linear of Hugging Face's GPT-2, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def probe(model: nn.Module, takes: Signature) -> tuple[list[Call], Tensor]:
    """Every call of a convolution or Linear in order, seen in three runs, and the logits.

    Of the two samples, the second run replaces the first, and the third run the second.
    """
    first = samples(model, takes, 0)
    drawn = (samples(model, takes, seed) for seed in range(1, DRAWS))
    other = next((x for x in drawn if _differ(first, x)), None) or samples(model, takes, 1)
    calls, logits = _run(model, takes, first)
    for k in (0, 1):
        changed = [torch.cat([(y if k == i else x)[i : i + 1] for i in (0, 1)])
                   for x, y in zip(first, other, strict=True)]  # fmt: skip
        run, _ = _run(model, takes, changed)
        if [again.name for again in run] == [call.name for call in calls]:
            for call, again in zip(calls, run, strict=True):
                call.rows += again.rows
    return calls, logits


def _differ(first: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether each sample differs in each input; few ids may be drawn twice."""
    pairs = zip(first, other, strict=True)
    return all(bool((x != y).reshape(len(x), -1).any(1).all()) for x, y in pairs)


def layout(call: Call) -> tuple[int, str] | str:
    """Which dimension of a layer's input holds the samples, and how; or why that is not known.

    Returns:
        (dimension, ""); (dimension, "outer") where it is the samples times something else, such as
        windows; (dimension, "inner") where it is something else times the samples.
    """
    if not call.rows:
        return "its input is passed by name"
    base, *runs = call.rows
    if len(runs) < 2 or any(run.shape != base.shape for run in runs):
        return "what it is called with depends on the values of the input"
    limit = SAME * float(base.abs().max())
    changed = [(run - base).abs() > limit for run in runs]
    if not all(bool(change.any()) for change in changed):
        changed = [run != base for run in runs]  # deep in an untrained network little arrives
    if not all(bool(change.any()) for change in changed):
        return "its input does not depend on the sample"
    found = [
        (d, fold)
        for d, size in enumerate(base.shape)
        for fold in (("",) if size == 2 else ("outer", "inner") if size % 2 == 0 else ())
        if not any(_outside(change, d, fold, k) for k, change in enumerate(changed))
    ]
    if len(found) == 1:
        return found[0]
    return f"the samples in its input are {'not told apart' if found else 'mixed'}"


def _outside(changed: Tensor, dim: int, fold: str, sample: int) -> bool:
    """Whether something changed that is not this sample's, were it laid out like this."""
    rows = changed.movedim(dim, 0).reshape(changed.shape[dim], -1).any(1)
    others = rows.view(-1, 2)[:, 1 - sample] if fold == "inner" else rows.view(2, -1)[1 - sample]
    return bool(others.any())


def samples(model: nn.Module, takes: Signature, seed: int) -> tuple[Tensor, ...]:
    """Two random samples, of the model's type and on its device."""
    drawn: tuple[Tensor, ...] = moved(takes.draw(2, seed), next(model.parameters()))
    return drawn


def _run(model: nn.Module, takes: Signature, batch: Sequence[Tensor]) -> tuple[list[Call], Tensor]:
    calls: list[Call] = []
    readers: dict[int, list[str]] = {}  # id of a tensor -> BatchNorms that read it
    alive: list[Tensor] = []  # an id is a tensor's own for only as long as the tensor lives

    def seen(call: Call, x: Tensor | None, y: Tensor) -> None:
        if x is not None:
            call.rows.append(_rows(x.flatten(1) if call.is_conv else x))
        call.norms = readers.setdefault(id(y), [])
        alive.append(y)
        calls.append(call)

    def read(name: str, x: Tensor) -> None:
        alive.append(x)
        readers.setdefault(id(x), []).append(name)

    with watched(model, seen, read), torch.no_grad():
        logits = takes.run(model, [x.clone() for x in batch])  # it may write into its input
    return calls, logits


def _rows(x: Tensor) -> Tensor:
    """An odd combination (...) of the elements of each vector (..., C)."""
    return x.float() @ torch.arange(1.0, 1 + x.shape[-1], device=x.device).sin()


@contextmanager
def watched(model: nn.Module, seen: Seen, read: Read) -> Iterator[None]:
    """In eval mode; every layer's call and every BatchNorm's input is shown to these functions."""
    running: list[nn.Module] = []

    def shown(name: str, module: nn.Module, part: str | None, x: Any, y: Tensor) -> Any:
        call = Call(name, module, part, getattr(x, "ndim", 0), 0)
        call.width = y.shape[call.channels]
        return seen(call, x, y)

    modules = list(model.named_modules())

    def hooks(name: str, module: nn.Module) -> list[Any]:
        if isinstance(module, _BatchNorm):
            return [module.register_forward_pre_hook(lambda m, args: read(name, args[0]))]

        def after(m: nn.Module, args: Any, y: Tensor) -> Any:
            running.remove(m)
            return shown(name, m, None, args[0] if args else None, y)

        return [
            module.register_forward_pre_hook(lambda m, args: running.append(m)),
            module.register_forward_hook(after),
        ]

    def around(part: tuple[str, str], x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        y = compute(x)
        if running:  # a layer that is called, whose weight may also be another module's
            return y
        result = shown(part[0], model.get_submodule(part[0]), part[1], x, y)
        return y if result is None else result

    with ExitStack() as stack:
        for name, module in modules:
            if is_layer(module) or isinstance(module, _BatchNorm):
                for handle in hooks(name, module):
                    stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
        stack.enter_context(FunctionalLinears(modules, around))
        yield

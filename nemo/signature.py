"""What a model takes and returns: tensors of any type, by position or by name (ours).

A batch is a tensor, a tuple or list of tensors, or a dict of tensors by name, whose first dimension
is the samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SOLE = "input"  # what the one tensor of a model that is called model(x) is called
FLOAT = "float"
WHOLE = ("int64", "int32", "int16", "int8", "uint8")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
ACCEPTED = "a tensor, or a tuple or dict of tensors, whose first dimension is the samples"


@dataclass(frozen=True)
class Input:
    """A tensor (B, *shape) that a model takes.

    Attributes:
        dtype: "float", which is that of the model's parameters, "bool", or one of WHOLE.
        low, high: the least and the largest value, of integers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = FLOAT
    low: int = 0
    high: int = 1

    def __str__(self) -> str:
        size = "".join(f", {n}" for n in self.shape)
        values = f" in {self.low}..{self.high}" if self.dtype in WHOLE else ""
        return f"{self.name}: {self.dtype} (B{size}){values}"

    def draw(self, batch: int, random: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Random values: normal, or uniform ones in the range of integers.

        A row of a mask (bool, or integers 0 and 1) begins with a one and ends with a zero, since a
        model may divide by the number of either.
        """
        shape = (batch, *self.shape)
        if self.dtype == FLOAT:
            return torch.randn(shape, generator=random, dtype=dtype)
        drawn = torch.randint(self.low, self.high + 1, shape, generator=random)
        if (self.low, self.high) == (0, 1) and self.shape and self.shape[-1] > 1:
            drawn[..., 0], drawn[..., -1] = 1, 0
        return drawn.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Signature:
    """How a model is called, and what counts of what it returns.

    Attributes:
        named: model(name=tensor, ...) instead of model(tensor, ...).
        output: key, attribute or index of the tensor that counts; None if the model returns it.
    """

    inputs: tuple[Input, ...]
    named: bool = False
    output: str | int | None = None

    @classmethod
    def of_images(cls, size: Sequence[int]) -> Signature:
        """One float tensor (B, *size) in, one tensor out."""
        return cls((Input(SOLE, tuple(size)),))

    def __str__(self) -> str:
        what = "; ".join(map(str, self.inputs))
        return what if self.output is None else f"{what} -> {self.output}"

    @property
    def plain(self) -> bool:
        """Whether it is one float tensor in, one tensor out."""
        return self == Signature.of_images(self.inputs[0].shape)

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.inputs]

    def draw(self, batch: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """A random batch, on the CPU; floats in `dtype`."""
        random = torch.Generator().manual_seed(seed)
        return [item.draw(batch, random, dtype) for item in self.inputs]

    def lowest(self, batch: int, like: Tensor) -> list[Tensor]:
        """A batch of zeros, or of the least integers; floats of the type of `like`."""
        types = [like.dtype if i.dtype == FLOAT else getattr(torch, i.dtype) for i in self.inputs]
        return [
            torch.full((batch, *item.shape), item.low, dtype=dtype, device=like.device)
            for item, dtype in zip(self.inputs, types, strict=True)
        ]

    def batch(self, tensors: Sequence[Tensor]) -> Any:
        """Tensors in the order of the inputs, as a batch to `call` the model with."""
        return dict(zip(self.names, tensors, strict=True)) if self.named else tuple(tensors)

    def run(self, model: Any, tensors: Sequence[Tensor]) -> Tensor:
        """What counts of what a model says of tensors in the order of the inputs."""
        return pick(call(model, self.batch(tensors)), self.output)  # type: ignore[no-any-return]

    def bind(self, inputs: Sequence[Tensor], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of a call by the names of inputs, in their order.

        Raises:
            TypeError: one is missing, unknown or given twice.
        """
        given = dict(zip(self.names, inputs, strict=False)) | dict(named)
        if len(given) < len(inputs) + len(named) or set(given) != set(self.names):
            got = ", ".join([*(["a tensor"] * len(inputs)), *named]) or "nothing"
            raise TypeError(f"the module takes {', '.join(self.names)}; got {got}")
        return {name: given[name] for name in self.names}


def call(model: Any, batch: Any) -> Any:
    """model(x), model(*inputs) or model(**inputs), by the kind of batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def pick(returned: Any, output: str | int | None) -> Any:
    """The entry `output` of what a model returns; a tensor is that itself."""
    if output is None or isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping) or isinstance(output, int):
        return returned[output]
    return getattr(returned, output)


def moved(batch: Any, to: Any) -> Any:
    """A batch on another device; given a tensor, its floats in the type of that, too."""
    if isinstance(batch, Mapping):
        return {name: moved(tensor, to) for name, tensor in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(moved(tensor, to) for tensor in batch)
    return batch.to(to if batch.is_floating_point() or not isinstance(to, Tensor) else to.device)


def pairs(loader: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    """The batches, but for empty ones. Raise ValueError at one that is not (inputs, labels)."""
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            kind = type(batch).__name__
            raise ValueError(f"a batch is a {kind}{count}; accepted: a pair (inputs, labels)")
        if getattr(batch[1], "shape", None) != (0,):
            yield batch[0], batch[1]


def check_targets(labels: Any) -> None:
    """Raise ValueError unless labels are a tensor (B,) of integers."""
    shape, dtype = getattr(labels, "shape", ()), getattr(labels, "dtype", type(labels).__name__)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in INTEGERS:
        raise ValueError(
            f"labels have shape {tuple(shape)} and type {dtype}; accepted: a tensor (B,) of "
            "integers, one class per sample"
        )


def samples(batch: Any) -> int:
    """How many a batch has; one input may be a single row for all."""
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    return max(map(len, batch), default=0) if isinstance(batch, (tuple, list)) else len(batch)


def rows(batch: Any, chosen: Tensor) -> Any:
    """The samples of a batch that are chosen, bool (B,)."""
    if isinstance(batch, Mapping):
        return {name: tensor[chosen] for name, tensor in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(tensor[chosen] for tensor in batch)
    return batch[chosen]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; afterwards each module is as it was, also a frozen one in a training model."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of torch's wrappers for several devices and for torch.compile.

    Raises:
        ValueError: it is no module, has nothing to mask, or is not there as Python and numbers.
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}; accepted: a torch.nn.Module")
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod  # type: ignore[assignment]
    if not any(True for _ in model.parameters()):
        raise ValueError("the model has no layer to mask (it has no parameters)")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{name or 'the model'} is scripted; accepted: as before torch.jit")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model's weights are on the meta device; accepted: loaded weights")
    return model

"""What a model takes and returns: tensors of any type, by position or by name (ours).

A batch is a tensor, a tuple or list of tensors, or a dict of tensors by name, whose first dimension
is the samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SOLE = "input"  # what the one tensor of a model that is called model(x) is called
FLOAT = "float"
WHOLE = ("int64", "int32", "int16", "int8", "uint8")
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


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of torch's wrappers for several devices."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model


def signature(model: nn.Module, example: Any, output: str | int | None = None) -> Signature:
    """How `model` is called with batches like `example`, seen by running it in eval mode.

    Args:
        output: see `Signature`; a single tensor need not be named.

    Raises:
        ValueError: an example of another kind; a model that returns no tensor, or several and
            `output` names none of them; one whose output is not a row per sample.
    """
    _check_norms(model)
    tensors, names, named = _listed(model, example)
    reference = next(model.parameters(), torch.zeros(()))
    training = {module for module in model.modules() if module.training}
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            returned, ranges = _watched(model, moved(example, reference), tensors)
            inputs = zip(names, tensors, ranges, strict=True)
            key = _key_of(returned, output)
            takes = Signature(tuple(_input(*item) for item in inputs), named, key)
            _check_rows(model, takes, reference)
    finally:
        for module in training:
            module.training = True
    return takes


def _listed(model: nn.Module, example: Any) -> tuple[list[Tensor], list[str], bool]:
    """The tensors of an example, their names, and whether they are passed by name."""
    named = isinstance(example, Mapping)
    several = isinstance(example, (tuple, list))
    tensors = list(example.values() if named else example if several else [example])
    right = [isinstance(x, Tensor) and x.ndim > 0 and not x.is_complex() for x in tensors]
    if not tensors or not all(right):
        kinds = ", ".join(type(x).__name__ for x in tensors) or "nothing"
        raise ValueError(f"example: {kinds}; accepted: {ACCEPTED}")
    if len({len(x) for x in tensors}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"example: shapes {shapes}; accepted: {ACCEPTED}, as many in each")
    if named:
        names = list(example)
        wrong = [name for name in names if not (isinstance(name, str) and name.isidentifier())]
        if wrong:
            raise ValueError(f"example: {wrong[0]!r} cannot be the name of an argument")
        return tensors, names, True
    if len(tensors) == 1:
        return tensors, [SOLE], False
    known = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [*known, *(f"input_{i}" for i in range(len(known), len(tensors)))]
    return tensors, names[: len(tensors)], False


def _watched(model: nn.Module, batch: Any, tensors: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """What a model returns, and the size of the smallest embedding that reads each input, or 0."""
    given = list(batch.values()) if isinstance(batch, Mapping) else batch
    given = list(given) if isinstance(given, (tuple, list)) else [given]
    sizes = [0] * len(given)

    def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
        for i, tensor in enumerate(given):
            ids = args[0] if args else None
            if isinstance(ids, Tensor) and _same_memory(ids, tensor):
                size = cast(int, module.num_embeddings)
                sizes[i] = min(sizes[i] or size, size)

    kinds = (nn.Embedding, nn.EmbeddingBag)
    handles = [m.register_forward_pre_hook(reads) for m in model.modules() if isinstance(m, kinds)]
    try:
        return call(model, batch), sizes
    finally:
        for handle in handles:
            handle.remove()


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _input(name: str, tensor: Tensor, embeddings: int) -> Input:
    shape, dtype = tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point():
        return Input(name, shape)
    if dtype == "bool":
        return Input(name, shape, dtype)
    if dtype not in WHOLE:
        raise ValueError(f"example: {name} is {dtype}; accepted: floats, bool, {', '.join(WHOLE)}")
    low, high = (int(value) for value in tensor.aminmax())
    if embeddings:
        return Input(name, shape, dtype, 0, embeddings - 1)
    is_mask = low >= 0 and high <= 1 and len(shape) > 0  # an example may have no zeros
    return Input(name, shape, dtype, 0 if is_mask else low, 1 if is_mask else high)


def _key_of(returned: Any, output: str | int | None) -> str | int | None:
    """The key of the tensor that counts."""
    if isinstance(returned, Tensor):
        if output is not None:
            raise ValueError(f"output={output!r}: the model returns one tensor; leave it out")
        return None
    items: Any = ()
    if isinstance(returned, Mapping):
        items = returned.items()
    elif is_dataclass(returned):
        items = [(field.name, getattr(returned, field.name)) for field in fields(returned)]
    elif isinstance(returned, (tuple, list)):
        items = zip(getattr(returned, "_fields", range(len(returned))), returned, strict=True)
    keys = [key for key, value in items if isinstance(value, Tensor)]
    listed = ", ".join(map(repr, keys))
    if not keys:
        raise ValueError(f"the model returns no tensor, but {type(returned).__name__}")
    if output is None and len(keys) > 1:
        raise ValueError(f"the model returns several tensors; name one: output={listed}")
    if output is not None and not isinstance(_try_pick(returned, output), Tensor):
        raise ValueError(f"output={output!r}: the model returns no such tensor; accepted: {listed}")
    return keys[0] if output is None else output


def _try_pick(returned: Any, output: str | int) -> Any:
    try:
        return pick(returned, output)
    except (KeyError, IndexError, AttributeError, TypeError):
        return None


def _check_norms(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"{name}: a BatchNorm without running statistics, so that what is said of a sample "
                "depends on the others in its batch; accepted: track_running_stats=True"
            )


def _check_rows(model: nn.Module, takes: Signature, reference: Tensor) -> None:
    """The proof runs single samples and several."""
    shapes = []
    for count in (1, 3):
        batch = moved(takes.draw(count, 0), reference)
        try:
            logits = takes.run(model, batch)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the model does not run on a batch of {count}: {reason}") from error
        shapes.append(tuple(logits.shape))
        if not logits.is_floating_point():
            raise ValueError(
                f"the model returns {logits.dtype}; accepted: logits, which are floats"
            )
    one, three = shapes
    if one[:1] != (1,) or three != (3, *one[1:]):
        raise ValueError(
            f"the model returns {one} for one sample and {three} for three; accepted: a row per "
            "sample, also of one (squeeze() without a dimension drops it)"
        )

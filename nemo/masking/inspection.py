"""How a model is called and what it returns, seen by running it (ours)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from keyword import iskeyword
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from nemo.signature import (
    ACCEPTED,
    SOLE,
    WHOLE,
    Input,
    Signature,
    call,
    evaluating,
    moved,
    pick,
)

REFUSALS = (  # what a model raises at a batch that it does not take
    TypeError, RuntimeError, ValueError, IndexError, AttributeError, AssertionError, KeyError,
)  # fmt: skip


def signature(
    model: nn.Module, example: Any, output: str | int | None = None, called: str = "the example"
) -> Signature:
    """How `model` is called with batches like `example`, seen by running it in eval mode.

    Args:
        output: see `Signature`; a single tensor need not be named, unless in train mode there are
            others beside it.
        called: what errors call the example.

    Raises:
        ValueError: an example of another kind; a model that returns no tensor, or several and
            `output` names none of them; one whose output is not a row per sample.
    """
    _check_norms(model)
    tensors, names, named = _listed(model, example)
    reference = next(model.parameters(), torch.zeros(()))
    with evaluating(model), torch.no_grad(), torch.random.fork_rng():
        own = tree_map(torch.clone, moved(example, reference))  # which the model may write into
        returned, ranges = _watched(model, own, tensors, called)
        inputs = zip(names, tensors, ranges, strict=True)
        if isinstance(returned, Tensor) and output is not None:  # auxiliary heads, in train mode
            _key_of(_in_training(model, moved(example, reference)), output)
            output = None
        key = _key_of(returned, output)
        takes = Signature(tuple(_input(*item) for item in inputs), named, key)
        _check_rows(model, takes, reference)
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
    if not all(map(len, tensors)):
        raise ValueError("example: no samples; accepted: one or more")
    if len({len(x) for x in tensors}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"example: shapes {shapes}; accepted: {ACCEPTED}, as many in each")
    if named:
        names = list(example)
        wrong = [n for n in names if not (isinstance(n, str) and n.isidentifier()) or iskeyword(n)]
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


def _watched(
    model: nn.Module, batch: Any, tensors: Sequence[Tensor], called: str
) -> tuple[Any, list[int]]:
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
    except REFUSALS as error:
        raise ValueError(f"the model does not run on {called}: {_reason(error)}") from error
    finally:
        for handle in handles:
            handle.remove()


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())[:200]
    alone = said and not isinstance(error, KeyError)
    return said if alone else f"{type(error).__name__} {said}".rstrip()


def _in_training(model: nn.Module, example: Any) -> Any:
    """What a copy in train mode returns for twice the example; a BatchNorm needs two samples."""
    return call(copy.deepcopy(model).train(), tree_map(lambda x: torch.cat([x, x]), example))


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
    known = type(output) in (str, int) and isinstance(_try_pick(returned, output), Tensor)
    if output is not None and not known:
        raise ValueError(f"output={output!r}: the model returns no such tensor; accepted: {listed}")
    return keys[0] if output is None else output


def _try_pick(returned: Any, output: Any) -> Any:
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
        except REFUSALS as error:
            line = f"the model does not run on a batch of {count}: {_reason(error)}"
            raise ValueError(line) from error
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

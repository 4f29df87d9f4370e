"""Modules as plain JSON values and back, through an allow-list (ours).

Reading trusts nothing: names, kinds, ops and the types of arguments are checked, references point
backwards, widths come from the tensors, and a rehearsal without data finds absurd sizes before
memory is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from nemo.module.decomposed import RESERVED, DecomposedModule
from nemo.module.layers import LayerSpec
from nemo.module.ops import OPS
from nemo.module.program import Program, Ref, Step
from nemo.signature import FLOAT, WHOLE, Input, Signature

DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16,
                              torch.int64, torch.int32, torch.bool)}  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9_]{1,200}")  # those in an nn.Sequential are numbers
LARGEST_VALUE = 2**28  # elements of one value of a module, at batch 2
LARGEST_NUMBER = 2**31
LONGEST_LIST = 4096
ARITHMETIC = ("mul", "add", "sub", "floordiv", "truediv")  # of sizes
NORMS = ("aten.batch_norm.default", "aten.instance_norm.default")
STEP = {"name", "target", "layer", "args", "kwargs"}
CONFIG: dict[str, tuple[type, ...]] = {
    "stride": (list,), "padding": (list, str), "dilation": (list,), "groups": (int,),
    "output_padding": (list,),
    "eps": (float,), "momentum": (float, type(None)), "shape": (list,), "channels": (int,),
    "p": (float,), "padding_idx": (int, type(None)),
    "dim": (int,), "repeats": (int,), "trainable": (bool,),
}  # fmt: skip


class RefusedError(ValueError):
    """A description that is not one of a module."""


def encode(module: DecomposedModule) -> dict[str, Any]:
    """A module as JSON values, without its tensors.

    Raises:
        ValueError: it runs an op that is not in the op table, so it could not be read back.
    """
    return {
        **encode_signature(module.takes),
        "output": module.output,
        "layers": {name: {"kind": k, "config": c} for name, (k, c) in module.kinds.items()},
        "steps": [_encode_step(step) for step in module.steps],
    }


def decode(body: dict[str, Any], tensors: dict[str, Tensor]) -> DecomposedModule:
    """The module of a description and its tensors, which has been run once.

    Raises:
        RefusedError: something is not allowed, or does not fit.
    """
    program = rehearsed(body, tensors)
    with _running():
        module = DecomposedModule(program).eval()
        like = next(module.parameters(), torch.zeros(()))
        with torch.no_grad():
            module.run(program.takes.lowest(1, like))
    return module


def rehearsed(body: dict[str, Any], tensors: dict[str, Tensor]) -> Program:
    """The program of a description and its tensors, which has been run without data.

    Raises:
        RefusedError: something is not allowed, or does not fit.
    """
    takes = _decode_signature(body)
    layers = _decode_layers(body["layers"], tensors)
    steps = _decode_steps(body["steps"], layers, takes.names)
    output = body["output"]
    known = {*takes.names, *(step.name for step in steps)}
    _check(isinstance(output, str) and output in known, "output names no step")
    program = Program(layers, steps, output, takes)
    with _running():
        _rehearse(program)
    return program


@contextmanager
def _running() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError,
            ZeroDivisionError, OverflowError, AssertionError) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise RefusedError(f"the module cannot run: {reason}") from None


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RefusedError(message)


def _rehearse(program: Program) -> None:
    """Run without data, so that absurd sizes are found before memory is asked for."""
    shells = {
        name: LayerSpec(kind, config, {key: t.to("meta") for key, t in tensors.items()})
        for name, (kind, config, tensors) in program.layers.items()
    }
    dtype = next((t.dtype for spec in program.layers.values() for t in spec.tensors.values()
                  if t.is_floating_point()), torch.float32)  # fmt: skip
    module = DecomposedModule(replace(program, layers=shells)).eval()
    inputs = program.takes.lowest(2, torch.zeros((), dtype=dtype, device="meta"))
    values: dict[str, Any] = dict(zip(program.takes.names, inputs, strict=True))
    with torch.no_grad():
        for step in program.steps:
            arithmetic = step.target in ARITHMETIC and not step.is_layer
            if arithmetic:  # a number times a list would repeat it
                numbers = all(type(values[name]) in (int, float) for name in step.reads())
                _check(numbers, f"bad arguments of step {step.name!r}")
            module.advance(step, values)
            _check(_fits(values[step.name]), f"step {step.name!r} is too large")


def _fits(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= LARGEST_VALUE
    if isinstance(value, (tuple, list)):
        return len(value) <= LONGEST_LIST and all(map(_fits, value))
    return type(value) is not int or abs(value) < LARGEST_NUMBER


def encode_signature(takes: Signature) -> dict[str, Any]:
    """Images only have a size, as in files of version 1."""
    if takes.plain:
        return {"input_size": list(takes.inputs[0].shape)}
    return {"signature": asdict(takes)}


def _decode_signature(body: dict[str, Any]) -> Signature:
    if "input_size" in body:
        return Signature.of_images(_decode_size("input_size", body["input_size"]))
    whole = body["signature"]
    right = isinstance(whole, dict) and set(whole) == {"inputs", "named", "output"}
    _check(right and type(whole["named"]) is bool, "bad signature")
    output, inputs = whole["output"], whole["inputs"]
    _check(output is None or type(output) is int or _is_name(output), "bad output of signature")
    _check(isinstance(inputs, list) and 0 < len(inputs) <= 100, "bad inputs of signature")
    takes = Signature(tuple(map(_decode_input, inputs)), whole["named"], output)
    _check(len(set(takes.names)) == len(inputs), "inputs of one name")
    return takes


def _decode_input(item: Any) -> Input:
    keys = {"name", "shape", "dtype", "low", "high"}
    right = isinstance(item, dict) and set(item) == keys and _is_name(item["name"])
    _check(right and item["dtype"] in (FLOAT, "bool", *WHOLE), "bad input of signature")
    low, high = item["low"], item["high"]
    ranged = type(low) is int and type(high) is int and low <= high
    _check(ranged and max(-low, high) < LARGEST_NUMBER, f"bad range of input {item['name']!r}")
    shape = _decode_size(f"shape of input {item['name']!r}", item["shape"], least=0)
    return Input(item["name"], shape, item["dtype"], low, high)


def _decode_size(what: str, size: Any, least: int = 1) -> tuple[int, ...]:
    sized = isinstance(size, list) and least <= len(size) <= 4 and all(map(_is_size, size))
    _check(sized, f"bad {what}")
    _check(math.prod(size) <= LARGEST_VALUE, f"{what} is too large")
    return tuple(size)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and len(value) <= 200


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < LARGEST_NUMBER


def _decode_layers(described: Any, tensors: dict[str, Tensor]) -> dict[str, LayerSpec]:
    _check(isinstance(described, dict), "layers must be an object")
    held: dict[str, dict[str, Tensor]] = {name: {} for name in described}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".")
        _check(name in held, f"tensor {key!r} belongs to no layer")
        held[name][leaf] = tensor
    for name, spec in described.items():
        _check(
            NAME.fullmatch(name) is not None and name not in RESERVED, f"bad layer name {name!r}"
        )
        _check(isinstance(spec, dict) and set(spec) == {"kind", "config"}, f"bad layer {name!r}")
        _check(isinstance(spec["config"], dict), f"bad config of layer {name!r}")
        _check_config(name, spec["kind"], spec["config"])
    return {
        name: LayerSpec(spec["kind"], spec["config"], held[name])
        for name, spec in described.items()
    }


def _decode_steps(described: Any, layers: dict[str, LayerSpec], inputs: list[str]) -> list[Step]:
    _check(isinstance(described, list), "steps must be a list")
    steps: list[Step] = []
    known = set(inputs)
    for item in described:
        right = isinstance(item, dict) and set(item) == STEP
        _check(right and isinstance(item["layer"], bool), "bad step")
        name, target = item["name"], item["target"]
        _check(
            isinstance(name, str) and NAME.fullmatch(name) is not None, f"bad step name {name!r}"
        )
        _check(name not in known, f"step {name!r} exists twice")
        allowed = layers if item["layer"] else OPS
        _check(
            isinstance(target, str) and target in allowed,
            f"{target!r} is not allowed; accepted: layers of the module, ops of nemo's table and "
            "of plugins that are imported",
        )
        _check(
            isinstance(item["args"], list) and isinstance(item["kwargs"], dict),
            f"bad step {name!r}",
        )
        args = tuple(_decode(arg, known) for arg in item["args"])
        kwargs = {key: _decode(value, known) for key, value in item["kwargs"].items()}
        plain = item["layer"] or "." not in target  # layers, and arithmetic on sizes
        simple = all(isinstance(a, (Ref, int, float)) for a in args) and not kwargs
        _check(simple or not plain, f"bad arguments of step {name!r}")
        step = Step(name, target, item["layer"], args, kwargs)
        _check(not _updates(step), f"step {name!r} would overwrite running statistics")
        steps.append(step)
        known.add(name)
    return steps


def _updates(step: Step) -> bool:
    """Whether it is a norm that writes its running statistics: a tensor that it was given."""
    if step.is_layer or step.target not in NORMS:
        return False
    op: Any = OPS[step.target]
    names = (argument.name for argument in op._schema.arguments)
    given = {**dict(zip(names, step.args, strict=False)), **step.kwargs}
    learns = given.get("training", given.get("use_input_stats"))
    return learns is not False and given.get("running_mean") is not None


def _encode_step(step: Step) -> dict[str, Any]:
    if not step.is_layer and step.target not in OPS:
        raise ValueError(f"cannot save: {step.target} (step {step.name}) is not in the op table")
    args = [_encode(arg) for arg in step.args]
    kwargs = {key: _encode(value) for key, value in step.kwargs.items()}
    return {"name": step.name, "target": step.target, "layer": step.is_layer, "args": args,
            "kwargs": kwargs}  # fmt: skip


def _encode(value: Any) -> Any:
    """An argument as JSON: a reference to a value, a type or a special number is an object."""
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"cannot save: an op has an argument of type {type(value).__name__}")


def _decode(value: Any, known: set[str], depth: int = 0) -> Any:
    if isinstance(value, dict):
        _check(len(value) == 1, "bad argument")
        ((kind, content),) = value.items()
        _check(isinstance(content, str), "bad argument")
        if kind == "ref" and content in known:
            return Ref(content)
        if kind == "dtype" and content in DTYPES:
            return DTYPES[content]
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
        raise RefusedError(f"bad argument {kind} {content!r}")
    if isinstance(value, list):
        _check(len(value) <= LONGEST_LIST and depth < 2, "bad argument: a long or deep list")
        return [_decode(item, known, depth + 1) for item in value]
    if isinstance(value, str):
        _check(len(value) <= 40, "bad argument: a long text")
    if isinstance(value, int):
        # "to the end" of a slice is traced as the largest integer
        _check(abs(value) < LARGEST_NUMBER or value == 2**63 - 1, f"bad argument {value}")
    return value


def _check_config(name: str, kind: Any, config: dict[str, Any]) -> None:
    """Types of a layer's settings; whether they fit its tensors is seen when it is built."""
    for key, value in config.items():
        _check(key in CONFIG and type(value) in CONFIG[key], f"bad {key} of layer {name!r}")
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(value, list) or type(number) is int:
                right = type(number) is int and 0 <= number < LARGEST_NUMBER
                _check(right, f"bad {key} of layer {name!r}")
    _check(isinstance(kind, str), f"bad kind of layer {name!r}")

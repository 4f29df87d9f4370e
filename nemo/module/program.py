"""The program of a decomposed module, as plain data: steps over layers and ops (ours)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo.module.layers import LayerSpec
from nemo.signature import Signature


def file_name(path: str) -> str:
    """What the layer at `path` of a model is called in a module: such a name is safe in files.

    PyTorch allows anything but dots in the names of submodules.
    """
    return re.sub(r"[^A-Za-z0-9_]", "_", path).strip("_")[:150] or "layer"


@dataclass(frozen=True)
class Ref:
    """Stands for an earlier value among the arguments of a step."""

    name: str


@dataclass(frozen=True)
class Step:
    """name = layer(*args), or name = op(*args, **kwargs)."""

    name: str
    target: str  # a layer of the program, or a name in the op table
    is_layer: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def reads(self) -> list[str]:
        return _refs(self.args) + _refs(tuple(self.kwargs.values()))

    def renamed(self, instead: Mapping[str, str]) -> Step:
        """The same step, reading other values in place of some."""
        kwargs = {key: _renamed(value, instead) for key, value in self.kwargs.items()}
        return replace(self, args=_renamed(self.args, instead), kwargs=kwargs)

    def __str__(self) -> str:
        words = [_text(a) for a in self.args]
        words += [f"{key}={_text(value)}" for key, value in self.kwargs.items()]
        return f"{self.name} = {self.target}({', '.join(words)})"


@dataclass(frozen=True)
class Program:
    """All that a module computes: it returns the value `output`."""

    layers: Mapping[str, LayerSpec]
    steps: Sequence[Step]
    output: str
    takes: Signature  # the inputs are values, too
    unlisted: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # not in the op table

    def trimmed(self) -> Program:
        """Without the steps that the output does not depend on, and their layers."""
        needed, chosen = {self.output}, []
        for step in reversed(self.steps):
            if step.name in needed:
                chosen.append(step)
                needed.update(step.reads())
        used = {step.target for step in chosen if step.is_layer}
        held = {name: layer for name, layer in self.layers.items() if name in used}
        return replace(self, layers=held, steps=chosen[::-1])

    def prefixed(self, prefix: str, entry: Mapping[str, str]) -> Program:
        """The same program with other names, which reads other values for some of its inputs."""
        names = {step.name: prefix + step.name for step in self.steps} | dict(entry)
        steps = [
            replace(
                step.renamed(names),
                name=names[step.name],
                target=prefix + step.target if step.is_layer else step.target,
            )
            for step in self.steps
        ]
        layers = {prefix + name: layer for name, layer in self.layers.items()}
        return replace(self, layers=layers, steps=steps, output=names[self.output])

    def __str__(self) -> str:
        return "\n".join([*(str(step) for step in self.steps), f"return {self.output}"])


def _renamed(value: Any, instead: Mapping[str, str]) -> Any:
    if isinstance(value, Ref):
        return Ref(instead.get(value.name, value.name))
    if isinstance(value, (tuple, list)):
        return type(value)(_renamed(item, instead) for item in value)
    return value


def _refs(value: Any) -> list[str]:
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, (tuple, list)):
        return [name for item in value for name in _refs(item)]
    return []


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return value.name if isinstance(value, Ref) else repr(value)

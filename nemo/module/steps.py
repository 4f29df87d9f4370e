"""The instructions of a decomposed module, as plain data (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

INPUT = "input"


@dataclass(frozen=True)
class Ref:
    """Stands for an earlier value among the arguments of a step."""

    name: str


@dataclass(frozen=True)
class Step:
    """name = layer(*args), or name = op(*args, **kwargs)."""

    name: str
    target: str  # a layer of the module, or a key of OPS
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

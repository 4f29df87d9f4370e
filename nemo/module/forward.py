"""The steps of a module as Python functions, so that no call has to interpret them (ours).

Their source is made of names from here only: v0, v1, ... are values, c0, c1, ... is all else that a
step holds, such as an op, a size or the name of a layer. So no text of a file gets into it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from nemo.module.program import Ref, Step

# Ops that can as well write their result over their first argument.
IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "aten.relu.default": Tensor.relu_,
    "aten.add.Tensor": Tensor.add_,
}
Forward = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]


def write(
    steps: Sequence[Step],
    inputs: Sequence[str],
    output: str,
    ops: Mapping[str, Callable[..., Any]],
    overwriting: Collection[str] = (),
) -> Forward:
    """A function of {layer: module} and {input: value}, which forgets values after their last use.

    Args:
        overwriting: the steps that write their result over their first argument.
    """
    writer = _Writer(ops)
    lines = [f"{writer.value(name)} = values[{writer.constant(name)}]" for name in inputs]
    for step, done in zip(steps, last_uses(steps, output), strict=True):
        call = writer.overwriting(step) if step.name in overwriting else writer.call(step)
        lines.append(f"{writer.value(step.name)} = {call}")
        if done:
            lines.append(f"del {', '.join(map(writer.value, done))}")
    lines.append(f"return {writer.value(output)}")
    source = "def forward(layers, values):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(source, "<steps of a module>", "exec"), writer.constants)
    function: Forward = writer.constants.pop("forward")  # else it would hold itself
    return function


def last_uses(steps: Sequence[Step], output: str) -> list[tuple[str, ...]]:
    """For each step, the values that nothing reads after it."""
    seen, done = {output}, []
    for step in reversed(steps):
        names = [name for name in dict.fromkeys([*step.reads(), step.name]) if name not in seen]
        seen.update(names)
        done.append(tuple(names))
    return done[::-1]


class _Writer:
    def __init__(self, ops: Mapping[str, Callable[..., Any]]) -> None:
        self.ops = ops
        self.values: dict[str, str] = {}
        self.constants: dict[str, Any] = {}

    def value(self, name: str) -> str:
        return self.values.setdefault(name, f"v{len(self.values)}")

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def argument(self, value: Any) -> str:
        if isinstance(value, Ref):
            return self.value(value.name)
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(map(self.argument, value))}]"
        return self.constant(value)

    def called(self, step: Step) -> str:
        if step.is_layer:
            return f"layers[{self.constant(step.target)}]"
        return self.constant(self.ops[step.target])

    def call(self, step: Step) -> str:
        words = [self.argument(value) for value in step.args]
        if step.kwargs:
            pairs = (f"{self.constant(k)}: {self.argument(v)}" for k, v in step.kwargs.items())
            words.append(f"**{{{', '.join(pairs)}}}")
        return f"{self.called(step)}({', '.join(words)})"

    def overwriting(self, step: Step) -> str:
        x, *others = map(self.value, step.reads())
        words = ", ".join([x, *others])
        if step.is_layer:
            return f"{self.called(step)}({words}, in_place=True)"
        op = self.constant(IN_PLACE[step.target])
        if others:
            op = f"({op} if {self.constant(_alike)}({words}) else {self.called(step)})"
        return f"{op}({words})"


def _alike(x: Tensor, *others: Any) -> bool:
    """Whether a result of all of them has the shape and type of the first."""
    return all(isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype for y in others)

"""The result: an nn.Module that runs a list of steps over real layers and allow-listed ops (ours).

The list is data, so that a module can be written as JSON and read back without running any code
found in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nemo.decompose.layers import LayerSpec, build
from nemo.decompose.ops import OPS
from nemo.decompose.steps import INPUT, Ref, Step


class DecomposedModule(nn.Module):
    """A smaller model of the same function; an ordinary module for training, export and so on.

    Attributes:
        classes: the classes whose logits it returns, in order; None for all of them.
        report: per layer neurons kept and total, blocked ops, parameters and FLOPs.
        certificate: the error against the masked parent in float64, see `nemo.decompose.verify`.
        info: free for the user; saved and loaded with the module.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerSpec],
        steps: Sequence[Step],
        output: str,
        input_size: Sequence[int],
        unlisted: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, build(layer))
        self.kinds = {name: (layer.kind, layer.config) for name, layer in layers.items()}
        self.steps = tuple(steps)
        # Ops outside the op table: such a module runs, but cannot be saved.
        self.unlisted = dict(unlisted or {})
        self.output = output
        self.input_size = tuple(input_size)  # (channels, height, width)
        self.classes: list[int] | None = None
        self.report: dict[str, Any] = {}
        self.certificate: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self._last_use = _last_uses(self.steps, output)

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = {INPUT: x}
        for step, done in zip(self.steps, self._last_use, strict=True):
            self.advance(step, values)
            for name in done:
                del values[name]
        result: Tensor = values[self.output]
        return result

    def advance(self, step: Step, values: dict[str, Any]) -> None:
        """Run one step on the values so far."""
        args = [_resolve(arg, values) for arg in step.args]
        if step.is_layer:
            values[step.name] = self.get_submodule(step.target)(*args)
        else:
            kwargs = {key: _resolve(value, values) for key, value in step.kwargs.items()}
            op = OPS.get(step.target) or self.unlisted[step.target]
            values[step.name] = op(*args, **kwargs)

    def program(self) -> str:
        """The steps as text, one a line."""
        return "\n".join([*(str(step) for step in self.steps), f"return {self.output}"])


def _resolve(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, (tuple, list)):
        return [_resolve(item, values) for item in value]
    return value


def _last_uses(steps: Sequence[Step], output: str) -> tuple[tuple[str, ...], ...]:
    """For each step, the values that nothing reads after it."""
    seen, done = {output}, []
    for step in reversed(steps):
        names = [name for name in dict.fromkeys([*step.reads(), step.name]) if name not in seen]
        seen.update(names)
        done.append(tuple(names))
    return tuple(reversed(done))

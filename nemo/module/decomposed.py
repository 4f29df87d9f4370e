"""The result: an nn.Module that runs a list of steps over real layers and allow-listed ops (ours).

The list is data, so that a module can be written as JSON and read back without running any code
found in the file.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from nemo.cost import count_parameters
from nemo.module.check import ExactnessError, logits_of
from nemo.module.folding import folded
from nemo.module.forward import IN_PLACE, Forward, last_uses, write
from nemo.module.layers import LayerSpec, build
from nemo.module.ops import OPS
from nemo.module.program import Program, Ref, Step

# Layers and ops whose results share no memory with what they read. (Not all of them: enough.)
SHARING = ("Constant", "Cast", "Dropout", "Dropout2d")
OWNING = (
    "aten.relu.default", "aten.gelu.default", "aten.add.Tensor", "aten.cat.default",
    "aten.max_pool2d.default",
)  # fmt: skip
FOLDING_TOLERANCE = 1e-9  # of the largest logit, in float64


class DecomposedModule(nn.Module):
    """A smaller model of the same function; an ordinary module for training, export and so on.

    In eval mode under `torch.inference_mode()` it overwrites intermediate values that are not read
    again, since allocating big tensors is slow. It does not where a layer or its forward was
    replaced, or has a hook, which might keep them.

    Attributes:
        takes: how it is called: as its parent was, by position or by name.
        classes: the classes whose logits it returns, in order; None for all of them.
        report: per layer neurons kept and total, blocked ops, parameters and FLOPs.
        certificate: the error against the masked parent in float64, see `nemo.proof`.
        info: free for the user; saved and loaded with the module.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        for name, layer in program.layers.items():
            self.add_module(name, build(layer))
        self._types = tuple(type(layer) for layer in self.children())
        self.kinds = {name: (layer.kind, layer.config) for name, layer in program.layers.items()}
        self.steps = tuple(program.steps)
        # Ops outside the op table: such a module runs, but cannot be saved.
        self.unlisted = dict(program.unlisted)
        self.output = program.output
        self.takes = program.takes
        self.classes: list[int] | None = None
        self.report: dict[str, Any] = {}
        self.certificate: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self._overwriting = self._find_overwriting()
        self._written: tuple[Forward, Forward] | None = None  # at the first call

    @property
    def input_size(self) -> tuple[int, ...]:
        """(channels, height, width) of the images; of several inputs, the first's sizes."""
        return self.takes.inputs[0].shape

    def forward(self, x: Tensor | None = None, /, *others: Tensor, **named: Tensor) -> Tensor:
        """Logits (B, ..., T) of images (B, C, H, W), or of the inputs that the parent takes.

        Raises:
            TypeError: an input is missing, or unknown.
            ValueError: inputs of another size than that of the parent's example, unless the
                certificate is of other sizes, too.
        """
        values: dict[str, Any] = self.takes.bind(others if x is None else (x, *others), named)
        if self.certificate.get("fixed_size", True):  # what 0.2 saved does not say
            self._check_sizes(values)
        if torch.compiler.is_compiling():  # a graph of the loop serves all copies of a module
            for step in self.steps:
                self.advance(step, values)
            result: Tensor = values[self.output]
            return result
        if self._written is None:
            body = self.steps, self.takes.names, self.output, self.unlisted | OPS
            self._written = write(*body), write(*body, self._overwriting)
        plain, overwriting = self._written
        run = overwriting if self._may_overwrite() else plain
        return run(self._modules, values)

    def __getstate__(self) -> dict[str, Any]:
        """Without the written functions, which no pickle can hold."""
        return {**self.__dict__, "_written": None}

    def _check_sizes(self, values: dict[str, Tensor]) -> None:
        for item in self.takes.inputs:
            size = tuple(values[item.name].shape[1:])
            if size != item.shape:
                name = "images" if self.takes.plain else item.name
                raise ValueError(
                    f"{name} of {size}, and this module was cut for {item.shape}; "
                    f"cut it with example={name} of the size wanted"
                )

    def advance(self, step: Step, values: dict[str, Any]) -> None:
        """Run one step on the values so far: the same as in `forward`, one at a time."""
        args = [values[a.name] if type(a) is Ref else _resolve(a, values) for a in step.args]
        if step.is_layer:
            layer: Any = self._modules[step.target]
            values[step.name] = layer(*args)
        else:
            kwargs = step.kwargs and {k: _resolve(v, values) for k, v in step.kwargs.items()}
            op = OPS.get(step.target) or self.unlisted[step.target]
            values[step.name] = op(*args, **kwargs)

    def _may_overwrite(self) -> bool:
        """Whether nobody but this run can see intermediate values."""
        if self.training:
            return False
        hooked = bool(module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)
        for layer, built in zip(self.children(), self._types, strict=False):
            hooked |= bool(layer._forward_hooks or layer._forward_pre_hooks)
            # what took its place, or its forward's, may return its argument
            hooked |= type(layer) is not built or "forward" in vars(layer)
        return torch.is_inference_mode_enabled() and not hooked

    def _find_overwriting(self) -> frozenset[str]:
        """The steps that may run in the memory of their first argument.

        It must be its last use, and own its memory; so must all that was made from it before.
        """
        owning = {
            step.name
            for step in self.steps
            if (step.is_layer and self.kinds[step.target][0] not in SHARING)
            or step.target in OWNING
        }
        owning -= {name for step in self.steps if step.name not in owning for name in step.reads()}
        found = set()
        for step, done in zip(self.steps, last_uses(self.steps, self.output), strict=True):
            able = step.is_layer and self.kinds[step.target][0] == "AddInto"
            plain = all(type(a) is Ref for a in step.args) and not step.kwargs
            able |= step.target in IN_PLACE and plain
            first, *others = step.reads() or [""]
            if able and first in done and first in owning and first not in others:
                found.add(step.name)
        return frozenset(found)

    def optimize_for_inference(self) -> DecomposedModule:
        """A frozen copy in eval mode, without BatchNorms that a convolution can absorb.

        Its certificate also says what folding changed: `folding_error`, in float64, relative to
        the largest logit. In float32 the two differ by rounding.

        Raises:
            ExactnessError: on random inputs the two differ by more than float64's rounding.
        """
        wide = copy.deepcopy(self).cpu().double().eval()
        fast = DecomposedModule(folded(wide.definition())).eval()
        expected, actual = (logits_of(m.run, self.takes) for m in (wide, fast))
        error = float((expected - actual).abs().max() / expected.abs().max().clamp(min=1e-300))
        if not error <= FOLDING_TOLERANCE:
            raise ExactnessError(f"folding changed the logits by {error:.3g} of the largest")
        reference = next(self.parameters(), torch.zeros(0))
        fast = fast.to(reference).requires_grad_(False)
        fast.classes, fast.info = copy.deepcopy((self.classes, self.info))
        fast.report = {**copy.deepcopy(self.report), "parameters": count_parameters(fast)}
        fast.certificate = {**copy.deepcopy(self.certificate), "folding_error": error}
        return fast

    def check_layers(self, to: str) -> None:
        """Raise ValueError unless the layers compute what `definition` says."""
        for name, layer in self.named_modules():
            if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
                what = f"layer {name!r}" if name else "the module"
                raise ValueError(f"cannot {to}: {what} has a forward hook; accepted: none")
        for name, (kind, config) in self.kinds.items():
            layer = self._modules.get(name) or nn.Identity()
            try:
                told = build(LayerSpec(kind, config, layer.state_dict()))
            except (LookupError, RuntimeError, ValueError):
                told = None
            if told is None or _settings(layer) != _settings(told):
                raise ValueError(
                    f"cannot {to}: layer {name!r} is no longer the {kind} with {config} that was "
                    "cut; accepted: other values of its tensors"
                )

    def definition(self) -> Program:
        """What it computes, as data; the layers hold the module's own tensors, not copies."""
        layers = {
            name: LayerSpec(kind, config, dict(self.get_submodule(name).state_dict()))
            for name, (kind, config) in self.kinds.items()
        }
        return Program(layers, self.steps, self.output, self.takes, self.unlisted)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits of inputs in their order, however it is called."""
        return self.takes.run(self, inputs)

    def program(self) -> str:
        """The steps as text, one a line."""
        return str(self.definition())


# Names that no layer of a module may have: those of its attributes.
RESERVED = {
    *dir(DecomposedModule), "kinds", "unlisted", "steps", "output", "takes", "classes", "report",
    "certificate", "info", "_types", "_overwriting", "_written",
}  # fmt: skip


def _settings(layer: nn.Module) -> tuple[type, dict[str, Any]]:
    """All that decides what a layer computes, but its tensors."""
    public = {key: value for key, value in vars(layer).items() if not key.startswith("_")}
    return type(layer), public | {"training": False}


def _resolve(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, Ref):
        return values[value.name]
    if isinstance(value, (tuple, list)):
        return [_resolve(item, values) for item in value]
    return value

"""Linears that are called as functions: F.linear on a parameter, attention's q, k and v (ours).

torchvision's Swin hands its weights to F.linear, and nn.MultiheadAttention its packed weight to
F.multi_head_attention_forward. A mode sees these calls, in its own thread only, and also while
torch.export traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Part = tuple[str, str]  # a module's name, and its parameter, or q, k or v of its attention
Around = Callable[[Part, Tensor, Callable[[Tensor], Tensor]], Tensor]
ATTENTION = dict(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), "qkv", strict=True))


class FunctionalLinears(TorchFunctionMode):
    """Calls `around(part, x, compute)` in place of each linear with a parameter of `modules`.

    Args:
        modules: {name: module} of the owners of the parameters.
        around: gives the output; `compute(x)` is the linear itself.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], around: Around) -> None:
        super().__init__()
        self.modules = list(modules)
        self.around = around

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            func = self._linear
        elif func is F.multi_head_attention_forward:
            func = _attention(self._linear, self._packed)
        return func(*args, **(kwargs or {}))

    def _owner(self, weight: Tensor) -> Part | None:
        """By identity and at the time of the call: torch.export puts others in their place."""
        for name, module in self.modules:
            for kind, parameter in module._parameters.items():
                if parameter is weight:
                    return name, ATTENTION.get(kind, kind)
        return None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        part = self._owner(weight)
        if part is None:
            return F.linear(input, weight, bias)
        return self.around(part, input, partial(_linear, weight=weight, bias=bias))

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None
    ) -> list[Tensor]:
        """q, k and v by a third of a packed weight each."""
        owner = self._owner(w)
        biases = (None, None, None) if b is None else b.chunk(3)
        outputs = []
        for part, x, weight, bias in zip("qkv", (q, k, v), w.chunk(3), biases, strict=True):
            compute = partial(_linear, weight=weight, bias=bias)
            outputs.append(
                compute(x) if owner is None else self.around((owner[0], part), x, compute)
            )
        return outputs


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _attention(linear: Any, packed: Any) -> FunctionType:
    """torch's own F.multi_head_attention_forward, with other functions where it calls linear.

    It would hand itself to the mode again and again, if it asked for one.
    """
    scope = {**vars(F), "linear": linear, "has_torch_function": lambda tensors: False}
    apart: Any = scope["_in_projection"]
    scope["_in_projection"] = FunctionType(apart.__code__, scope, argdefs=apart.__defaults__)
    scope["_in_projection_packed"] = packed
    whole: Any = F.multi_head_attention_forward
    return FunctionType(whole.__code__, scope, argdefs=whole.__defaults__)

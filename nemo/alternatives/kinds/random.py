"""The module's own architecture with fresh weights: what the cut alone is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("random", label="random", budget=True)
def fresh(context: Context) -> nn.Module:
    from torch import nn

    module = context.module()
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "reset_parameters")]
    drawn = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        layer.reset_parameters()
    for parameter in module.parameters():
        if id(parameter) not in drawn:  # tokens and position embeddings
            nn.init.trunc_normal_(parameter, std=0.02)
    return module

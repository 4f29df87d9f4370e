"""The standard model cut down by magnitude, one ratio for all layers, by torch-pruning."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from nemo.alternatives.registry import alternative

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context


@alternative("pruned", label="pruned", budget=True)
def pruned(context: Context) -> nn.Module:
    """
    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    import torch

    from nemo.masking.sites import head_names

    try:
        import torch_pruning as tp
    except ImportError:
        raise ValueError(
            "alternatives.kinds: pruned needs torch-pruning: pip install 'nemo-modular[baselines]'"
        ) from None
    standard, example = context.standard(), torch.zeros(1, 3, *context.data.size)
    heads = head_names(standard, len(context.classes()))

    def smaller(share: float) -> nn.Module:
        model = copy.deepcopy(standard)
        attention: list[Any] = [
            m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")
        ]
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - share,
            ignored_layers=[model.get_submodule(name) for name in heads],
            num_heads={block.qkv: block.num_heads for block in attention},
        )
        pruner.step()
        for block in attention:  # timm reads these in forward
            block.num_heads = pruner.num_heads[block.qkv]
            block.attn_dim = block.qkv.out_features // 3
            block.head_dim = block.attn_dim // block.num_heads
        return model

    return context.largest(smaller)

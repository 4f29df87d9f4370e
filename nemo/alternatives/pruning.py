"""The standard model cut down to a module's size by torch-pruning, whole channels at a time (ours).

Sources: Molchanov et al. 2019 (arXiv 1906.10771) for the importance `taylor`; Fang et al. 2023
(arXiv 2301.12900) for groups of channels that can only go together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nemo.masking.sites import head_names

if TYPE_CHECKING:
    from nemo.alternatives.context import Context

SPARED = 0.1  # of each group's channels: a ranking of all layers together could take a whole one


def prune(
    context: Context,
    kind: str,
    start: Callable[[], nn.Module],
    *,
    by: Literal["magnitude", "taylor"] = "magnitude",
    together: bool = False,
) -> nn.Module:
    """The largest pruned model of at most the module's size.

    Args:
        kind: the alternative, for messages.
        start: gives the model to prune, on the CPU; `taylor` reads its gradients.
        together: rank the channels of all layers in one list, in place of the same share of each.

    Raises:
        ValueError: torch-pruning is not installed, or the model cannot be made that small.
    """
    try:
        import torch_pruning as tp
    except ImportError:
        raise ValueError(
            f"{context.section}.kinds: {kind} needs torch-pruning: "
            "pip install 'nemo-modular[baselines]'"
        ) from None
    whole, example = start(), torch.zeros(1, 3, *context.data.size)
    heads = head_names(whole, len(context.classes()))
    importances = {"magnitude": tp.importance.MagnitudeImportance(p=2)}
    importances["taylor"] = tp.importance.TaylorImportance()

    def smaller(share: float) -> nn.Module:
        model = copy.deepcopy(whole)
        for mine, its in zip(model.parameters(), whole.parameters(), strict=True):
            mine.grad = its.grad  # which a copy leaves behind
        attention: list[Any] = [
            m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")
        ]
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importances[by],
            global_pruning=together,
            pruning_ratio=1 - share,
            ignored_layers=[model.get_submodule(name) for name in heads],
            num_heads={block.qkv: block.num_heads for block in attention},
        )
        if together:
            pruner.importance = _sparing(pruner)
        pruner.step()
        for block in attention:  # timm reads these in forward
            block.num_heads = pruner.num_heads[block.qkv]
            block.attn_dim = block.qkv.out_features // 3
            block.head_dim = block.attn_dim // block.num_heads
        model.zero_grad()
        return model

    return context.largest(smaller)


def _sparing(pruner: Any) -> Callable[[Any], Tensor | None]:
    """The importance of a pruner, with the best channels of each group out of its reach."""
    importance = pruner.importance

    def spare(group: Any) -> Tensor | None:
        found: Tensor | None = importance(group)
        if found is None:
            return None
        # heads, and the groups of a convolution, lose the same channels (the pruner's own count)
        parts = found.view(pruner._get_channel_groups(group), -1)
        best = parts.mean(0).topk(max(1, round(SPARED * parts.shape[1]))).indices
        parts[:, best] = torch.inf
        return found

    return spare

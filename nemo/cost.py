"""What a model costs: parameters, and FLOPs of one sample (paper section 5.1).

A multiply-add counts as two FLOPs. Attention is counted in full: fused kernels are invisible to
the counter, so the plain one is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from nemo.signature import call, evaluating


def count_parameters(model: nn.Module) -> int:
    """The number of parameters; those shared between layers count once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, example: Any) -> int:
    """FLOPs of the first sample of the batch `example`, in eval mode."""
    # Detached, for the counter's hooks fail on views of parameters.
    # Each module once: functional_call leaves its tensors in one that has several names.
    state = {
        f"{name}.{kind}".lstrip("."): parameter.detach()
        for name, module in model.named_modules()
        for kind, parameter in module.named_parameters(recurse=False)
    }
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer's
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            first = tree_map(lambda x: x[:1], example)
            call(lambda *a, **k: functional_call(model, state, a, k, tie_weights=False), first)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())

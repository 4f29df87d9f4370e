"""Random masked models, compared with what their masks mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo.cut import DecomposedModule
from nemo.masking.sites import CLASSIFIER, UNCALLED, find_sites
from tests.oracles.masked import masked_logits

torch.set_num_threads(1)  # small tensors: more threads only wait for each other


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms, and weights so large that half the neurons can go without the signal fading."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan = module.weight[0].numel()
            module.weight.data = (
                torch.randn(module.weight.shape, generator=generator) * (4 / fan) ** 0.5
            )
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm)):
            for name, scale, shift in (("weight", 0.5, 0.75), ("bias", 0.4, -0.2)):
                value = getattr(module, name, None)
                if value is not None:
                    value.data = torch.rand(value.shape, generator=generator) * scale + shift
            if getattr(module, "running_var", None) is not None:
                module.running_mean = (
                    torch.randn(module.running_mean.shape, generator=generator) * 0.1
                )
                module.running_var = torch.rand(module.running_var.shape, generator=generator) + 0.5
    return model.eval()


def random_masks(
    model: nn.Module, keep: float, seed: int = 0, every: bool = False
) -> dict[str, Tensor]:
    """A random mask for each site; those that are skipped by default only if `every`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.layer: torch.rand(site.neurons, generator=generator) < keep
        for site in find_sites(model)
        if site.skip is None or (every and site.skip not in (UNCALLED, CLASSIFIER))
    }


def assert_same(
    model: nn.Module,
    module: DecomposedModule,
    masks: Mapping[str, Tensor],
    classes: list[int] | None = None,
    size: int = 32,
) -> None:
    """The float32 module computes the oracle's logits, and the outputs say something."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(9))
    expected = masked_logits(model, masks, images)
    expected = expected if classes is None else expected[:, classes]
    with torch.no_grad():
        actual = module(images)
    assert actual.shape == expected.shape
    assert expected.std() > 1e-6
    assert (actual - expected).abs().max() < 1e-4 * expected.std()
    seen = images.clone()
    with torch.inference_mode():  # intermediate values are overwritten, and nothing else
        assert torch.equal(module(images), actual)
        assert torch.equal(module(images), actual)
        folded = module.optimize_for_inference()(images)
    trained = copy.deepcopy(module).train()
    trained(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())
    assert torch.equal(images, seen)
    assert (folded - expected).abs().max() < 1e-4 * expected.std()

"""Modular.under: the model itself, with given masks where its generators multiply theirs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import nemo
from tests.masking.test_generators import Tiny, small


def test_each_sample_may_have_its_own_soft_mask():
    torch.manual_seed(0)
    modular = nemo.modularize(small("vit_small")).eval()
    images = torch.randn(3, 3, 16, 16)
    logits, masks = modular(images)
    torch.testing.assert_close(modular.under(masks)(images), logits)


def test_all_samples_may_share_one_and_fused_layers_be_named_as_a_whole():
    modular = nemo.modularize(small("vit_small")).eval()
    images = torch.randn(3, 3, 16, 16)
    q = torch.arange(modular.layers["blocks.1.attn.q"]) % 2 == 0
    whole = torch.cat([q, torch.ones(2 * len(q), dtype=torch.bool)])
    masked = modular.under({"blocks.1.attn.q": q})
    torch.testing.assert_close(masked(images), modular.under({"blocks.1.attn.qkv": whole})(images))
    qkv = modular.model.blocks[1].attn.qkv
    for parameter in (qkv.weight, qkv.bias):
        parameter.data[: len(q)][~q] = 0
    torch.testing.assert_close(modular.model(images), masked(images))  # parameters are shared


def test_threads_that_share_a_model_get_their_own_masks():
    torch.manual_seed(0)
    modular = nemo.modularize(small("resnet18")).eval()
    batches = [torch.randn(3, 3, 16, 16), 9 * torch.randn(3, 3, 16, 16)]
    expected = [modular(images)[0] for images in batches]
    with ThreadPoolExecutor(2) as pool:
        for logits, index in pool.map(lambda i: (modular(batches[i % 2])[0], i % 2), range(60)):
            torch.testing.assert_close(logits, expected[index])


class Other(Tiny):
    """In training, the norm reads something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.fc(self.bn(y.clone() if self.training else y).mean((2, 3)))


def test_a_mask_that_does_not_act_is_an_error():
    modular = nemo.modularize(Other().eval())
    with pytest.raises(RuntimeError, match="conv: its mask did not act, since bn did not read"):
        modular.train()(torch.randn(2, 3, 8, 8))


def test_a_mask_acts_after_the_norm_also_where_backward_hooks_wrap_what_it_reads():
    torch.manual_seed(0)
    modular = nemo.modularize(Tiny()).eval()
    images = torch.randn(2, 3, 8, 8)
    before = modular(images)[0]
    for module in (modular.model.conv, modular.model.bn):
        module.register_full_backward_hook(lambda m, before, after: None)
    torch.testing.assert_close(modular(images)[0], before)


@pytest.mark.parametrize(
    ("layer", "mask", "message"),
    [
        ("conv9", torch.ones(4), "no layer called 'conv9'; the model has: conv, fc, spare, stem"),
        ("spare", torch.ones(2), "cannot be masked: it is not called as a module in forward"),
        ("fc", torch.ones(3), "is the classifier, .*; accepted: classes=.* of decompose"),
        ("conv", [1, 1, 1, 1], "must be a bool tensor, got list"),
        ("conv", torch.ones(3), r"must have shape \(B, 4\) or \(4,\), got \(3,\)"),
    ],
)
def test_masks_that_do_not_fit_are_one_clear_error(layer, mask, message):
    modular = nemo.modularize(Tiny())
    with pytest.raises(ValueError, match=message):
        modular.under({layer: mask})


def test_a_first_convolution_may_be_masked_by_name():
    modular = nemo.modularize(Tiny().eval())
    images, mask = torch.randn(2, 3, 8, 8), torch.tensor([True, False, True, False])
    masked, module = modular.under({"stem": mask}), nemo.decompose(modular, {"stem": mask})
    modular.model.stem.weight.data[~mask], modular.model.stem.bias.data[~mask] = 0, 0
    expected = modular.model(images)
    for one in (masked, module):
        torch.testing.assert_close(one(images), expected)


def test_a_models_state_and_the_example_stay_as_they_were():
    """A frozen BatchNorm in a training model, and a model that writes into its input."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
            self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.stem(x.mul_(0.5))
            return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, images = Writes().train(), torch.randn(4, 3, 8, 8)
    model.norm.eval()
    before, given = {k: v.clone() for k, v in model.state_dict().items()}, images.clone()
    modular = nemo.modularize(model, example=images)
    assert torch.equal(images, given)
    assert list(modular.layers) == ["conv"]
    batches = [(images.clone(), torch.tensor([0, 1, 2, 0]))]
    for selector in ({}, {"selector": "taylor", "keep": 0.5}):
        masks = nemo.class_masks(modular, batches, **selector)
    nemo.decompose(modular, masks.select([0, 2]))
    training = {name for name, module in model.named_modules() if module.training}
    assert training == {"", "stem", "conv", "fc"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name

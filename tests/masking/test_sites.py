"""find_sites on the shapes of models that names alone would get wrong."""

import re

import pytest
import torch
from torch import nn

import nemo
from nemo.masking.sites import example_input, find_sites
from nemo.models import build_model


def sites_of(name, size=32):
    return {site.layer: site for site in find_sites(build_model(f"timm/{name}", 4, size))}


class Twice(nn.Module):
    input_size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.two_readers = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x)))
        y = self.two_readers(x)
        return self.head((self.bn(y) + self.other(y)).mean((2, 3)))


def test_shared_layers_are_skipped_and_two_readers_mean_no_norm():
    sites = {site.layer: site for site in find_sites(Twice())}
    assert sites["shared"].skip == "called more than once in forward"
    assert sites["two_readers"].norm is None
    assert sites["two_readers"].skip is None


def test_the_first_block_of_a_staged_transformer_is_skipped_and_no_more():
    sites = sites_of("swin_tiny_patch4_window7_224", 56)
    skipped = {layer for layer, site in sites.items() if site.skip == "first Transformer block"}
    assert skipped == {
        f"layers.0.blocks.0.{leaf}"
        for leaf in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_every_convolution_of_a_resnet_has_its_norm():
    sites = sites_of("resnet10t")
    convs = [site for site in sites.values() if site.layer != "fc"]
    assert all(site.norm is not None for site in convs)
    assert sum(site.skip is None for site in convs) == len(convs) - 1
    assert sites["fc"].skip == "classifier: its outputs are the logits"


def test_a_norm_that_reads_a_concatenation_is_no_convolutions_norm():
    model = build_model("timm/densenet121", 4, 32)
    for site in find_sites(model):
        if site.norm is not None:
            assert model.get_submodule(site.norm).num_features == site.neurons, site


def test_finding_sites_leaves_no_trace():
    model = Twice().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_sites(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_example_has_the_size_the_model_says():
    assert example_input(Twice()).shape == (2, 3, 8, 8)
    assert example_input(build_model("timm/vit_tiny_patch16_224", 4, 64)).shape == (2, 3, 64, 64)
    assert example_input(nn.Linear(2, 2).double()).dtype == torch.float64


class Patches(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.patch_embed, self.fc1 = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.patch_embed.img_size = size

    def forward(self, x):
        tokens = self.patch_embed(x).flatten(2).mT
        return self.head(self.fc2(self.fc1(tokens).relu()).mean(1))


@pytest.mark.parametrize(("size", "images"), [(16, (3, 16, 16)), ((8, 16), (3, 8, 16))])
def test_a_patch_embedding_says_the_size_of_a_square_or_both_sizes(size, images):
    assert nemo.modularize(Patches(size)).takes.inputs[0].shape == images


@pytest.mark.parametrize("size", [784, "784", (784.0,), (0, 8), ()])
def test_what_is_no_size_is_one_line(size):
    model = nn.Sequential(nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model.input_size = size
    line = f"the model's input_size is {size!r}; accepted: a size such as (3, 32, 32), or example="
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        nemo.modularize(model)
    assert nemo.modularize(model, torch.zeros(2, 784)).takes.inputs[0].shape == (784,)
    with pytest.raises(ValueError, match=r"the model's patch_embed\.img_size is '224'; accepted: "):
        nemo.modularize(Patches("224"))


def test_a_layer_at_which_little_of_the_sample_arrives_is_masked():
    """A sample moves the input of `late` by 1e-7 of its size: less than rounding often does."""

    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.late, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.late(1 + 1e-7 * self.first(x)))

    torch.manual_seed(0)
    assert nemo.modularize(Faint(), torch.randn(2, 8)).layers == {"late": 8}

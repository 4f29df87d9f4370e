"""The paper's six models: exact, small, and the parent untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nemo.cut import DecomposedModule, decompose
from nemo.models import build_model
from nemo.models.shapes import CnnShape, VitShape
from tests.cut.helpers import assert_same, random_masks, randomise

SMALL_VIT = VitShape(dim=48, depth=4, heads=2, patch=8)
SHAPES = {
    "simcnn": CnnShape(width=0.25),
    "vgg16": CnnShape(width=0.25),
    "rescnn": CnnShape(width=0.25),
    "resnet18": CnnShape(width=0.25),
    "vit_small": SMALL_VIT,
    "deit_small": SMALL_VIT,
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(build_model(name, 10, 32, SHAPES[name]))


@pytest.mark.parametrize("keep", [0.3, 0.7])
@pytest.mark.parametrize("name", SHAPES)
def test_module_computes_the_masked_logits(name: str, keep: float) -> None:
    model = small(name)
    masks = random_masks(model, keep)
    module = decompose(model, masks, classes=[7, 2, 3])
    assert module.certificate["error"] < 1e-11
    assert not module.certificate["vacuous"]
    assert module.classes == [7, 2, 3]
    left = module.report["parameters"] / module.report["parent_parameters"]
    assert left < (0.2 if "cnn" in name or keep > 0.5 else 0.5) + (0.6 if keep > 0.5 else 0)
    assert module.report["flops"] < module.report["parent_flops"]
    assert module.report["blocked"] == []
    assert_same(model, module, masks, [7, 2, 3])


@pytest.mark.parametrize("name", ["resnet18", "vit_small"])
def test_every_layer_can_be_masked(name: str) -> None:
    model = small(name)
    masks = random_masks(model, 0.6, every=True)
    assert_same(model, decompose(model, masks), masks)


def test_parameters_left_of_the_full_size_resnet18() -> None:
    torch.manual_seed(0)
    model = randomise(build_model("resnet18", 10))
    module = decompose(model, random_masks(model, 0.3))
    assert module.report["parent_parameters"] == 11_173_962
    # Of a convolution .09 of the weights are left, more where it reads the unmasked first layer.
    assert module.report["parameters"] < 1_450_000


def test_parent_is_not_modified() -> None:
    model = small("vit_small").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decompose(model, random_masks(model, 0.4), classes=[1])
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_masks_may_carry_their_classes_and_name_fused_layers() -> None:
    class Masks(dict[str, torch.Tensor]):
        classes = (4, 1)

    model = small("vit_small")
    parts = random_masks(model, 0.5)
    fused = torch.cat([parts.pop(f"blocks.1.attn.{part}") for part in "qkv"])
    module = decompose(model, Masks(parts, **{"blocks.1.attn.qkv": fused}))
    assert module.classes == [4, 1]
    thirds = dict(zip((f"blocks.1.attn.{part}" for part in "qkv"), fused.chunk(3), strict=True))
    assert_same(model, module, {**parts, **thirds}, [4, 1])


def test_module_without_masks_is_the_model() -> None:
    model = small("resnet18")
    module = decompose(model, {})
    assert isinstance(module, DecomposedModule)
    assert module.report["parameters"] == module.report["parent_parameters"]
    assert_same(model, module, {})


def test_layers_are_called_as_in_the_parent() -> None:
    names = set(dict(decompose(small("resnet18"), {}).named_children()))
    assert any(name.endswith("0_conv1") for name in names)
    names = set(
        dict(decompose(small("vit_small"), random_masks(small("vit_small"), 0.5)).named_children())
    )
    assert {"blocks_1_attn_q", "blocks_1_mlp_fc1", "head", "cls_token", "pos_embed"} <= names


@pytest.mark.parametrize("name", ["rescnn", "vit_small"])
def test_all_neurons_off_leaves_a_constant_that_is_called_vacuous(name: str) -> None:
    model = small(name)
    masks = {
        layer: torch.zeros_like(mask)
        for layer, mask in random_masks(model, 0.5, every=True).items()
    }
    module = decompose(model, masks)
    assert module.certificate["vacuous"]
    assert module(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    assert module.report["parameters"] <= 10


@pytest.mark.parametrize("name", ["rescnn", "vit_small"])
def test_masks_that_leave_one_neuron(name: str) -> None:
    model = small(name)
    masks = random_masks(model, 0.0)
    for mask in masks.values():
        mask[3] = True
    module = decompose(model, masks)
    assert module.certificate["error"] < 1e-9

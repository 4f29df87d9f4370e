import json

import pytest
import torch

from nemo.masking.generators import modularize
from nemo.models import MODELS, CnnShape, TimmShape, VitShape, build_model, family_of
from nemo.sections import architectures
from nemo.trained import ABOUT, WEIGHTS, load_cell, save_weights

# name: masked layers, K, parameters in millions without generators (paper section 5.1, 10 classes)
PUBLISHED = {
    "simcnn": (12, 4160, 15.25),
    "vgg16": (12, 4160, 15.25),
    "rescnn": (11, 4224, 16.02),
    "resnet18": (19, 4736, 11.17),
    "vit_small": (66, 38016, 21.34),
    "deit_small": (66, 38016, 21.35),
}
SMALL = {name: CnnShape(width=0.125) for name in PUBLISHED}
SMALL |= {name: VitShape(dim=32, depth=3, heads=4, patch=4) for name in ("vit_small", "deit_small")}


def test_the_registry_and_the_params_know_the_same_models():
    assert set(MODELS) == set(architectures().model_fields) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_width_has_the_papers_layers_neurons_and_parameters(name):
    model = build_model(name, 10)
    layers, neurons, millions = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    modular = modularize(model)
    assert len(modular.layers) == layers
    assert sum(modular.layers.values()) == neurons


def test_vit_generators_have_the_papers_size():
    generators = modularize(build_model("vit_small", 10)).generators
    assert sum(p.numel() for p in generators.parameters()) / 1e6 == pytest.approx(53.6, abs=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [16, 32])
def test_small_models_take_small_images(name, size):
    model = build_model(name, 7, size, SMALL[name]).eval()
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_a_timm_transformer_takes_smaller_patches():
    shape = TimmShape(arguments={"patch_size": 4})
    vit = build_model("timm/vit_tiny_patch16_224", 5, 32, shape)
    assert vit.patch_embed.proj.weight.shape == (192, 3, 4, 4)
    assert vit.pos_embed.shape == (1, 1 + 8 * 8, 192)
    assert build_model("timm/vit_tiny_patch16_224", 5, 32, TimmShape()).pos_embed.shape[1] == 5
    with pytest.raises(ValueError, match="timm/resnet10t: arguments"):
        build_model("timm/resnet10t", 5, 32, shape)


def test_a_trained_timm_transformer_is_loaded_with_its_patches(tmp_path):
    shape = TimmShape(
        arguments={"patch_size": 8}, pretrained=True
    )  # weights are its own, nothing is downloaded
    vit = build_model("timm/test_vit", 3, 32, shape.model_copy(update={"pretrained": False}))
    save_weights(vit, tmp_path / WEIGHTS)
    about = {"model": "timm/test_vit", "classes": 3, "image_size": 32, "modular": False}
    (tmp_path / ABOUT).write_text(json.dumps({**about, "shape": shape.model_dump()}))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_cell(tmp_path)(images), vit.eval()(images))


def test_a_timm_model_is_built_and_has_a_family():
    model = build_model("timm/resnet10t", 5, 32)
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert family_of("timm/resnet10t", model) == "cnn"
    vit = build_model("timm/vit_tiny_patch16_224", 5, 32)
    assert vit.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    assert family_of("timm/vit_tiny_patch16_224", vit) == "transformer"


def test_a_patch_that_does_not_divide_the_image_is_an_error():
    with pytest.raises(ValueError, match="patch 5 must divide the image size 32"):
        build_model("vit_small", 10, 32, VitShape(patch=5))


def test_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match="unknown model 'vgg17'; accepted: simcnn"):
        build_model("vgg17", 10)

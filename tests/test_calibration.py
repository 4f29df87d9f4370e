from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn

import nemo
from nemo import recalibrate_bn, recalibrate_bn_for_cuts
from nemo.calibration import batch_norms, training_batches
from nemo.config import load_params
from nemo.data import Batches, load, prepare
from nemo.data.prepared import Split
from nemo.masking.class_masks import ClassMasks
from tests.training.test_fit import STATISTICS, model, split


def test_recalibrated_batchnorm_has_the_statistics_of_the_images():
    network = model()
    norm = network[1]
    network.train()
    weights = [p.clone() for p in network.parameters()]
    recalibrate_bn(network, Batches(split(), *STATISTICS, 10))
    images, _ = next(iter(Batches(split(), *STATISTICS, 40)))
    features = network[0](images).detach()
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    # a mean of the batches' variances is a little below the variance of all images
    torch.testing.assert_close(norm.running_var, features.var((0, 2, 3)), atol=1e-2, rtol=5e-2)
    assert norm.momentum == 0.1
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_images_that_lie_class_by_class_are_mixed_for_recalibration(tmp_path):
    prepare("digits", load_params("params.yaml").data["digits"], tmp_path / "digits")
    data = load(tmp_path / "digits")
    train = data.splits["train"]
    order = train.labels.argsort()
    by_class = Split(train.images[order], train.labels[order])
    data = replace(data, splits={**data.splits, "train": by_class})
    batches = [labels for _, labels in training_batches(data, 64, torch.device("cpu"), seed=0)]
    assert all(len(labels.unique()) > 5 for labels in batches)
    assert torch.equal(torch.cat(batches).sort().values, by_class.labels)


def test_a_last_batch_of_one_image_does_not_stop_recalibration():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    recalibrate_bn(network, Batches(split(5), *STATISTICS, 4))
    assert network[2].num_batches_tracked == 1


def masked(classes=4):
    """A modular network, of which the second convolution is masked, and masks of its classes."""
    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(3, 6, 3),
        "a": nn.Conv2d(6, 6, 3), "an": nn.BatchNorm2d(6), "ar": nn.ReLU(),
        "b": nn.Conv2d(6, 5, 3), "bn": nn.BatchNorm2d(5), "br": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(5, classes),
    }  # fmt: skip
    modular = nemo.modularize(nn.Sequential(OrderedDict(layers)), example=torch.randn(2, 3, 8, 8))
    bits = {layer: torch.rand(classes, count) > 0.7 for layer, count in modular.layers.items()}
    for on in bits.values():
        on[:, 0] = True
    return modular, ClassMasks(bits, {})


def pictures(batches=6, count=12, classes=4):
    """Of each image, the first pixel says which class it is."""
    torch.manual_seed(1)
    labels = [torch.randperm(count) % classes for _ in range(batches)]
    images = [torch.randn(count, 3, 8, 8) for _ in labels]
    for image, label in zip(images, labels, strict=True):
        image[:, 0, 0, 0] = label.float()
    return list(zip(images, labels, strict=True))


def test_statistics_for_cuts_are_those_of_random_classes_under_the_mask_of_these():
    modular, masks = masked()
    first, a, an, b = (modular.model.get_submodule(name) for name in ("first", "a", "an", "b"))
    modular.train()(pictures(1)[0][0])  # so that there are statistics, which must not count
    seen = []
    watch = first.register_forward_hook(lambda _, args, y: seen.append(args[0].clone()))
    recalibrate_bn_for_cuts(modular, masks, pictures(20), sizes=[2])
    watch.remove()
    drawn, means, variances = [], [], []
    for images in seen:
        classes = sorted(set(images[:, 0, 0, 0].int().tolist()))
        drawn.append(tuple(classes))
        features = a(first(images)).detach()
        mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
        features = (features - mean[:, None, None]) / (var[:, None, None] + an.eps).sqrt()
        on = masks["a"][classes].any(0).float()
        features = b((features * on[:, None, None]).relu()).detach()
        means.append(features.mean((0, 2, 3)))
        variances.append(features.var((0, 2, 3)))
    norm = modular.model.get_submodule("bn")
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        norm.running_var, torch.stack(variances).mean(0), atol=1e-5, rtol=1e-4
    )
    assert drawn[0] == (0, 1, 2, 3), "the first batch is of all classes"
    assert {len(classes) for classes in drawn} == {2, 4}
    assert len(set(drawn)) > 4


def test_statistics_for_cuts_follow_the_seed_and_change_nothing_else():
    found = []
    for seed in (0, 0, 1):
        modular, masks = masked()
        modular.train().model.get_submodule("an").eval()
        weights = {name: value.clone() for name, value in modular.named_parameters()}
        recalibrate_bn_for_cuts(modular, masks, pictures(), seed=seed)
        assert all(torch.equal(v, weights[n]) for n, v in modular.named_parameters())
        assert [n for n, m in modular.named_modules() if not m.training] == ["model.an"]
        assert modular.model.get_submodule("bn").momentum == 0.1
        found.append(batch_norms(modular.model)["bn.running_mean"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("seed", range(4))
def test_the_first_draw_is_of_all_classes(seed):
    modular, masks = masked()
    seen = []
    modular.model.get_submodule("first").register_forward_hook(lambda _, x, y: seen.append(len(y)))
    recalibrate_bn_for_cuts(modular, masks, pictures(1), sizes=[2, 3], seed=seed)
    assert seen == [12]


class Named(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, left, right):
        return self.model(torch.cat([left, right], 3))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_statistics_for_cuts_are_the_same_whatever_the_batches_are(kind):
    modular, masks = masked()
    recalibrate_bn_for_cuts(modular, masks, pictures(8))
    batches = [({"left": x[..., :4], "right": x[..., 4:]}, y) for x, y in pictures(8)]
    if kind == "tuple":
        batches = [(tuple(x.values()), y) for x, y in batches]
    named = nemo.modularize(Named(masked()[0].model), example=batches[0][0])
    of_named = ClassMasks({f"model.{layer}": on for layer, on in masks.items()}, {})
    recalibrate_bn_for_cuts(named, of_named, batches)
    expected = batch_norms(modular.model)
    found = batch_norms(named.model.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def stops():
    yield from pictures(2)
    raise OSError("no more images")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batches", [stops, list, lambda: [(x[:1], y[:1]) for x, y in pictures(2)]])
def test_after_an_error_a_model_is_what_it_was(batches, training):
    modular, masks = masked()
    modular.train()(pictures(1)[0][0])
    modular.train(training).model.get_submodule("bn").eval()
    before = [(m.training, getattr(m, "momentum", None)) for m in modular.modules()]
    known = {name: value.clone() for name, value in modular.state_dict().items()}
    for run in (
        lambda: recalibrate_bn_for_cuts(modular, masks, batches()),
        lambda: recalibrate_bn(modular.model, batches()),
    ):
        with pytest.raises((OSError, ValueError), match=r"no more images|no batch has two images"):
            run()
        assert before == [(m.training, getattr(m, "momentum", None)) for m in modular.modules()]
        assert all(torch.equal(known[n], value) for n, value in modular.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 4] * 6)}, r"labels hold 4; accepted: 0\.\.3"),
        ({"labels": torch.zeros(12, 4)}, "accepted: a tensor \\(B,\\) of integers"),
        ({"sizes": [2, 0]}, r"sizes: \[2, 0\]; accepted: numbers of classes, from 1"),
    ],
)
def test_what_has_no_statistics_for_cuts_is_refused(change, message):
    modular, masks = masked()
    batches = [(x, change.get("labels", y)) for x, y in pictures(2)]
    with pytest.raises(ValueError, match=message):
        recalibrate_bn_for_cuts(modular, masks, batches, sizes=change.get("sizes", [2]))
    with pytest.raises(ValueError, match=r"SubsetMasks; accepted: what nemo\.class_masks returns"):
        recalibrate_bn_for_cuts(modular, masks.select([0, 1]), batches)
    with pytest.raises(ValueError, match=r"accepted: what nemo\.modularize returns"):
        recalibrate_bn_for_cuts(modular.model, masks, batches)


def test_batches_without_two_images_of_the_drawn_classes_are_skipped():
    modular, masks = masked()
    one_each = [(images[:4], torch.arange(4)) for images, _ in pictures(5)]
    recalibrate_bn_for_cuts(modular, masks, [one_each[0], *((x[:1], y[:1]) for x, y in one_each)])
    assert modular.model.get_submodule("bn").num_batches_tracked == 1


def test_a_network_without_batchnorm_needs_no_image():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    modular = nemo.modularize(network, example=torch.randn(2, 3, 2, 2))
    masks = ClassMasks({layer: torch.ones(2, n).bool() for layer, n in modular.layers.items()}, {})
    recalibrate_bn_for_cuts(modular, masks, iter(lambda: 1 / 0, None))

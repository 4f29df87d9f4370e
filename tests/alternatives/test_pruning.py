"""The pruned rivals: their sizes, what they keep, and that no layer is lost."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nemo.alternatives.context import Context
from nemo.alternatives.kinds.taylor import with_gradients
from nemo.alternatives.pruning import prune
from nemo.cells import Cell
from nemo.cost import count_flops, count_parameters
from nemo.data import Augment, Batches
from nemo.models import CnnShape, VitShape, build_model
from nemo.predict import accuracy, predict
from tests.small import SUBSET

pytest.importorskip("torch_pruning")

SHAPES = {
    "vgg16": CnnShape(width=0.25),
    "resnet18": CnnShape(width=0.25),
    "vit_small": VitShape(dim=48, depth=2, heads=3),
}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def whole(name):
    torch.manual_seed(0)
    model = build_model(name, 2, 32, SHAPES[name]).eval()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    return model


def context_of(monkeypatch, name, budget, equal="parameters"):
    data = SimpleNamespace(classes=("cat", "dog"), size=(32, 32))
    monkeypatch.setattr(Context, "budget", lambda self: budget)
    params = SimpleNamespace(text_of=lambda subset: subset)
    return Context(params, Cell("pets", name, "nemo", 0), "all", data, None, equal, "budgets")


@pytest.mark.parametrize(("by", "together"), [("magnitude", 0), ("magnitude", 1), ("taylor", 1)])
@pytest.mark.parametrize("equal", ["parameters", "flops"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_pruned_model_is_of_the_size_or_a_little_less(monkeypatch, name, equal, by, together):
    model = whole(name)
    size = {"parameters": count_parameters, "flops": lambda m: count_flops(m, IMAGES)}[equal]
    budget = int(0.3 * size(model))
    context = context_of(monkeypatch, name, budget, equal)
    pruned = prune(context, "it", lambda: model, by=by, together=bool(together))
    assert 0.85 * budget <= size(pruned) <= budget
    with torch.no_grad():
        assert pruned(IMAGES).shape == (4, 2)
    assert all(parameter.grad is None for parameter in pruned.parameters())


@pytest.mark.parametrize("by", ["magnitude", "taylor"])
@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_a_ranking_of_all_layers_leaves_a_tenth_of_each(monkeypatch, name, by):
    """A layer whose channels are all alike is below those of the others that stand out."""
    model = whole(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for layer in layers[1:3]:  # a layer of a block, and the one that reads it
            weight = model.get_submodule(layer).weight
            weight[:], weight.grad[:] = 1, 1
    context = context_of(monkeypatch, name, int(0.1 * count_parameters(model)))
    pruned = prune(context, "it", lambda: model, by=by, together=True)
    for layer in layers:
        before = model.get_submodule(layer).out_channels
        assert pruned.get_submodule(layer).out_channels >= round(0.1 * before)
    before = model.get_submodule(layers[1]).out_channels
    assert pruned.get_submodule(layers[1]).out_channels == max(1, round(0.1 * before))


def test_taylor_keeps_the_channels_whose_loss_matters_and_magnitude_the_large(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        model[0].weight[:] = 1
        model[0].weight[:4] = 2
        model[4].weight[:] = 1
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.grad[:4] = 0.01  # large, and of no use
    model[4].weight.grad[:, :4] = 0.01
    context = context_of(monkeypatch, "vgg16", 4 * 28 + 2 * 5)
    by = {
        how: prune(context, "it", lambda: model, by=how, together=True)
        for how in ("magnitude", "taylor")
    }
    assert (by["magnitude"][0].weight == 2).all()
    assert (by["taylor"][0].weight == 1).all()
    assert by["taylor"][0].out_channels == by["magnitude"][0].out_channels == 4


def test_gradients_are_of_the_subsets_training_images(resnet):
    params, nemo, data, layout = resnet
    context = Context(params, nemo, SUBSET, data, layout)
    model, part = context.standard(), data.restrict([3, 1])
    found = dict(with_gradients(context).named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    size = params.finetune.batch_size
    batches = Batches(
        part.splits["train"], part.mean, part.std, size, shuffle=True, augment=Augment(crop=1)
    )
    assert 1 < len(batches) <= 10
    for images, labels in batches:
        model.zero_grad()
        cross_entropy(model(images), labels).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.abs()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].grad, gradient, atol=1e-5, rtol=1e-3)


def test_what_is_tuned_and_then_pruned_knows_the_subset(resnet):
    params, nemo, data, layout = resnet
    context = Context(params, nemo, SUBSET, data, layout)
    before, after = context.standard(), context.tuned()
    part = data.restrict([3, 1])
    validation = Batches(part.splits["val"], part.mean, part.std, 64)
    assert accuracy(*predict(after, validation)) >= accuracy(*predict(before, validation))
    assert not torch.equal(before.conv1.weight, after.conv1.weight)


def test_budgets_keep_the_classifier_of_what_is_tuned_and_then_pruned(resnet):
    params, nemo, data, layout = resnet
    anew = params.model_copy(
        update={"finetune": params.finetune.model_copy(update={"head": "new"})}
    )
    kept, drawn = (
        Context(p, nemo, SUBSET, data, layout, section="budgets").tuned() for p in (params, anew)
    )
    assert torch.equal(kept.fc.weight, drawn.fc.weight)

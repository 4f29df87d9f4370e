import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nemo
from nemo import bn_for_cuts, recalibrate_bn
from nemo.calibration import training_batches
from nemo.config import load_params
from nemo.data import Batches, load, prepare
from nemo.data.prepared import Split
from nemo.masking.class_masks import ClassMasks
from nemo.signature import samples
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


def masked(classes=4, kind=nn.Sequential):
    """A modular network, of which the second convolution is masked, and masks of its classes."""
    torch.manual_seed(0)
    layers = {
        "first": nn.Conv2d(3, 6, 3),
        "a": nn.Conv2d(6, 6, 3), "an": nn.BatchNorm2d(6), "ar": nn.ReLU(),
        "b": nn.Conv2d(6, 5, 3), "bn": nn.BatchNorm2d(5), "br": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(5, classes),
    }  # fmt: skip
    modular = nemo.modularize(kind(OrderedDict(layers)), example=torch.randn(2, 3, 8, 8))
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


def test_statistics_for_cuts_are_of_random_classes_under_the_mask_of_these():
    modular, masks = masked()
    first, a, an, b = (modular.model.get_submodule(name) for name in ("first", "a", "an", "b"))
    modular.train()(pictures(1)[0][0])  # so that there are statistics, which must not count
    before = {name: value.clone() for name, value in modular.state_dict().items()}
    batches = pictures(5)
    seen = []

    def again():
        for images, labels in batches:
            seen.append(images)
            yield images, labels

    class Loader:
        __iter__ = staticmethod(again)

    found = bn_for_cuts(modular, masks, Loader(), sizes=[2], draws=20)
    assert all(torch.equal(value, before[name]) for name, value in modular.state_dict().items())
    assert len(seen) == len(found.drawn) == 20, "the five batches come four times"
    means, variances = [], []
    for images, drawn in zip(seen, found.drawn, strict=True):
        classes = drawn.nonzero()[:, 0]
        images = images[torch.isin(images[:, 0, 0, 0].long(), classes)]
        features = a(first(images)).detach()
        mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
        features = (features - mean[:, None, None]) / (var[:, None, None] + an.eps).sqrt()
        on = masks["a"][classes].any(0).float()
        features = b((features * on[:, None, None]).relu()).detach()
        means.append(features.mean((0, 2, 3)))
        variances.append(features.var((0, 2, 3)))
    close = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found.statistics["bn.running_mean"], torch.stack(means), **close)
    torch.testing.assert_close(found.statistics["bn.running_var"], torch.stack(variances), **close)
    assert found.drawn[0].all(), "the first draw is of all classes"
    assert set(found.drawn.sum(1).tolist()) == {2, 4}
    assert len({tuple(row) for row in found.drawn.tolist()}) > 4


def test_draws_weigh_more_the_more_their_classes_are_those_of_the_module():
    drawn = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1]]).bool()
    found = nemo.BatchNormForCuts(drawn, {"bn.running_mean": torch.eye(3)})
    alike = [math.exp(16 * share) for share in (1, 2 / 3, 0)]
    expected = torch.tensor(alike) / sum(alike)
    torch.testing.assert_close(found.select([1, 0])["bn.running_mean"], expected)
    of_last = found.select([3])["bn.running_mean"]
    assert of_last.argmax() == 2
    assert of_last[0] == of_last[1]


def test_a_network_is_ready_for_the_module_of_its_classes():
    modular, masks = masked()
    found = bn_for_cuts(modular, masks, pictures(8))
    before = {name: value.clone() for name, value in modular.state_dict().items()}
    ready = found.ready(nn.DataParallel(modular), [3, 1])
    own = found.select([1, 3])
    assert {name.split(".")[0] for name in own} == {"an", "bn"}
    for name, value in ready.model.state_dict().items():
        assert torch.equal(value, own.get(name, before[f"model.{name}"]))
    assert all(torch.equal(value, before[name]) for name, value in modular.state_dict().items())
    images = torch.randn(5, 3, 8, 8)
    module = nemo.decompose(ready, masks.select([3, 1]))
    expected = ready.eval().under(masks.select([3, 1]))(images)[:, [3, 1]]
    torch.testing.assert_close(module(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("classes", [[], [4], [-1], ["one"], [0.5]])
def test_there_are_no_statistics_for_what_is_no_class(classes):
    modular, masks = masked()
    found = bn_for_cuts(modular, masks, pictures(2))
    with pytest.raises(ValueError, match=r"classes: .*; accepted: positions"):
        found.ready(modular, classes)


def test_statistics_of_another_network_are_refused():
    modular, masks = masked()
    found = bn_for_cuts(modular, masks, iter(pictures(2)))
    known = found.statistics
    for statistics in (
        {**known, "bn.running_mean": torch.zeros(2, 6)},
        {**known, "cn.running_mean": torch.zeros(2, 5)},
        {key: value for key, value in known.items() if key.startswith("an.")},
        {"a.bias": torch.zeros(2, 6)},
    ):
        other = nemo.BatchNormForCuts(found.drawn, statistics)
        with pytest.raises(ValueError, match="of other BatchNorms than this network has"):
            other.ready(modular, [0, 1])
    with pytest.raises(ValueError, match=r"accepted: what nemo\.modularize returns"):
        found.ready(modular.model, [0, 1])


@pytest.mark.parametrize(
    ("drawn", "statistics"),
    [
        (torch.ones(2, 4), torch.ones(2, 5)),
        (torch.ones(4).bool(), torch.ones(4, 5)),
        (torch.ones(0, 4).bool(), torch.ones(0, 5)),
        (torch.tensor([[True, False], [False, False]]), torch.ones(2, 5)),
        (torch.ones(2, 4).bool(), torch.ones(2, 5).int()),
        (torch.ones(2, 4).bool(), torch.ones(3, 5)),
        (torch.ones(2, 4).bool(), torch.ones(2)),
    ],
)
def test_draws_and_statistics_belong_together(drawn, statistics):
    with pytest.raises(ValueError, match=r"^(drawn|statistics\['bn.running_mean'\]): accepted: "):
        nemo.BatchNormForCuts(drawn, {"bn.running_mean": statistics})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_have_the_type_of_the_network(dtype):
    modular, masks = masked()
    expected = bn_for_cuts(modular, masks, pictures(40)).select([0, 1])
    batches = [(images, labels.byte()) for images, labels in pictures(40)]
    found = bn_for_cuts(modular.to(dtype), masks, batches)
    assert found.ready(modular, [0, 1]).model.get_submodule("bn").running_mean.dtype == dtype
    close = {torch.float64: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for key, value in found.select([0, 1]).items():
        torch.testing.assert_close(value.float(), expected[key], atol=close, rtol=close)


def test_a_mean_of_half_precision_is_not_rounded_on_its_way():
    drawn = torch.ones(300, 2).bool()
    values = torch.linspace(1, 2, 300)[:, None].bfloat16()
    found = nemo.BatchNormForCuts(drawn, {"bn.running_mean": values}).select([0])
    assert found["bn.running_mean"] == values.double().mean().bfloat16()


class WithAuxiliary(nn.Sequential):
    """A head that is not called."""

    def __init__(self, layers):
        super().__init__(layers)
        self.auxiliary = nn.BatchNorm2d(2)
        self.auxiliary.running_mean.fill_(7)

    def forward(self, images):
        for layer in list(self)[:-1]:
            images = layer(images)
        return images


def test_a_batchnorm_that_is_not_called_keeps_its_statistics():
    modular, masks = masked(kind=WithAuxiliary)
    ready = bn_for_cuts(modular, masks, pictures(3)).ready(modular, [0]).model
    assert ready.auxiliary.running_mean.tolist() == [7, 7]
    assert not torch.equal(ready.bn.running_mean, modular.model.bn.running_mean)


def test_classes_are_drawn_from_those_of_the_batch():
    modular, masks = masked()
    batches = [(images, labels % 2 + 1) for images, labels in pictures(30)]
    found = bn_for_cuts(modular, masks, batches, sizes=[1], draws=60)
    drawn = {tuple(row.nonzero()[:, 0].tolist()) for row in found.drawn}
    assert drawn == {(1,), (2,), (0, 1, 2, 3)}


def test_without_more_there_are_400_draws_of_two_three_five_or_all_classes():
    modular, masks = masked(classes=8)
    found = bn_for_cuts(modular, masks, pictures(4, 16, classes=8))
    assert found.drawn.shape == (400, 8)
    counts = found.drawn.sum(1).bincount(minlength=9)
    assert counts.nonzero()[:, 0].tolist() == [2, 3, 5, 8]
    assert counts[[2, 3, 5, 8]].min() > 60


def test_statistics_for_cuts_follow_the_seed():
    modular, masks = masked()
    found = [bn_for_cuts(modular, masks, pictures(), seed=seed) for seed in (0, 0, 1)]
    key = "bn.running_mean"
    assert torch.equal(found[0].statistics[key], found[1].statistics[key])
    assert not torch.equal(found[0].drawn, found[2].drawn)


def test_an_iterator_is_gone_through_once():
    modular, masks = masked()
    assert len(bn_for_cuts(modular, masks, iter(pictures(7))).drawn) == 7
    assert len(bn_for_cuts(modular, masks, pictures(7), draws=3).drawn) == 3


@pytest.mark.parametrize("seed", range(4))
def test_the_first_draw_is_of_all_classes(seed):
    modular, masks = masked()
    found = bn_for_cuts(modular, masks, pictures(1), sizes=[2, 3], draws=1, seed=seed)
    assert found.drawn.tolist() == [[True] * 4]


class Named(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, left, right):
        return self.model(torch.cat([left, right], 3))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_statistics_for_cuts_are_the_same_whatever_the_batches_are(kind):
    modular, masks = masked()
    expected = bn_for_cuts(modular, masks, pictures(8)).statistics
    batches = [({"left": x[..., :4], "right": x[..., 4:]}, y) for x, y in pictures(8)]
    if kind == "tuple":
        batches = [(tuple(x.values()), y) for x, y in batches]
    named = nemo.modularize(Named(masked()[0].model), example=batches[0][0])
    of_named = ClassMasks({f"model.{layer}": on for layer, on in masks.items()}, {})
    found = bn_for_cuts(named, of_named, batches).statistics
    assert len(expected) == len(found) == 4
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in expected.items())


def stops():
    yield from pictures(2)
    raise OSError("no more images")


def endless():
    return [(x * torch.nan, y) for x, y in pictures(2)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "batches", [stops, list, endless, lambda: [(x[:1], y[:1]) for x, y in pictures(2)]]
)
def test_after_an_error_a_model_is_what_it_was(batches, training):
    modular, masks = masked()
    modular.train()(pictures(1)[0][0])
    modular.train(training).model.get_submodule("bn").eval()
    before = [(m.training, getattr(m, "momentum", None)) for m in modular.modules()]
    known = {name: value.clone() for name, value in modular.state_dict().items()}
    for run in (
        lambda: bn_for_cuts(modular, masks, batches()),
        lambda: recalibrate_bn(modular.model, batches()),
    ):
        with pytest.raises(
            (OSError, ValueError), match=r"no more images|no batch has two|not finite"
        ):
            run()
        assert before == [(m.training, getattr(m, "momentum", None)) for m in modular.modules()]
        assert all(torch.equal(known[n], value) for n, value in modular.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 4] * 6)}, r"labels hold 4; accepted: 0\.\.3"),
        ({"labels": torch.zeros(12, 4)}, "accepted: a tensor \\(B,\\) of integers"),
        ({"sizes": [2, 0]}, "sizes: 0; accepted: integers from 1"),
        ({"sizes": 2}, "sizes: 2; accepted: a list of integers from 1"),
        ({"sizes": [2.5]}, r"sizes: 2\.5; accepted: integers from 1"),
        ({"draws": 0}, "draws: 0; accepted: integers from 1"),
        ({"draws": 2.5}, r"draws: 2\.5; accepted: integers from 1"),
    ],
)
def test_what_has_no_statistics_for_cuts_is_refused(change, message):
    modular, masks = masked()
    batches = [(x, change.get("labels", y)) for x, y in pictures(2)]
    options = {"sizes": change.get("sizes", [2]), "draws": change.get("draws", 5)}
    with pytest.raises(ValueError, match=message):
        bn_for_cuts(modular, masks, batches, **options)
    with pytest.raises(ValueError, match=r"SubsetMasks; accepted: what nemo\.class_masks returns"):
        bn_for_cuts(modular, masks.select([0, 1]), batches)
    with pytest.raises(ValueError, match=r"accepted: what nemo\.modularize returns"):
        bn_for_cuts(modular.model, masks, batches)


def test_images_of_another_type_are_converted():
    modular, _ = masked()
    found = []
    for type_ in (torch.float32, torch.float64):
        recalibrate_bn(modular.model, [(x.to(type_), y) for x, y in pictures(2)])
        found.append(modular.model.get_submodule("bn").running_mean.clone())
    torch.testing.assert_close(*found)
    with pytest.raises(
        ValueError, match=r"a batch is a Tensor; accepted: a pair \(inputs, labels\)"
    ):
        recalibrate_bn(modular.model, [x for x, _ in pictures(2)])


def test_draws_of_fewer_than_two_images_are_left_out():
    modular, masks = masked()
    one_each = [(images[:4], torch.arange(4)) for images, _ in pictures(5)]
    batches = [one_each[0], *((x[:1], y[:1]) for x, y in one_each)]
    assert bn_for_cuts(modular, masks, iter(batches)).drawn.tolist() == [[True] * 4]


def test_a_network_without_batchnorm_needs_no_image():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5), nn.Linear(5, 2))
    modular = nemo.modularize(network, example=torch.randn(2, 3, 2, 2))
    masks = ClassMasks({layer: torch.ones(2, n).bool() for layer, n in modular.layers.items()}, {})
    found = bn_for_cuts(modular, masks, iter(lambda: 1 / 0, None))
    assert found.select([1]) == {}
    assert found.ready(modular, [1]).state_dict().keys() == modular.state_dict().keys()


class TwoHeads(nn.Module):
    """A second head that counts in train mode alone, as auxiliary classifiers do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.first(x).mean((2, 3)) + (self.second(x).mean((2, 3)) if self.training else 0)


def test_a_batchnorm_that_is_not_called_stays_as_it_is():
    network = TwoHeads().eval()
    network.second.running_mean.fill_(5.0)
    network.second.running_var.fill_(9.0)
    recalibrate_bn(network, Batches(split(), *STATISTICS, 10))
    assert network.first.num_batches_tracked == 4
    assert network.second.running_mean.tolist() == [5.0] * 3
    assert network.second.running_var.tolist() == [9.0] * 3


class Called(nn.BatchNorm2d):
    """Its statistics move, and it counts no batches."""

    def forward(self, x):
        buffers = self.running_mean, self.running_var
        return F.batch_norm(x, *buffers, self.weight, self.bias, self.training, 0.5)


def test_a_batchnorm_that_counts_no_batches_is_estimated():
    network = nn.Sequential(nn.BatchNorm2d(3), Called(3)).eval()
    network[1].running_mean.fill_(5.0)
    recalibrate_bn(network, Batches(split(), *STATISTICS, 10))
    assert (network[1].running_mean.abs() < 0.5).all()


def test_a_row_for_all_samples_is_not_a_batch_of_one():
    ids, positions = torch.zeros(6, 5), torch.zeros(1, 5)
    for inputs in ((positions, ids), {"ids": ids, "positions": positions}, [positions, ids], ids):
        assert samples(inputs) == 6
    assert (samples(()), samples(positions)) == (0, 1)


def test_a_module_says_that_its_statistics_are_estimated_anew():
    convolutions = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
    model = nn.Sequential(*convolutions, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(4 * 8 * 8, 3)).eval()
    example = torch.zeros(2, 3, 8, 8)
    modular = nemo.modularize(model, example=example)
    on = {layer: torch.ones(count, dtype=torch.bool) for layer, count in modular.layers.items()}
    module = nemo.decompose(modular, on)
    assert "recalibrated_bn" not in module.info
    with pytest.raises(ValueError, match="no batch has two images"):
        recalibrate_bn(module, [(torch.randn(1, 3, 8, 8), torch.zeros(6))])
    assert "recalibrated_bn" not in module.info
    for few in ((torch.randn(1, 3, 8, 8),), {"input": torch.randn(1, 3, 8, 8)}):
        with pytest.raises(ValueError, match="no batch has two images"):
            recalibrate_bn(module, [(few, None)])
    recalibrate_bn(module, [(torch.randn(6, 3, 8, 8), None)])  # labels are not used
    assert module.info["recalibrated_bn"] is True

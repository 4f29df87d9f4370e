"""Class masks of a network trained elsewhere, against the scores computed neuron by neuron."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo


class Net(nn.Module):
    """A convolution with its BatchNorm, and a Linear on tokens; both may be masked by hand."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
        self.mix, self.fc = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x, conv=1.0, mix=1.0):
        y = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))) * conv)
        tokens = self.mix(y.flatten(2).mT) * mix
        return self.fc(torch.relu(tokens).mean(1))

    def outputs(self, x):
        y = self.norm(self.conv(torch.relu(self.stem(x))))
        return {"conv": y.flatten(2), "mix": self.mix(torch.relu(y).flatten(2).mT).mT}


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net().train()
    net(torch.randn(16, 3, 8, 8))  # statistics that differ from those it begins with
    return net.eval().double()


@pytest.fixture
def loader():
    torch.manual_seed(1)
    labels = torch.tensor([0, 1, 2, 2, 0, 1, 0])
    images = torch.randn(7, 3, 8, 8).double()
    return [(images[:4], labels[:4]), (images[4:], labels[4:])]


def top(scores, keep):
    """The `keep` highest of each row, one by one."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]
        rows.append([i in order for i in range(len(row))])
    return rows


def per_class(scores, labels):
    return torch.stack([scores[labels == c].mean(0) for c in range(3)])


def test_taylor_keeps_the_neurons_whose_loss_moves_most(net, loader):
    """The derivative of a sample's loss by a neuron's mask, from a difference of two losses."""
    step, scores = 1e-6, {"conv": [], "mix": []}
    labels = torch.cat([y for _, y in loader])
    images = torch.cat([x for x, _ in loader])
    for image, label in zip(images, labels, strict=True):
        for layer, count, shape in (("conv", 6, (-1, 1, 1)), ("mix", 5, (-1,))):
            row = []
            for neuron in range(count):
                losses = []
                for sign in (1, -1):
                    mask = torch.ones(count, dtype=torch.float64)
                    mask[neuron] += sign * step
                    logits = net(image[None], **{layer: mask.view(shape)})
                    losses.append(F.cross_entropy(logits, label[None]).item())
                row.append(abs(losses[0] - losses[1]) / (2 * step))
            scores[layer].append(row)
    modular = nemo.modularize(net, example=images[:2])
    masks = nemo.class_masks(modular, loader, selector="taylor", keep=0.5)
    for layer, kept in (("conv", 3), ("mix", 2)):
        expected = top(per_class(torch.tensor(scores[layer]), labels), kept)
        assert masks[layer].tolist() == expected


def test_activation_keeps_the_largest_mean_outputs(net, loader):
    labels = torch.cat([y for _, y in loader])
    outputs = net.outputs(torch.cat([x for x, _ in loader]))
    modular = nemo.modularize(net, example=loader[0][0])
    masks = nemo.class_masks(modular, loader, selector="activation", keep=0.34)
    for layer, kept in (("conv", 2), ("mix", 2)):
        assert masks[layer].tolist() == top(per_class(outputs[layer].abs().mean(2), labels), kept)


def test_a_subset_of_a_network_trained_elsewhere_is_cut_exactly(net, loader):
    """conv keeps 3 + 3 neurons at most; the module computes what the network with them computes."""
    images = torch.cat([x for x, _ in loader])
    net.train()
    modular = nemo.modularize(net, example=images)
    masks = nemo.class_masks(modular, loader, selector="taylor", keep=0.5).select([2, 0])
    assert net.training
    net.eval()
    module = nemo.decompose(modular, masks)
    on = {layer: mask.double() for layer, mask in masks.items()}
    expected = net(images, on["conv"].view(-1, 1, 1), on["mix"])[:, [2, 0]]
    torch.testing.assert_close(module(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"selector": "tailor"}, "tailor"),
        ({"selector": "taylor"}, "taylor: keep: field required; its settings: keep"),
        ({"selector": "taylor", "keep": 0}, "taylor: keep: input should be greater than 0"),
        ({"selector": "taylor", "keep": 0.5, "threshold": 0.9}, "taylor: threshold: extra"),
    ],
)
def test_mistakes_are_one_line(net, loader, arguments, message):
    modular = nemo.modularize(net, example=loader[0][0])
    with pytest.raises(ValueError, match=message) as caught:
        nemo.class_masks(modular, loader, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("selector", ["taylor", "activation"])
def test_labels_of_another_shape_are_refused(net, loader, selector):
    modular = nemo.modularize(net, loader[0][0])
    column = [(images, labels[:, None]) for images, labels in loader]
    message = r"labels have shape \(4, 1\) and type .*; accepted: a tensor \(B,\)"
    with pytest.raises(ValueError, match=message):
        nemo.class_masks(modular, column, selector=selector, keep=0.5)
    with pytest.raises(ValueError, match=message):
        nemo.shrink(modular, column, [0], keep=0.5, selector=selector)


@pytest.mark.parametrize(
    "settings", [{"selector": "taylor", "keep": 0.5}, {"selector": "activation", "keep": 0.5}, {}]
)
def test_a_label_that_is_no_class_of_the_model_is_named(net, loader, settings):
    modular = nemo.modularize(net, loader[0][0])
    more = [*loader, (loader[0][0], torch.full((4,), 3))]
    with pytest.raises(ValueError, match=r"^labels hold 3; accepted: 0\.\.2$"):
        nemo.class_masks(modular, more, **settings)


class Behind(Net):
    """No gradient reaches the first layers, or the last one decides nothing."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.side = nn.Conv2d(6, 7, 1)

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            y = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        if self.how == "detach":
            y = y.detach()
        tokens = torch.relu(self.mix(y.flatten(2).mT)).mean(1)
        return {"side": self.side(y), "logits": self.fc(tokens)}


@pytest.mark.parametrize(
    ("how", "layers"), [("no_grad", "conv"), ("detach", "conv"), ("side", "side")]
)
def test_layers_that_no_gradient_reaches_are_named(loader, how, layers):
    torch.manual_seed(0)
    network = Behind(how).double()
    modular = nemo.modularize(network, loader[0][0], output="logits")
    with pytest.raises(ValueError, match=f"^selector: no gradient reaches .*{layers}.*; accepted"):
        nemo.shrink(modular, loader, [0, 2], keep=0.5)
    if how == "no_grad":
        return
    module = nemo.shrink(modular, loader, [0, 2], keep=0.5, selector="activation")
    assert module.certificate["error"] < 1e-9


@pytest.mark.parametrize("selector", ["taylor", "activation"])
def test_scores_that_are_not_finite_choose_nothing(net, loader, selector):
    modular = nemo.modularize(net, loader[0][0])
    endless = [(images * torch.nan, labels) for images, labels in loader]
    with pytest.raises(ValueError, match=r"^\w+: scores are not finite"):
        nemo.class_masks(modular, endless, selector=selector, keep=0.5)


def test_taylor_needs_a_row_of_logits_for_each_label(loader):
    network = nn.Sequential(nn.Flatten(2), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    modular = nemo.modularize(network, loader[0][0])
    with pytest.raises(ValueError, match=r"^taylor: logits are \(4, 3, 3\); accepted: \(B, C\)"):
        nemo.class_masks(modular, loader, selector="taylor", keep=0.5)


def test_a_batch_of_no_images_counts_for_nothing(net, loader):
    modular, nothing = nemo.modularize(net, loader[0][0]), (torch.zeros(0, 3, 8, 8), torch.zeros(0))
    with_it = [*loader, (nothing[0].double(), nothing[1].long())]
    masks = [nemo.class_masks(modular, batches, threshold=0.5) for batches in (loader, with_it)]
    assert all(torch.equal(masks[0][layer], masks[1][layer]) for layer in modular.layers)


@pytest.mark.parametrize(("classes", "which"), [(2, "class 2"), (1, "classes 1..2")])
def test_classes_of_the_model_without_samples_are_named(net, loader, classes, which):
    modular = nemo.modularize(net, loader[0][0])
    fewer = [(images, labels % classes) for images, labels in loader]
    with pytest.warns(UserWarning, match=f"no sample of {which} of the model: no masks of") as said:
        masks = nemo.class_masks(modular, fewer, selector="taylor", keep=0.5)
    assert said[0].filename == __file__
    assert masks.num_classes == classes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nemo.class_masks(modular, loader)

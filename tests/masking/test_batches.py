"""A mask has one row per sample, wherever a layer's input holds the samples.

The oracle runs each sample alone, so that all rows of a layer's input are this sample's: the mask
is the generator's of their mean. It knows nothing of layouts.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo
from nemo.models import build_model
from tests.oracles.masked import modular_logits


class Windows(nn.Module):
    """Attention-like layers on 4 windows of 2 x 2 tokens, folded into the batch."""

    def __init__(self, sample_major):
        super().__init__()
        self.sample_major = sample_major
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv, self.bn = nn.Conv2d(8, 6, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).unflatten(2, (2, 2)).unflatten(4, (2, 2))  # (B, C, 2, 2, 2, 2)
        x = x.permute(0, 2, 4, 3, 5, 1) if self.sample_major else x.permute(2, 4, 0, 3, 5, 1)
        x = x.reshape(-1, 4, 8)
        x = torch.tanh(self.b(torch.relu(self.a(x)))) + x
        x = self.bn(self.conv(x.mT.unflatten(2, (2, 2)))).relu().flatten(1)  # (4 B, 6)
        x = x.view(-1, 4, 6).mean(1) if self.sample_major else x.view(4, -1, 6).mean(0)
        return self.head(x)


class TokensFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)  # (T, B, C)
        return self.head((x + self.b(torch.relu(self.a(x)))).mean(0))


class Flattened(nn.Module):
    """Tokens as rows of a matrix: no fully connected layer, though its input has two dimensions."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        return self.head(torch.relu(self.a(x.reshape(-1, 8))).view(x.shape[0], -1, 12).mean(1))


def alone(modular, images):
    """Logits and masks of each sample by itself, its masks multiplied in by hooks."""
    logits, masks = [], {site.layer: [] for site in modular.sites}
    model, pooled = modular.model, {}

    def read(name, module, x):
        channels = 1 if isinstance(module, nn.Conv2d) else x.ndim - 1
        pooled[name] = x.movedim(channels, -1).flatten(0, -2).mean(0)

    def multiply(name, channels, y):
        mask = modular.generators[name](pooled[name])
        masks[name].append(mask)
        return (y.movedim(channels, -1) * mask).movedim(-1, channels)

    handles = []
    for name in masks:
        layer, after = model.get_submodule(name), {"conv": "bn"}.get(name, name)
        channels = 1 if name == "conv" else -1
        handles += [
            layer.register_forward_pre_hook(lambda m, a, name=name: read(name, m, a[0])),
            model.get_submodule(after).register_forward_hook(
                lambda m, a, y, name=name, c=channels: multiply(name, c, y)
            ),
        ]
    logits = torch.cat([model(image[None]) for image in images])
    for handle in handles:
        handle.remove()
    return logits, {name: torch.stack(rows) for name, rows in masks.items()}


NETWORKS = {
    "windows of a sample together": (lambda: Windows(True), ["a", "b", "conv"], (0, "outer")),
    "windows of a place together": (lambda: Windows(False), ["a", "b", "conv"], (0, "inner")),
    "tokens first": (TokensFirst, ["a", "b"], (1, "")),
    "tokens as rows": (Flattened, ["a"], (0, "outer")),
}


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    make, layers, layout = NETWORKS[request.param]
    torch.manual_seed(0)
    modular = nemo.modularize(make().double(), torch.zeros(2, 3, 4, 4).double()).eval()
    for parameter in modular.generators.parameters():  # masks from 0 to 1, unlike at the start
        parameter.data.normal_()
    assert list(modular.layers) == layers
    assert {(site.batch, site.fold) for site in modular.sites} == {layout}
    return modular


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_logits_and_masks_are_those_of_each_sample_alone(case, count):
    images = torch.randn(count, 3, 4, 4).double()
    logits, masks = case(images)
    expected, rows = alone(case, images)
    torch.testing.assert_close(logits, expected)
    assert list(masks) == list(rows)
    for layer, neurons in case.layers.items():
        assert masks[layer].shape == (count, neurons)
        torch.testing.assert_close(masks[layer], rows[layer])
        assert (masks[layer] == 0).any()
        assert (masks[layer] > 0).any()


def test_gradients_are_those_of_each_sample_alone(case):
    images, labels = torch.randn(6, 3, 4, 4).double(), torch.tensor([0, 1, 2, 0, 1, 3])
    found = []
    for logits, masks in (case(images), alone(case, images)):
        loss = F.cross_entropy(logits, labels) + nemo.contrastive_loss(masks, labels, tau=0.2)
        weights = list(case.parameters())
        found.append(torch.autograd.grad(loss, weights))
    for ours, literal in zip(*found, strict=True):
        torch.testing.assert_close(ours, literal)


def test_constant_masks_and_the_module_are_the_same_network(case):
    generator = torch.Generator().manual_seed(1)
    masks = {layer: torch.rand(n, generator=generator) < 0.5 for layer, n in case.layers.items()}
    images = torch.randn(5, 3, 4, 4, generator=generator).double()
    expected = modular_logits(case, masks, images)
    torch.testing.assert_close(case.under(masks)(images), expected)
    module = nemo.decompose(case, masks)
    assert module.certificate["error"] < 1e-9
    assert not module.certificate["vacuous"]
    torch.testing.assert_close(module(images), expected)
    assert module.report["parameters"] < module.report["parent_parameters"]


def test_constant_masks_of_each_sample_act_on_its_own_rows(case):
    images = torch.randn(3, 3, 4, 4).double()
    rows = {layer: torch.rand(3, n).double() for layer, n in case.layers.items()}
    together = case.under(rows)(images)
    for i in range(3):
        one = case.under({layer: row[i] for layer, row in rows.items()})(images[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], one)


class Mixing(nn.Module):
    """Divides by the mean over the batch, so that every row depends on every sample."""

    def __init__(self):
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 1)
        self.b, self.head, self.table = nn.Conv2d(8, 8, 1), nn.Linear(8, 4), nn.Linear(2, 8)
        self.register_buffer("places", torch.randn(4, 2))

    def forward(self, x):
        x = self.a(self.stem(x))
        x = self.b(x / (1 + x.square().mean(0))).flatten(2).mT
        return self.head((x + self.table(self.places)).relu().mean(1))


def test_where_samples_cannot_be_told_apart_a_layer_is_skipped_with_the_reason():
    torch.manual_seed(0)
    modular = nemo.modularize(Mixing(), torch.zeros(1, 3, 4, 4))
    assert list(modular.layers) == ["a"]
    assert modular.skipped["b"] == "the samples in its input are mixed"
    assert modular.skipped["table"] == "its input does not depend on the sample"
    for layer in ("b", "table"):  # one mask for all is possible
        images = torch.randn(3, 3, 4, 4)
        assert modular.under({layer: torch.ones(8)})(images).equal(modular.model(images))
        wrong = rf"^masks\['{layer}'\]: which rows of this layer are a sample's is not known"
        with pytest.raises(ValueError, match=wrong):
            modular.under({layer: torch.ones(3, 8)})


class Partition(nn.Module):
    """Windows of 2 x 2 pixels, as many as fit."""

    def __init__(self, count=lambda x: x.shape[0]):
        super().__init__()
        self.stem, self.a, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 4)
        self.count = count

    def forward(self, x):
        count = self.count(x)
        x = self.stem(x).unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 3, 5, 1)
        return self.head(self.a(x.reshape(-1, 4, 8)).relu().view(count, -1, 8).mean(1))


def test_a_batch_that_is_traced_as_a_constant_is_one_clear_line():
    images = torch.zeros(2, 3, 4, 4)
    for refused in (nemo.modularize, lambda model, x: nemo.decompose(model, {}, example=x)):
        with pytest.raises(ValueError, match=r"^the model cannot be traced: .* as len\(x\), int"):
            refused(Partition(len), images)


class UpTo4(Partition):
    """What it computes of a batch depends on whether that has more than four images."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(self, super().forward, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda self, forward, x: torch.cat([forward(part) for part in x.split(4)]),
        lambda self, forward, x: forward(x) * (2 if x.shape[0] > 4 else 1),
    ],
)
def test_a_graph_that_holds_up_to_some_batch_size_is_refused(change):
    with pytest.raises(ValueError, match=r"^the model cannot be traced: it takes the batch size"):
        nemo.modularize(UpTo4(change), torch.zeros(2, 3, 4, 4))


def test_an_image_of_another_size_that_changes_the_folding_is_refused():
    modular = nemo.modularize(Partition(), torch.zeros(2, 3, 2, 2))
    modular(torch.zeros(3, 3, 2, 2))
    with pytest.raises(RuntimeError, match=r"^a: its input holds 12 rows for 3 samples, unlike"):
        modular(torch.zeros(3, 3, 4, 4))


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", 56), ("mobilevit_xxs", 64)]
)
def test_families_that_fold_windows_or_patches_train(name, size):
    torch.manual_seed(0)
    model = build_model(f"timm/{name}", 4, size)
    images = torch.randn(4, 3, size, size)
    modular = nemo.modularize(model, images)
    assert {site.fold for site in modular.sites} == {"", "outer"}
    logits, masks = modular(images)
    labels = torch.tensor([0, 0, 1, 1])
    (F.cross_entropy(logits, labels) + nemo.contrastive_loss(masks, labels, tau=0.2)).backward()
    for generator in modular.generators.values():
        assert generator.excite.weight.grad.abs().max() > 0
    modular.eval()
    with torch.no_grad():
        torch.testing.assert_close(modular(images)[0][1:2], modular(images[1:2])[0])
    random = torch.Generator().manual_seed(0)
    masks = {layer: torch.rand(n, generator=random) < 0.5 for layer, n in modular.layers.items()}
    module = nemo.decompose(modular, masks).double()
    expected = modular_logits(modular, masks, images)
    torch.testing.assert_close(module(images.double()), expected, rtol=0, atol=1e-9)


def test_a_layer_with_its_input_by_name_is_skipped():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            return self.head(self.c(self.b(input=self.a(x))))

    modular = nemo.modularize(Named(), torch.zeros(2, 4))
    assert modular.skipped["b"] == "its input is passed by name"
    assert list(modular.layers) == ["c"]

"""Convolutions of any rank, transposed or not, and Linears of MLPs are masked; classifiers are not.

The oracle runs an nn.Sequential layer by layer, in float64, with the masks multiplied in.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo
from nemo.masking.sites import CLASSIFIER, find_sites, head_names
from nemo.models import build_model

PADDINGS = {  # of layers 2 and 5
    "plain": ({"stride": 2, "padding": 1}, {"padding": 2}),
    "transposed": ({"stride": 2, "padding": 1, "output_padding": 1}, {"padding": 2}),
    "same": ({"padding": "same"}, {"padding": "same"}),
}


def convolutions(rank, kind):
    """Layers 2 and 5 are masked, 2 after its norm; of 5, which has groups, the output itself."""
    conv, turned, norm, pool = (
        getattr(nn, f"{name}{rank}d")
        for name in ("Conv", "ConvTranspose", "BatchNorm", "AdaptiveAvgPool")
    )
    layer = turned if kind == "transposed" else conv
    first, then = PADDINGS[kind]
    return nn.Sequential(
        conv(3, 8, 3, padding=1), nn.ReLU(), layer(8, 12, 3, bias=False, **first), norm(12),
        nn.ReLU(), layer(12, 18, 3, dilation=2, groups=3, **then), nn.Tanh(),
        conv(18, 8, 3, padding=1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4),
    )  # fmt: skip


NETWORKS = {
    **{
        f"{kind} {rank}d": (
            lambda rank=rank, kind=kind: convolutions(rank, kind),
            (3, *[6] * rank),
            {"2": "3", "5": "5", "7": "7"},
        )
        for rank in (1, 2, 3)
        for kind in PADDINGS
    },
    "MLP": (mlp, (10,), {"2": "3", "5": "5", "7": "7"}),
}


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    make, shape, acts = NETWORKS[request.param]
    torch.manual_seed(0)
    model = make().double()
    for norm in (m for m in model if hasattr(m, "running_mean")):
        for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
            tensor.normal_()
    modular = nemo.modularize(model, torch.zeros(2, *shape).double()).eval()
    for parameter in modular.generators.parameters():
        parameter.data.normal_()
    assert {site.layer: site.norm or site.layer for site in modular.sites} == acts
    assert modular.skipped[str(len(model) - 1)] == CLASSIFIER
    return modular, torch.randn(5, *shape).double(), acts


def by_hand(modular, x, acts, masks):
    """Logits and masks; `masks` are those of the generators where they are None."""
    used, after = {}, {}
    for name, layer in modular.model.named_children():
        if name in acts:
            pooled = x.flatten(2).mean(2) if x.ndim > 2 else x
            used[name] = modular.generators[name](pooled) if masks is None else masks[name]
            after[acts[name]] = used[name]
        x = layer(x)
        if name in after:
            mask = after[name].to(x)
            x = x * mask.view(-1, mask.shape[-1], *[1] * (x.ndim - 2))
    return x, used


def test_logits_masks_and_gradients_are_those_by_hand(case):
    modular, x, acts = case
    labels, found = torch.tensor([0, 1, 2, 0, 1]), []
    for logits, masks in (modular(x), by_hand(modular, x, acts, None)):
        loss = F.cross_entropy(logits, labels) + nemo.contrastive_loss(masks, labels, tau=0.2)
        found.append((logits, masks, torch.autograd.grad(loss, list(modular.parameters()))))
    ours, literal = found
    torch.testing.assert_close(ours, literal)


def test_constant_masks_the_module_and_its_files_are_the_same_network(case, tmp_path):
    modular, x, acts = case
    generator = torch.Generator().manual_seed(3)
    masks = {layer: torch.rand(n, generator=generator) < 0.5 for layer, n in modular.layers.items()}
    expected, _ = by_hand(modular, x, acts, masks)
    torch.testing.assert_close(modular.under(masks)(x), expected)
    module = nemo.decompose(modular, masks)
    assert module.certificate["error"] < 1e-9
    assert not module.certificate["vacuous"]
    torch.testing.assert_close(module(x), expected)
    assert not module.report["blocked"]
    kept = {layer: int(mask.sum()) for layer, mask in masks.items()}
    left = module.report["rows_left"]
    assert left["2"] == kept["2"]
    assert left["7"] == kept["7"]
    nemo.save(module, tmp_path / "module")
    torch.testing.assert_close(nemo.load(tmp_path / "module")(x), expected)


class Heads(nn.Module):
    """What may come after a classifier."""

    def __init__(self, head, after):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.after = head, after

    def forward(self, x):
        return self.after(self.head(self.body(self.stem(x).relu()).relu()))


class Channels(nn.Module):
    """A Linear on the channels of each pixel."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x.movedim(1, -1))


HEADS = {
    "1x1 convolution": (nn.Conv2d(8, 4, 1), lambda x: x.mean((2, 3)), "head"),
    "of SqueezeNet": (nn.Conv2d(8, 4, 1), lambda x: F.relu(x).amax((2, 3)), "head"),
    "Linear on tokens": (Channels(), lambda x: x.mean((1, 2)), "head.linear"),
    "logits of each pixel": (nn.Conv2d(8, 4, 1), lambda x: x, "head"),
    "log_softmax": (nn.Conv2d(8, 4, 1), lambda x: x.mean((2, 3)).log_softmax(1), "head"),
    "softmax": (nn.Conv2d(8, 4, 1), lambda x: x.mean((2, 3)).softmax(1), "head"),
    "logits in a dict": (nn.Conv2d(8, 4, 1), lambda x: {"logits": x.mean((2, 3))}, "head"),
    "scaled": (nn.Sequential(nn.Conv2d(8, 4, 8), nn.Flatten()), lambda x: 3 * x, "head.0"),
    "two classes": (nn.Conv2d(8, 2, 1), lambda x: x.mean((2, 3)).log_softmax(1), "head"),
    "two classes, the largest": (
        nn.Conv2d(8, 2, 1),
        lambda x: x.amax((2, 3)).log_softmax(1),
        "head",
    ),
    "one logit, squeezed": (nn.Conv2d(8, 1, 8), lambda x: x.flatten(), "head"),
    "one logit and its opposite": (
        nn.Conv2d(8, 1, 8),
        lambda x: torch.cat([x, -x], 1).flatten(1),
        "head",
    ),
    "a logit for each row": (nn.Conv2d(8, 1, (1, 8)), lambda x: x.squeeze(1).squeeze(-1), "head"),
    "anchors": (nn.Conv2d(8, 12, 8), lambda x: x.view(len(x), 3, 4), "head"),
    "anchors, a softmax for each": (
        nn.Conv2d(8, 12, 8),
        lambda x: x.view(-1, 3, 4).softmax(2),
        "head",
    ),
    "but the background": (nn.Conv2d(8, 5, 8), lambda x: x.flatten(1)[:, 1:], "head"),
    "upsampled": (
        nn.Conv2d(8, 4, 1, 2),
        lambda x: F.interpolate(x, size=8, mode="bilinear"),
        "head",
    ),
    "softmax of three": (nn.Conv2d(8, 3, 8), lambda x: x.flatten(1).softmax(1), "head"),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_classifier_is_found_by_what_it_does(name):
    head, after, layer = HEADS[name]
    torch.manual_seed(0)
    model = Heads(head, after)
    sites = {site.layer: site for site in find_sites(model, torch.zeros(2, 3, 8, 8))}
    assert {k for k, site in sites.items() if site.skip == CLASSIFIER} == {layer}
    assert sites["body"].skip is None
    assert all(parameter.requires_grad for parameter in model.parameters())


class Several(nn.Module):
    """Heads beside each other, of one vector or of several."""

    def __init__(self, join, logits=3):
        super().__init__()
        self.body, self.hidden = nn.Linear(6, 8), nn.Linear(8, 8)
        self.heads = nn.ModuleList([nn.Linear(8, logits) for _ in range(2)])
        self.join = join

    def forward(self, x):
        x = torch.tanh(self.hidden(torch.tanh(self.body(x))))
        return self.join([head(x) for head in self.heads])


@pytest.mark.parametrize("join", [
    lambda heads: torch.cat(heads, 1), torch.stack, lambda heads: heads[0] + 2 * heads[1],
    lambda heads: torch.stack(heads, -1), lambda heads: torch.cat(heads, 1).log_softmax(1),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_of_several_heads_is_a_classifier_in_any_precision(join, dtype):
    torch.manual_seed(0)
    batch_first = join if join is not torch.stack else lambda heads: torch.stack(heads, 1)
    model = Several(batch_first).to(dtype)
    sites = find_sites(model, torch.randn(2, 6))
    assert {site.layer for site in sites if site.skip == CLASSIFIER} == {"heads.0", "heads.1"}
    assert [site.layer for site in sites if site.skip is None] == ["hidden"]
    assert next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("softmax", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1)])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_two_neurons_right_before_two_logits_are_no_classifier(softmax, activation):
    for seed in range(5):
        torch.manual_seed(seed)
        first, hidden, last = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(2, 2)
        model = nn.Sequential(first, nn.Tanh(), hidden, activation, last, softmax)
        sites = find_sites(model, torch.randn(4, 6))
        assert [site.layer for site in sites if site.skip == CLASSIFIER] == ["4"]


@pytest.mark.parametrize("weights", [(1.0, 3.0), (3.0, 1.0)])
@pytest.mark.parametrize("one", [0, 1])
def test_a_head_that_weighs_two_logits_unlike_is_a_classifier(weights, one):
    torch.manual_seed(0)
    unlike = torch.tensor(weights)
    model = Several(lambda heads: (heads[one] * 2 + heads[1 - one] * unlike).softmax(1), logits=2)
    sites = find_sites(model, torch.randn(2, 6))
    assert {site.layer for site in sites if site.skip == CLASSIFIER} == {"heads.0", "heads.1"}


def test_a_layer_as_wide_as_the_logits_is_no_classifier():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(4, 4))
    sites = find_sites(model, torch.zeros(2, 6))
    assert [site.skip for site in sites] == ["first layer", None, None, CLASSIFIER]


class Tied(nn.Module):
    """A language model, whose classifier has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


def test_a_weight_that_two_modules_share_is_one_layer_where_it_is_called():
    sites = find_sites(Tied(), torch.arange(8).view(2, 4))
    assert [(site.layer, site.skip) for site in sites] == [("body", None), ("head", CLASSIFIER)]


def test_a_model_whose_parts_share_a_module_stays_as_it_was():
    shared = nn.Conv2d(8, 8, 1)
    parts = [nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Conv2d(8, 8, 1))]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *parts, head)
    before = dict(model.named_parameters())
    nemo.decompose(model, {"2.1": torch.arange(8) > 3}, example=torch.zeros(2, 3, 4, 4))
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_heads_of_models():
    assert head_names(build_model("deit_small", 4, 16), 4) == ["head", "head_dist"]
    assert head_names(build_model("simcnn", 4, 16), 4) == ["classifier.6"]
    assert head_names(build_model("timm/dla46_c", 4, 32), 4) == ["fc"]


class Clashing(nn.Module):
    """Layers whose names cannot be, or share, keys of a ModuleDict; each has a width of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Sequential(nn.Conv2d(8, 10, 1), nn.ReLU())
        self.conv_0, self.conv_0_ = nn.Conv2d(10, 12, 1), nn.Conv2d(12, 9, 1)
        self.keys, self.values, self.items = nn.Linear(9, 5), nn.Linear(5, 6), nn.Linear(6, 7)
        self.training_ = nn.Linear(7, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv_0_(self.conv_0(self.conv(self.stem(x)))).flatten(2).mT
        return self.fc(self.training_(self.items(self.values(self.keys(x)))).mean(1))


def test_names_that_clash_have_generators_of_their_own():
    modular = nemo.modularize(Clashing(), torch.zeros(2, 3, 4, 4))
    keys = {"conv.0": "conv_0", "conv_0": "conv_0_", "conv_0_": "conv_0__", "keys": "keys_",
            "values": "values_", "items": "items_", "training_": "training_"}  # fmt: skip
    assert list(modular.layers) == list(keys)
    assert list(modular.generators) == list(keys.values())
    _, masks = modular(torch.randn(3, 3, 4, 4))
    assert {layer: mask.shape[1] for layer, mask in masks.items()} == modular.layers
    for layer, key in keys.items():
        assert modular.generators[key].excite.out_features == modular.layers[layer]
    of_the_next = modular.generators["conv_0_"].excite.bias
    assert torch.autograd.grad(masks["conv.0"].sum(), of_the_next, allow_unused=True) == (None,)

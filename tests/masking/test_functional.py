"""Layers that are called as functions are masked: F.linear on a weight, attention's q, k and v.

The oracle is attention by hand, in float64, with the masks multiplied in.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo


class Attending(nn.Module):
    """nn.MultiheadAttention on 2 x 2 patches, in every way that it can be called."""

    def __init__(self, batch_first=False, cross=False, widths=None, weights=True, bias=True):
        super().__init__()
        self.cross, self.first, self.weights = cross, batch_first, weights
        kdim, vdim = widths or (8, 8)
        self.stem = nn.Conv2d(3, 8, 2, 2)
        if cross:
            self.keys, self.values = nn.Linear(8, kdim), nn.Linear(8, vdim)
        self.attn = nn.MultiheadAttention(
            8, 2, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute((0, 2, 1) if self.first else (2, 0, 1))
        k, v = (self.keys(x), self.values(x)) if self.cross else (x, x)
        y = self.attn(x, k, v, need_weights=self.weights)[0]
        return self.head((x + y).mean(1 if self.first else 0))

    def by_hand(self, images, mask):
        """Logits; `mask(layer, pooled)` gives (B or 1, N) for a layer's mean input (B, C)."""

        def linear(layer, x, weight, bias):
            return F.linear(x, weight, bias) * mask(layer, x.mean(1))[:, None]

        def heads(x):
            return x.unflatten(2, (2, 4)).transpose(1, 2)  # (B, 2, T, 4)

        x = self.stem(images).flatten(2).mT  # (B, T, C)
        k, v = x, x
        if self.cross:
            k = linear("keys", x, self.keys.weight, self.keys.bias)
            v = linear("values", x, self.values.weight, self.values.bias)
        a = self.attn
        packed = a.in_proj_weight
        w = (
            [a.q_proj_weight, a.k_proj_weight, a.v_proj_weight]
            if packed is None
            else packed.chunk(3)
        )
        b = [None] * 3 if a.in_proj_bias is None else a.in_proj_bias.chunk(3)
        q = heads(linear("attn.q", x, w[0], b[0]))
        k = heads(linear("attn.k", k, w[1], b[1]))
        v = heads(linear("attn.v", v, w[2], b[2]))
        y = (q @ k.mT / 2).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2)
        y = linear("attn.out_proj", y, a.out_proj.weight, a.out_proj.bias)
        return self.head((x + y).mean(1))


class Fused(nn.Module):
    """As in torchvision's Swin: F.linear with the weights of Linears that are never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias)
        return self.head(F.linear(x, self.scale).relu().mean(1))

    def by_hand(self, images, mask):
        def linear(layer, x, weight, bias=None):
            return F.linear(x, weight, bias) * mask(layer, x.mean(1))[:, None]

        x = self.stem(images).flatten(2).mT
        w, b = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        q, k, v = (linear(layer, x, *p) for layer, *p in zip("qkv", w, b, strict=True))
        y = (q @ k.mT / 8**0.5).softmax(-1) @ v
        x = x + linear("proj", y, self.proj.weight, self.proj.bias)
        return self.head(linear("scale", x, self.scale).relu().mean(1))


QKVO = [f"attn.{part}" for part in ("q", "k", "v", "out_proj")]
CROSS = ["keys", "values", *QKVO]
NETWORKS = {
    "tokens first": (lambda: Attending(), QKVO),
    "batch first, no weights": (lambda: Attending(True, weights=False, bias=False), QKVO),
    "keys and values of their own": (lambda: Attending(True, cross=True), CROSS),
    "other widths": (lambda: Attending(cross=True, widths=(6, 10)), CROSS),
    "functions": (Fused, ["q", "k", "v", "proj", "scale"]),
}


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    make, layers = NETWORKS[request.param]
    torch.manual_seed(0)
    modular = nemo.modularize(make().double(), torch.zeros(2, 3, 4, 4).double()).eval()
    for parameter in modular.parameters():
        parameter.data.normal_()
    assert list(modular.layers) == layers
    return modular


@pytest.mark.parametrize("train", [False, True])
def test_masks_act_on_each_projection(case, train):
    case.train(train)  # in eval mode without gradients, attention has a fast path
    images, labels = torch.randn(3, 3, 4, 4).double(), torch.tensor([0, 0, 1])
    expected = {}

    def mask(layer, pooled):
        key = layer.replace(".", "_")
        expected[layer] = case.generators[key + "_" * (key in ("keys", "values"))](pooled)
        return expected[layer]

    with torch.set_grad_enabled(train):
        logits, masks = case(images)
        by_hand = case.model.by_hand(images, mask)
    torch.testing.assert_close(logits, by_hand)
    torch.testing.assert_close(masks, expected)
    if train:
        gradients = []
        for y, m in ((logits, masks), (by_hand, expected)):
            loss = F.cross_entropy(y, labels) + nemo.contrastive_loss(m, labels, tau=0.2)
            gradients.append(torch.autograd.grad(loss, list(case.parameters())))
        for ours, literal in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, literal)


def test_constant_masks_and_the_module_are_the_same_network(case):
    generator = torch.Generator().manual_seed(2)
    masks = {layer: torch.rand(n, generator=generator) < 0.6 for layer, n in case.layers.items()}
    images = torch.randn(5, 3, 4, 4, generator=generator).double()
    with torch.no_grad():
        expected = case.model.by_hand(images, lambda layer, _: masks[layer][None].double())
        torch.testing.assert_close(case.under(masks)(images), expected)
        module = nemo.decompose(case, masks)
        assert module.certificate["error"] < 1e-9
        assert not module.certificate["vacuous"]
        torch.testing.assert_close(module(images), expected)
    assert module.report["parameters"] < module.report["parent_parameters"]


def test_a_model_under_masks_can_be_exported(case):
    masks = {layer: torch.arange(n) % 3 > 0 for layer, n in case.layers.items()}
    under = case.under(masks).eval()
    images = torch.randn(2, 3, 4, 4).double()
    with torch.no_grad():
        program = torch.export.export(
            under, (images,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),), strict=False
        )
        images = torch.randn(5, 3, 4, 4).double()
        torch.testing.assert_close(program.module()(images), under(images))


def test_the_fast_path_of_transformer_layers_is_not_taken_past_the_masks():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 4)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))

    torch.manual_seed(0)
    modular = nemo.modularize(Encoder().double(), torch.zeros(2, 3, 4, 4).double()).eval()
    images = torch.randn(3, 3, 4, 4).double()
    masks = {layer: torch.zeros(n) for layer, n in modular.layers.items()}
    assert "encoder.layers.1.self_attn.v" in masks
    one = "encoder.layers.1.self_attn.out_proj"
    for given in (masks, {one: masks[one]}):  # attention's last layer is silent either way
        under = modular.under(given)
        with_gradients = under(images)
        with torch.no_grad():
            torch.testing.assert_close(under(images), with_gradients)
    with torch.no_grad():
        model, layers = modular.model, modular.model.encoder.layers
        x = layers[0](model.stem(images).flatten(2).mT)
        x = layers[1].norm2(layers[1].norm1(x))  # nothing is added to x
        torch.testing.assert_close(modular.under(masks)(images), model.head(x.mean(1)))


def test_torchvisions_vit_gets_as_small_as_timms_of_the_same_shape():
    import timm
    import torchvision

    shape = {"num_classes": 4, "num_heads": 2}
    torch.manual_seed(0)
    theirs = timm.models.VisionTransformer(32, 8, embed_dim=32, depth=2, mlp_ratio=2, **shape)
    model = torchvision.models.VisionTransformer(
        32, 8, num_layers=2, hidden_dim=32, mlp_dim=64, **shape
    )
    for parameter in (model.heads.head.weight, model.class_token):  # they start at zero
        parameter.data.normal_()
    names = {"attn.q": "self_attention.q", "attn.k": "self_attention.k",
             "attn.v": "self_attention.v", "attn.proj": "self_attention.out_proj",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}  # fmt: skip
    masks, same = {}, {}
    for block in range(2):
        for name, other in names.items():
            mask = torch.rand(64 if name == "mlp.fc1" else 32) < 0.3
            masks[f"blocks.{block}.{name}"] = mask
            same[f"encoder.layers.encoder_layer_{block}.{other}"] = mask
    images = torch.zeros(2, 3, 32, 32)
    expected = nemo.decompose(theirs, masks, example=images).report
    module = nemo.decompose(model, same, example=images)
    assert module.report["parameters"] == expected["parameters"]
    assert module.report["parent_parameters"] == expected["parent_parameters"]
    rows, others = module.report["rows_left"], expected["rows_left"]
    for block in range(2):
        for name, other in names.items():
            ours = rows[f"encoder.layers.encoder_layer_{block}.{other}"]
            assert ours == others[f"blocks.{block}.{name}"]

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo
from nemo.masking.generators import MaskGenerator
from nemo.masking.sites import find_sites
from nemo.models import MODELS, build_model
from tests.test_models import SMALL


def small(name):
    torch.manual_seed(0)
    return build_model(name, 4, 16, SMALL[name])


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_an_ordinary_one(name):
    model = small(name).eval()
    images = torch.randn(3, 3, 16, 16)
    before, keys = model(images), list(model.state_dict())
    modular = nemo.modularize(model)
    logits, masks = modular.eval()(images)
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys
    assert modular.model is model
    small(name).load_state_dict(modular.model.state_dict())
    assert logits.shape == (3, 4)
    assert {layer: mask.shape for layer, mask in masks.items()} == {
        layer: (3, neurons) for layer, neurons in modular.layers.items()
    }
    assert all((mask >= 0).all() and (mask < 1).all() for mask in masks.values())
    everything = {site.layer for site in find_sites(model)}
    assert everything == set(modular.layers) | set(modular.skipped)


def test_generator_is_the_papers_formula_and_sizes():
    generator = MaskGenerator.for_layer(nn.Conv2d(16, 128, 3), 128)
    assert generator.squeeze.weight.shape == (64, 16)  # 128 // 2
    assert generator.squeeze.bias is None
    narrow = MaskGenerator.for_layer(nn.Conv2d(16, 127, 3), 127)
    assert narrow.squeeze.weight.shape == (127, 16)
    linear = MaskGenerator.for_layer(nn.Linear(16, 3073), 3073)
    assert linear.squeeze.weight.shape == (1536, 16)
    assert linear.squeeze.bias.eq(1).all()
    assert linear.excite.bias.eq(1).all()
    pooled = torch.randn(2, 16)
    hidden = (pooled @ generator.squeeze.weight.T).clamp(min=0)
    value = torch.tanh(hidden @ generator.excite.weight.T + generator.excite.bias).clamp(min=0)
    torch.testing.assert_close(generator(pooled), value)


class Tiny(nn.Module):
    """conv, conv-BN-ReLU, then a residual, in three lines to recompute by hand."""

    input_size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.spare = nn.Linear(2, 2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.bn(self.conv(x))
        return self.fc(x.mean((2, 3)))


def test_the_mask_acts_after_batchnorm_and_leaves_the_skip_path_alone():
    torch.manual_seed(0)
    model = Tiny().eval()
    model.bn.bias.data.normal_()
    modular = nemo.modularize(model).eval()
    images = torch.randn(2, 3, 8, 8)
    logits, masks = modular(images)
    x = model.stem(images)
    mask = modular.generators["conv"](x.mean((2, 3)))
    torch.testing.assert_close(masks["conv"], mask)
    expected = model.fc((x + mask[:, :, None, None] * model.bn(model.conv(x))).mean((2, 3)))
    torch.testing.assert_close(logits, expected)
    assert modular.skipped == {
        "stem": "first convolution or patch embedding",
        "fc": "classifier: its outputs are the logits",
        "spare": "not called as a module in forward",
    }


def test_a_fused_projection_is_masked_as_q_k_and_v():
    model = small("vit_small").eval()
    modular = nemo.modularize(model).eval()
    tokens = {}
    model.blocks[1].attn.qkv.register_forward_hook(lambda m, a, y: tokens.update(x=a[0], y=y))
    seen = {}
    images = torch.randn(2, 3, 16, 16)
    # the second hook runs after the mask's, which is registered for the time of the call only
    with modular._attached(2) as masks:
        model.blocks[1].attn.qkv.register_forward_hook(lambda m, a, y: seen.update(y=y))
        model(images)
    parts = [masks[f"blocks.1.attn.{p}"] for p in "qkv"]
    pooled = tokens["x"].mean(1)  # over tokens, CLS included
    torch.testing.assert_close(parts[1], modular.generators["blocks_1_attn_k"](pooled))
    torch.testing.assert_close(seen["y"], tokens["y"] * torch.cat(parts, 1)[:, None])
    assert "blocks.0.attn.q" in modular.skipped


def test_masks_carry_gradients_in_double_precision():
    torch.manual_seed(0)
    modular = nemo.modularize(Tiny()).double()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)

    def loss(*_):
        logits, masks = modular(images)
        return F.cross_entropy(logits, torch.tensor([0, 0, 1, 1])) + masks["conv"].square().sum()

    weights = [p for n, p in modular.named_parameters() if not n.startswith("model.spare")]
    assert torch.autograd.gradcheck(loss, weights, atol=1e-6)


class Overwriting(nn.Module):
    """Layers whose output the next operation writes over, in eval mode or in training only."""

    input_size = (3, 8, 8)

    def __init__(self, after):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.after = after
        self.last = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.after(self.bn(self.conv(self.stem(x))))
        return self.fc(self.after(self.last(x)).mean((2, 3)))


class TrainingOnly(nn.Module):
    """A functional dropout in place: invisible in eval mode."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training, inplace=True)


def same_gradients_without_overwriting(modular):
    twin = copy.deepcopy(modular)
    twin.overwritable = frozenset()
    images = torch.randn(5, 3, 8, 8)
    for one in (modular, twin):
        torch.manual_seed(1)
        one(images)[0].square().sum().backward()
    for ours, literal in zip(modular.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, literal.grad)


@pytest.mark.parametrize(
    ("after", "in_place"),
    [
        (nn.ReLU(), True),
        (nn.ReLU(inplace=True), False),
        (nn.SiLU(inplace=True), False),
        (nn.Dropout(0.5, inplace=True), False),
        (TrainingOnly(), False),
    ],
    ids=str,
)
def test_an_output_that_is_written_over_later_keeps_its_gradient(after, in_place):
    torch.manual_seed(0)
    modular = nemo.modularize(Overwriting(after))
    assert modular.overwritable == ({"bn", "last"} if in_place else set())
    same_gradients_without_overwriting(modular)


class TanhConv(nn.Conv2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


def test_a_layer_that_reads_its_own_output_keeps_its_gradient():
    torch.manual_seed(0)
    model = Overwriting(nn.ReLU())
    model.last = TanhConv(4, 4, 1)
    modular = nemo.modularize(model)
    assert modular.overwritable == {"bn"}
    same_gradients_without_overwriting(modular)


def test_hooks_see_values_that_stay_as_they_were():
    torch.manual_seed(0)
    modular = nemo.modularize(Overwriting(nn.ReLU()))
    assert modular.overwritable == {"bn", "last"}
    kept, copies = [], []

    def keep(tensor):
        kept.append(tensor)
        copies.append(tensor.clone())

    modular.model.last.register_forward_hook(lambda m, a, y: keep(y))
    modular.model.last.register_full_backward_hook(lambda m, before, after: keep(before[0]))
    modular(torch.randn(5, 3, 8, 8))[0].square().sum().backward()
    assert len(kept) == 2
    for tensor, copied in zip(kept, copies, strict=True):
        torch.testing.assert_close(tensor, copied)


def test_inference_mode_does_not_matter_to_what_is_masked():
    model = Overwriting(nn.ReLU())
    with torch.inference_mode():
        modular = nemo.modularize(model)
        assert modular(torch.randn(2, 3, 8, 8))[0].shape == (2, 2)


def test_a_copy_is_independent():
    modular = nemo.modularize(Tiny()).eval()
    twin = copy.deepcopy(modular)
    images = torch.randn(2, 3, 8, 8)
    before = modular(images)[0]
    for weights in twin.parameters():
        weights.data.zero_()
    torch.testing.assert_close(modular(images)[0], before)
    assert twin(images)[0].abs().max() == 0


def test_timm_batchnorm_with_its_own_activation_is_masked_before_it():
    torch.manual_seed(0)
    model = build_model("timm/mobilenetv2_035", 4, 32).eval()
    modular = nemo.modularize(model).eval()
    site = next(s for s in modular.sites if s.norm is not None)
    norm = model.get_submodule(site.norm)
    seen = {}
    with modular._attached(2) as masks:
        norm.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
        model(torch.randn(2, 3, 32, 32))
    plain = F.batch_norm(
        seen["x"], norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    torch.testing.assert_close(seen["y"], norm.act(plain * masks[site.layer][:, :, None, None]))


def test_a_model_without_maskable_layers_is_an_error():
    with pytest.raises(ValueError, match="no layer to mask"):
        nemo.modularize(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)))

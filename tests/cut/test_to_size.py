"""A trained model cut to a wanted size, against its own pass with outputs zeroed by hand."""

import pytest
import torch
from torch import nn

import nemo
from tests.oracles.masked import masked_logits

CLASSES = [2, 0]


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 24, 3), nn.BatchNorm2d(24),
        nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    net.train()(torch.randn(16, 3, 10, 10))  # statistics that differ from those it begins with
    return net.eval()


def loader():
    torch.manual_seed(1)
    return [(torch.randn(12, 3, 10, 10), torch.arange(12) % 4) for _ in range(2)]


@pytest.fixture(scope="module")
def modular():
    return nemo.modularize(network(), example=loader()[0][0])


@pytest.mark.parametrize("selector", ["taylor", "activation"])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_a_share_of_the_parameters_computes_what_the_masked_model_does(modular, selector, keep):
    module = nemo.shrink(modular, iter(loader()), CLASSES, keep=keep, selector=selector)
    share = sum(p.numel() for p in module.parameters()) / sum(
        p.numel() for p in modular.model.parameters()
    )
    assert keep - 0.05 <= share <= keep
    made = module.info["settings"]
    assert made["masks.selector"] == selector
    masks = nemo.class_masks(modular, loader(), selector=selector, keep=made["masks.keep"])
    chosen = masks.select(CLASSES)
    images = torch.randn(5, 3, 10, 10)
    expected = masked_logits(modular.model, chosen, images)[:, CLASSES]
    torch.testing.assert_close(module.double()(images.double()), expected)


def test_a_larger_one_would_be_too_large(modular):
    """The next neuron of the widest layer already is too much, or the share is near enough."""
    module = nemo.shrink(modular, loader(), CLASSES, keep=0.4)
    masks = nemo.class_masks(
        modular, loader(), selector="taylor", keep=module.info["settings"]["masks.keep"] + 1 / 32
    )
    larger = nemo.decompose(modular, masks.select(CLASSES)).report
    size = module.report["parameters"] / module.report["parent_parameters"]
    assert size >= 0.98 * 0.4 or larger["parameters"] > 0.4 * larger["parent_parameters"]


def test_a_share_of_the_flops(modular):
    module = nemo.shrink(modular, loader(), CLASSES, keep=0.5, of="flops")
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in (module, modular.model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, 10, 10))
        counts.append(counter.get_total_flops())
    assert 0.45 <= counts[0] / counts[1] <= 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep": 0.01},
            r"^keep: 0.01 of the parameters, and one neuron .* already has 0\.\d{3}; ",
        ),
        ({"keep": 1}, "^keep: 1; accepted: a share of the parameters, above 0 and below 1$"),
        ({"keep": 0.5, "of": "bytes"}, "^of: 'bytes'; accepted: parameters, flops$"),
        (
            {"keep": "0.3"},
            "^keep: '0.3'; accepted: a share of the parameters, above 0 and below 1$",
        ),
        ({"keep": 0.5, "selector": "frequency"}, "^selector: 'frequency' has no setting keep; acc"),
        ({"keep": 0.5, "selector": "tailor"}, "tailor"),
    ],
)
def test_mistakes_are_one_line(modular, settings, message):
    with pytest.raises(ValueError, match=message):
        nemo.shrink(modular, loader(), CLASSES, **settings)

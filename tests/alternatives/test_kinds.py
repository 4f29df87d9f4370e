import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from nemo.alternatives import ALTERNATIVES
from nemo.alternatives import context as module
from nemo.alternatives.context import Context
from nemo.cells import Cell, Layout
from nemo.config import check_params
from nemo.cost import count_parameters
from nemo.data import parse_subset
from nemo.fingerprint import code_behind
from nemo.masking.constant import mean_scales, scaled
from nemo.models import DeitShape, TimmShape, build_model
from nemo.recipe import measuring
from nemo.trained import load_cell
from tests.small import SUBSET, raw_params

PRUNED = ["pruned", "pruned-global", "taylor", "tuned-pruned"]
KINDS = ["random", *PRUNED, "dense", "mean-masks", "standard-tuned"]


def context_of(cell):
    params, nemo, data, layout = cell
    return Context(params, nemo, SUBSET, data, layout)


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made(kind, context):
    torch.manual_seed(0)
    return ALTERNATIVES.named(kind).make(context).eval()


def test_the_package_has_these_and_their_names_cost_no_torch():
    assert list(ALTERNATIVES) == KINDS
    code = "import sys, nemo.alternatives; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", [k for k in KINDS if ALTERNATIVES[k].budget])
def test_one_of_the_modules_size_is_no_larger_and_not_half_as_large(cell, kind):
    if kind in PRUNED:
        pytest.importorskip("torch_pruning")
    context = context_of(cell)
    model = made(kind, context)
    assert 0.5 * context.budget() < count_parameters(model) <= context.budget()
    with torch.no_grad():
        assert model(images()).shape == (4, 2)


def test_random_has_the_modules_shapes_and_other_weights(cell):
    context = context_of(cell)
    cut, random = context.module().state_dict(), made("random", context).state_dict()
    assert {k: v.shape for k, v in cut.items()} == {k: v.shape for k, v in random.items()}
    drawn = {k for k in cut if k.endswith("weight") and cut[k].ndim > 1}
    assert drawn
    assert not any(torch.equal(cut[k], random[k]) for k in drawn)


def test_standard_tuned_is_the_standard_model_on_the_subset(cell):
    _, nemo, data, layout = cell
    whole = load_cell(layout.train(Cell("digits", nemo.model, "standard", 0)))
    tuned = made("standard-tuned", context_of(cell))
    assert all(p.requires_grad for p in tuned.parameters())
    expected = whole(images())[:, parse_subset(SUBSET, data.classes)]
    torch.testing.assert_close(tuned(images()), expected)


def test_mean_masks_is_the_module_with_scaled_neurons(resnet):
    context = context_of(resnet)
    modular, cut = context.modular(), context.module()
    scales = mean_scales(modular, context.data.restrict(context.classes()))
    found = made("mean-masks", context)
    assert count_parameters(found) == count_parameters(cut)
    for layer, report in cut.report["layers"].items():
        assert found.report["layers"][layer]["kept"] == report["kept"]
    stored = load_file(context.layout.masks(context.cell) / "masks.safetensors")
    masks = {}
    for name, count in modular.layers.items():  # eight neurons to a byte
        union = np.bitwise_or.reduce(stored[name][context.classes()].numpy())
        bits = "".join(f"{byte:08b}" for byte in union)[:count]
        masks[name] = torch.tensor([float(bit) for bit in bits])
    whole = scaled(modular, {name: mask * scales[name] for name, mask in masks.items()})
    expected = whole(images())[:, context.classes()]
    torch.testing.assert_close(found(images()), expected, atol=1e-4, rtol=1e-4)


def test_a_distilled_model_loses_the_rows_of_both_heads(monkeypatch):
    torch.manual_seed(0)
    whole = build_model("deit_small", 5, 16, DeitShape(dim=16, depth=2, heads=2)).eval()
    with torch.no_grad():
        for head in (whole.head, whole.head_dist):  # zeros when they are new
            torch.nn.init.normal_(head.weight)
    expected = whole(images())[:, [4, 2]]
    monkeypatch.setattr(module, "load_cell", lambda folder: whole)
    data = type("Data", (), {"classes": tuple("abcde")})()
    params = type("Params", (), {"text_of": lambda self, subset: subset})()
    context = Context(params, Cell("d", "deit_small", "nemo", 0), "e+c", data, Layout())
    torch.testing.assert_close(context.standard()(images()), expected)


def test_a_classifier_that_is_a_convolution_is_one_clear_line(monkeypatch):
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1)
    whole = nn.Sequential(*layers, nn.Flatten())
    monkeypatch.setattr(module, "load_cell", lambda folder: whole)
    data = type("Data", (), {"classes": tuple("abcde")})()
    params = type("Params", (), {"text_of": lambda self, subset: subset})()
    context = Context(params, Cell("d", "squeezenet", "nemo", 0), "e+c", data, Layout())
    line = "^squeezenet: alternatives need a Linear classifier, and 2 is a Conv2d$"
    with pytest.raises(ValueError, match=line):
        context.standard()


class Cosine(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return F.linear(F.normalize(self.body(x)), F.normalize(self.weight))


@pytest.mark.parametrize("kind", [*PRUNED, "standard-tuned"])
def test_a_classifier_that_is_not_found_is_one_clear_line(monkeypatch, kind):
    if kind in PRUNED:
        pytest.importorskip("torch_pruning")
    whole = Cosine()
    whole(torch.zeros(2, 3, 32, 32))
    monkeypatch.setattr(module, "load_cell", lambda folder: whole)
    params = check_params(raw_params("resnet18"))
    data = type("Data", (), {"classes": tuple("abcde"), "size": (32, 32)})()
    data.restrict = lambda classes: data
    context = Context(
        params, Cell("d", "mine", "nemo", 0), "e+c", data, Layout(), section="budgets"
    )
    with pytest.raises(ValueError, match=r"^budgets.kinds: the classifier of mine was not found; "):
        made(kind, context)


@pytest.mark.parametrize("kind", PRUNED)
def test_pruned_says_what_is_missing(resnet, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(Context, "standard", lambda self: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=rf"^alternatives.kinds: {kind} needs torch-pruning: pip"):
        made(kind, context_of(resnet))


def test_a_model_that_cannot_be_narrower_has_no_dense_one(resnet, monkeypatch):
    params = resnet[0]
    monkeypatch.setattr(type(params.architecture), "of", lambda self, model: TimmShape())
    with pytest.raises(ValueError, match=r"^alternatives.kinds: dense needs a model with a width"):
        made("dense", context_of(resnet))


def test_a_module_too_small_for_any_is_an_error(resnet, monkeypatch):
    monkeypatch.setattr(Context, "budget", lambda self: 10)
    with pytest.raises(ValueError, match="no smaller resnet18 has at most the 10 parameters"):
        made("dense", context_of(resnet))


def test_an_unknown_kind_is_one_clear_line():
    asked = raw_params("resnet18", alternatives={"of": ["nemo"], "kinds": ["dance"]})
    with pytest.raises(ValueError, match=r"alternatives.kinds: unknown alternative 'dance'; acc"):
        check_params(asked)


def test_code_of_a_kind_counts_where_it_is_named_and_the_rest_always():
    always = code_behind(["nemo.alternatives.compare"])
    assert {"nemo.alternatives.context", "nemo.training.finetune", "nemo.data.batches"} <= always
    assert not any(name.startswith("nemo.alternatives.kinds.") for name in always)
    named = {}
    for kinds in (["dense"], ["dense", "random"]):
        asked = raw_params("resnet18", alternatives={"of": ["nemo"], "kinds": kinds})
        cell = Cell("digits", "resnet18", "nemo", 0)
        named[len(kinds)] = measuring(check_params(asked), cell, "alternatives")
    assert named[1]["code"] != named[2]["code"]

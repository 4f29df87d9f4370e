"""What a GPU must give as the CPU does; skipped where there is none, CI included."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import nemo
from nemo.cells import Cell, Layout
from nemo.config import check_params
from nemo.data import Batches, load
from nemo.evaluation.modular import load_class_masks
from nemo.fields import ParamsError
from nemo.masking.losses import contrastive_loss, mwt_terms
from nemo.masking.observed import class_masks
from nemo.models import build_model
from nemo.pipeline import decompose, finetune, masks, prepare
from nemo.predict import predict
from nemo.trained import load_cell, weights_sha256
from nemo.training.cell import train_cell
from nemo.training.fit import Plan, fit
from nemo.training.tasks import Task, cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[1]
SHAPES = {
    "resnet18": {"width": 0.25},
    "vgg16": {"width": 0.25},
    "vit_small": {"dim": 24, "depth": 3, "heads": 2, "patch": 4},
    "deit_small": {"dim": 24, "depth": 3, "heads": 2, "patch": 4, "teacher": {"width": 0.25}},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder that holds data/digits."""
    root = tmp_path_factory.mktemp("prepared")
    prepare.run(params("cuda"), "digits", Layout(root))
    return root


@pytest.fixture
def data(prepared):
    return load(Layout(prepared).data("digits"))


@pytest.fixture
def layout(tmp_path, prepared):
    return Layout(tmp_path, images=prepared)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # checkpoints are below the working directory


def params(device, amp=False, cuda_graphs=False):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw |= {"device": device, "models": list(SHAPES), "architecture": SHAPES}
    raw["train"] |= {"epochs": 2, "amp": amp, "cuda_graphs": cuda_graphs}
    raw["finetune"] |= {"epochs": 2, "cuda_graphs": cuda_graphs}
    raw["masks"]["threshold"] = 0.5
    return check_params(raw)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("method", ["standard", "mwt", "nemo"])
def test_a_cell_goes_from_training_to_a_fine_tuned_module(
    data, layout, monkeypatch, model, method, amp
):
    cell, chosen = Cell("digits", model, method, 0), params("cuda", amp)
    rows = []
    train_cell(chosen, cell, data, layout.train(cell), lambda epoch, row: rows.append(row))
    assert rows[-1]["loss"] < rows[0]["loss"]
    if method == "standard":
        return
    masks.run(chosen, cell, layout)
    trained, sha = load_cell(layout.train(cell)), weights_sha256(layout.train(cell))
    there = load_class_masks(layout.masks(cell), trained.layers, sha)
    here = class_masks(
        trained, Batches(data.splits["train"], data.mean, data.std, 256), threshold=0.5
    )
    bits = [torch.cat([m.flatten() for m in found.values()]) for found in (there, here)]
    assert (bits[0] != bits[1]).float().mean() < 0.01  # a mask that is 0 but for rounding
    decompose.run(chosen, cell, "0+1", layout)
    finetune.run(chosen, cell, "0+1", layout)
    module = nemo.load(layout.finetuned(cell, "0+1"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    test = data.restrict([0, 1]).splits["test"]
    logits = [
        predict(module.to(device), Batches(test, data.mean, data.std, 256, device=device))[0]
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", SHAPES)
def test_the_same_training_twice_gives_the_same_weights(data, tmp_path, model):
    for name in ("one", "other"):
        train_cell(params("cuda"), Cell("digits", model, "nemo", 0), data, tmp_path / name)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def replays(monkeypatch):
    """Grows with every replay of a CUDA graph."""
    seen, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda graph: (seen.append(graph), replay(graph))
    )
    return seen


def test_a_recorded_fine_tuning_gives_the_same_module(data, layout, replays):
    cell, chosen = Cell("digits", "resnet18", "nemo", 0), params("cuda")
    train_cell(chosen, cell, data, layout.train(cell))
    masks.run(chosen, cell, layout)
    decompose.run(chosen, cell, "0-4", layout)
    tuned = []
    for graphs in (False, False, True):
        finetune.run(params("cuda", cuda_graphs=graphs), cell, "0-4", layout)
        tuned.append(nemo.load(layout.finetuned(cell, "0-4")).state_dict())
        assert bool(replays) == graphs
    for other in tuned[1:]:
        assert all(torch.equal(tuned[0][key], other[key]) for key in other)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("method", ["standard", "mwt", "nemo"])
def test_a_recorded_step_trains_the_same_weights(data, tmp_path, replays, model, method, amp):
    rows = []
    for name, graphs in (("one", False), ("other", True)):
        chosen, out = params("cuda", amp, graphs), tmp_path / name
        cell = Cell("digits", model, method, 0)
        train_cell(chosen, cell, data, out, lambda epoch, row: rows.append(row))
        assert bool(replays) == graphs
    assert rows[:2] == rows[2:]
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_step_that_waits_for_the_gpu_cannot_be_recorded(data):
    class Waits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 16 * 16, 10)

        def forward(self, images):
            logits = self.layer(images.flatten(1))
            return logits / logits.abs().max().item()

    batches = Batches(data.splits["train"], data.mean, data.std, 64, shuffle=True, device="cuda")
    with pytest.raises(ParamsError, match="cuda_graphs: a training step of this model cannot be"):
        fit(
            Waits().cuda(),
            Task(cross_entropy),
            batches,
            Plan(1, "sgd", 0.1, 0.9, 0.0, 1),
            device=torch.device("cuda"),
            validate=dict,
            cuda_graphs=True,
        )


class KilledError(Exception):
    pass


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("model", ["resnet18", "vit_small"])
def test_a_resumed_training_ends_with_the_weights_of_an_undisturbed_one(
    data, tmp_path, model, graphs
):
    def kill(epoch, row):
        raise KilledError

    cell, chosen = Cell("digits", model, "nemo", 0), params("cuda", cuda_graphs=graphs)
    train_cell(chosen, cell, data, tmp_path / "one")
    with pytest.raises(KilledError):
        train_cell(chosen, cell, data, tmp_path / "other", kill)
    seen = []
    train_cell(chosen, cell, data, tmp_path / "other", lambda epoch, row: seen.append(epoch))
    assert seen == [2]
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "other"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("model", SHAPES)
def test_a_module_is_exact(model):
    shape = params("cuda").architecture.of(model)
    modular = nemo.modularize(build_model(model, 10, 32, shape)).double().cuda().eval()
    generator = torch.Generator().manual_seed(0)
    masks = {
        layer: (torch.rand(neurons, generator=generator) < 0.5).cuda()
        for layer, neurons in modular.layers.items()
    }
    images = torch.randn(4, 3, 32, 32, generator=generator).double()
    there = nemo.decompose(modular, masks)(images.cuda())
    here = nemo.decompose(modular.cpu(), {k: m.cpu() for k, m in masks.items()})(images)
    torch.testing.assert_close(there.cpu(), here, rtol=1e-9, atol=1e-9)


def test_gradients_through_masks_and_losses_are_those_of_the_cpu():
    modular = nemo.modularize(build_model("resnet18", 10, 32, params("cuda").architecture.resnet18))
    images, labels = torch.randn(8, 3, 32, 32).double(), torch.arange(8) % 4
    gradients = []
    for device in ("cpu", "cuda"):
        network = copy.deepcopy(modular).double().to(device)
        logits, masks = network(images.to(device))
        there = labels.to(device)
        terms = mwt_terms(masks, there)
        (logits.square().mean() + contrastive_loss(masks, there, 0.2) + sum(terms)).backward()
        gradients.append([p.grad.cpu() for p in network.parameters() if p.grad is not None])
    for here, there in zip(*gradients, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-9)


def test_a_cut_pass_follows_a_model_that_moves():
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4).cuda()
    modular = nemo.modularize(build_model("resnet18", 4, 32), images)
    cut_pass = nemo.CutPass(modular, 4)
    _, masks = modular.cuda()(images.cuda())
    cut_pass.observe(masks, labels)
    assert cut_pass.frequency.is_cuda


def test_a_module_on_the_gpu_is_saved_and_loaded(tmp_path):
    modular = nemo.modularize(build_model("resnet18", 10, 32, params("cuda").architecture.resnet18))
    masks = {
        layer: torch.arange(neurons, device="cuda") % 2 == 0
        for layer, neurons in modular.layers.items()
    }
    module = nemo.decompose(modular.cuda().eval(), masks)
    nemo.save(module, tmp_path / "module")
    images = torch.randn(2, 3, 32, 32)
    there = module(images.cuda()).cpu()
    torch.testing.assert_close(nemo.load(tmp_path / "module")(images), there, rtol=1e-3, atol=1e-3)

"""A model that plain PyTorch trained: from its file of weights to a module of the wanted size."""

import sys

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import nemo
from nemo.cli.main import cli
from nemo.data import load
from nemo.data.sources import load_source
from nemo.models import MODELS
from nemo.pipeline.existing import load_weights

MEAN, STD = 0.3, 0.37
SOURCE = """
from torch import nn

def net(width=16, classes=10):
    def block(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    layers = [*block(3, width), nn.MaxPool2d(2), *block(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * width, classes))

class Named(nn.Sequential):
    def forward(self, x):
        return {"logits": super().forward(x)}

def named():
    return Named(*net())

def broken():
    raise RuntimeError("no\\nway")

number = 3
"""
WHAT = ["--model", "digit_nets:net", "--data", "digits", "--mean", str(MEAN), "--std", str(STD)]


def run(*arguments):
    return CliRunner().invoke(cli, ["modularize", *arguments])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a file of the user's own, and the weights of a model of it."""
    root = tmp_path_factory.mktemp("existing")
    (root / "digit_nets.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        from digit_nets import net
    torch.manual_seed(0)
    images, labels = digits()
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(4):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    state = model.state_dict()
    torch.save({"epoch": 4, "state_dict": {f"module.{k}": v for k, v in state.items()}},
               root / "trained.pt")  # fmt: skip
    save_file(state, root / "trained.safetensors")
    torch.save(model, root / "whole.pt")
    torch.save({k: v for k, v in state.items() if k != "0.weight"}, root / "part.pt")
    turned = {k: v.flip(0) if k.startswith("13.") else v for k, v in state.items()}
    torch.save(turned, root / "turned.pt")  # its classes run from 9 to 0
    torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, root / "wrapped.pt")
    torch.save(state | {"13.bias": state["13.bias"] * torch.nan}, root / "endless.pt")
    counted = "1.num_batches_tracked"
    torch.save(state | {counted: torch.tensor(torch.nan)}, root / "uncounted.pt")
    torch.save(state | {counted: torch.tensor(2.7)}, root / "broken.pt")
    torch.save(state | {"13.bias": state["13.bias"].to_sparse()}, root / "sparse.pt")
    torch.save(state | {"13.bias": state["13.bias"] * 1j}, root / "complex.pt")
    (root / "text.pt").write_text("hello\n")
    (root / "table.pt").write_text("epoch,loss\n1,2.3\n")
    known = set(MODELS)
    yield root
    sys.path[:] = [place for place in sys.path if place != str(root)]
    del sys.modules["digit_nets"]
    for name in set(MODELS) - known:
        del MODELS[name]


@pytest.fixture
def inside(project, monkeypatch):
    monkeypatch.chdir(project)
    return project


def digits():
    raw = load_source("digits", None, None).splits["train"]
    assert len(raw.labels) == len(load_digits().target)
    images = (torch.from_numpy(raw.images).float() / 255 - MEAN) / STD
    return images, torch.from_numpy(raw.labels)


def test_a_trained_model_becomes_a_module_of_the_wanted_size(inside):
    command = [*WHAT, "--weights", "trained.pt", "--classes", "0+1", "--keep", "0.3"]
    result = run(*command, "--finetune-epochs", "2", "--out", "zero-one")
    assert result.exit_code == 0, result.output
    assert "training the parent" not in result.output
    module = nemo.load("zero-one")
    count = sum(p.numel() for p in module.parameters())
    whole = 3 * 16 * 9 + 16 * 32 * 9 + 32 * 64 * 9 + 64 * 10 + (16 + 32 + 64) * 3 + 10
    assert 0.25 * whole <= count <= 0.3 * whole
    assert module.certificate["error"] < 1e-9
    assert module.info["class_names"] == ["0", "1"]
    assert module.info["preprocessing"] == {"mean": [MEAN] * 3, "std": [STD] * 3, "size": [16, 16]}
    test = load("nemo-work/data/digits").splits["test"]
    with torch.no_grad():
        chosen = test.labels < 2
        images = (test.images[chosen].float() / 255 - MEAN) / STD
        right = (module(images).argmax(1) == test.labels[chosen]).double().mean().item()
    assert right >= 0.95
    assert module.info["test_accuracy"]["finetuned"] == pytest.approx(right, abs=1e-6)
    assert module.info["test_accuracy"]["all"] > 0.9
    kept = module.report["layers"]
    masked = kept["4"]["kept"] + kept["8"]["kept"]
    shown = CliRunner().invoke(cli, ["inspect", "zero-one"]).output
    assert f"{16 + masked + 10} of 122, of all layers; those that are not masked count" in shown


def test_what_is_measured_as_cut_has_batchnorm_estimated_anew(inside):
    from digit_nets import net

    command = [*WHAT, "--model", "digit_nets:named", "--weights", "trained.pt", "--keep", "0.3"]
    result = run(*command, "--classes", "3+5", "--finetune-epochs", "1", "--out", "named")
    assert result.exit_code == 0, result.output
    model = net()
    load_weights(model, inside / "trained.pt")
    data = load("nemo-work/data/digits").restrict([3, 5])
    pixels = {
        name: (split.images[:].float() / 255 - MEAN) / STD for name, split in data.splits.items()
    }
    modular = nemo.modularize(model.eval(), example=pixels["train"][:2])
    every = [((load("nemo-work/data/digits").splits["train"].images[:].float() / 255 - MEAN) / STD,
              load("nemo-work/data/digits").splits["train"].labels)]  # fmt: skip
    module = nemo.shrink(modular, every, [3, 5], keep=0.3)
    labels, reached = data.splits["test"].labels, []
    for _ in range(2):
        with torch.no_grad():
            logits = module.eval()(pixels["test"])
        reached.append((logits.argmax(1) == labels).double().mean().item())
        nemo.recalibrate_bn(module, [(pixels["train"], data.splits["train"].labels)])
    measured = nemo.load("named").info["test_accuracy"]
    assert measured["as_cut"] == pytest.approx(reached[1], abs=0.03)
    assert measured["one_class"] == pytest.approx(labels.bincount().max().item() / len(labels))
    assert f"the most frequent class alone: {measured['one_class']:.1%}" in result.output


def test_without_fine_tuning_the_module_is_the_cut(inside):
    command = [*WHAT, "--weights", "trained.pt", "--classes", "0+1", "--keep", "0.3"]
    result = run(*command, "--finetune-epochs", "0", "--out", "as-cut")
    assert result.exit_code == 0, result.output
    module, parent = nemo.load("as-cut"), load_file("trained.safetensors")
    assert "finetuned" not in module.info.keys() | module.info["test_accuracy"].keys()
    assert "fine-tuning" not in result.output
    # no weight was trained: each row of the classifier is part of the parent's
    kept = set(parent["13.weight"][:2].flatten().tolist())
    assert set(module.state_dict()["13.weight"].flatten().tolist()) < kept
    assert module.info["recalibrated_bn"] is True


def test_a_function_of_ones_own_can_be_trained_modularly(inside):
    command = ["--model", "digit_nets:net", "--shape", "width=8", "--data", "digits"]
    result = run(*command, "--epochs", "2", "--finetune-epochs", "1", "--out", "own")
    assert result.exit_code == 0, result.output
    assert "masked: 2 of 4 layers, 48 neurons" in result.output
    again = run(*command, "--epochs", "2", "--finetune-epochs", "1", "--out", "own-2")
    assert "already" in again.output
    (inside / "digit_nets.py").write_text(SOURCE + "# another\n")
    changed = run(*command, "--epochs", "2", "--finetune-epochs", "1", "--out", "own-3")
    (inside / "digit_nets.py").write_text(SOURCE)
    assert "training the parent" in changed.output


def test_the_same_weights_from_both_kinds_of_file(inside):
    from digit_nets import net

    models = [net(), net(), net()]
    for model, file in zip(
        models, ("trained.pt", "trained.safetensors", "wrapped.pt"), strict=True
    ):
        load_weights(model, inside / file)
    images, labels = digits()
    with torch.no_grad():
        first, *others = (model.eval()(images) for model in models)
    assert all(torch.equal(first, other) for other in others)
    assert (first.argmax(1) == labels).double().mean() > 0.9


LACKS = "part.pt: not the weights of this model: it lacks 1 tensors, such as 0.weight"
NONSENSE = "timm/resnet10t: arguments {'nonsense': 1}: ResNet.__init__() got an unexpected keyword"
WIDTH = "trained.pt: not the weights of this model: "


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--weights", "part.pt"], LACKS),
        (["--weights", "whole.pt"], "whole.pt: holds more than tensors, or is damaged; "),
        (["--weights", "turned.pt"], "is the order of its classes 0, 1, 2, 3, 4, ..., and are"),
        (["--weights", "endless.pt"], "endless.pt: 13.bias is not finite; accepted: finite weigh"),
        (["--weights", "uncounted.pt"], "uncounted.pt: 1.num_batches_tracked is not finite; acce"),
        (["--weights", "broken.pt"], "1.num_batches_tracked does not fit the model's int64; acc"),
        (["--weights", "sparse.pt"], "sparse.pt: 13.bias is sparse_coo, float32, on cpu; accepted"),
        (["--weights", "complex.pt"], "13.bias is strided, complex64, on cpu; accepted: dense"),
        (["--weights", "text.pt"], "text.pt: cannot be read ("),
        (["--weights", "table.pt"], "table.pt: cannot be read ("),
        (["--shape", "width=8"], WIDTH),
        (["--shape", "classes=7"], "13.bias is (10,), and the model's (7,)"),
        (["--shape", "depth=7"], "digit_nets:net: TypeError: net() got an unexpected keyword"),
        (["--model", "digit_nets:nothing"], "digit_nets:nothing: digit_nets has no function noth"),
        (["--model", "digit_nets:number"], "digit_nets:number: digit_nets has no function number"),
        (["--model", "digit_nets:broken"], "digit_nets:broken: RuntimeError: no way"),
        (["--model", "digit_nets.net"], "timm/NAME, package.module:function"),
        (
            ["--model", "builtins:dict"],
            "builtins:dict: it returns an object of type dict; accepted: an nn.Module",
        ),
        (["--model", "no.where:net"], "no.where:net: ModuleNotFoundError: No module named 'no'"),
        (["--model", "timm/resnet10t", "--shape", "nonsense=1"], NONSENSE),
        (["--keep", "0.01"], "--keep: 0.01 of the parameters, and one neuron a layer and class"),
    ],
)
def test_a_mistake_is_one_line(inside, changes, line):
    result = run(*WHAT, "--weights", "trained.pt", "--keep", "0.3", "--out", "m", *changes)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1
    assert line in result.stderr
    assert not (inside / "m").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--weights", "trained.pt"], "Missing option '--keep'"),
        (["--keep", "0.3"], "--keep: decides nothing without --weights"),
        (
            ["--weights", "trained.pt", "--keep", "0.3", "--epochs", "3"],
            "--epochs: decides nothing",
        ),
        (
            ["--weights", "trained.pt", "--keep", "0.3", "--cut-pass"],
            "--cut-pass: decides nothing with --weights",
        ),
        (["--weights", "trained.pt", "--keep", "nan"], "nan is not in the range 0<x<1"),
        (["--weights", "trained.pt", "--keep", "0.3", "--mean", "1,2"], "1,2: accepted: one or"),
        (["--weights", "trained.pt", "--keep", "0.3", "--std", "0"], "0: accepted: one or three"),
        (["--weights", "trained.pt", "--keep", "0.3", "--mean", "-.1"], "numbers from 0 to 1"),
        (["--weights", "trained.pt", "--keep", "0.3", "--mean", "0"], "--mean and --std go tog"),
        (["--weights", "trained.pt", "--keep", "0.3", "--std", "1"], "--mean and --std go tog"),
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(inside, options, line):
    result = run("--model", "digit_nets:net", "--data", "digits", "--out", "m", *options)
    assert result.exit_code == 2
    assert line in result.stderr

"""From a model, images and a class subset to a fine-tuned module, and how mistakes are told."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import nn

import nemo
from nemo.cli.main import cli
from nemo.cli.modularize import _show
from nemo.data import load
from nemo.masking.generators import modularize
from nemo.pipeline.modularize import defaults, own_params
from nemo.pipeline.rehearsal import coverage, layer_table, rehearse

ROOT = Path(__file__).parents[2]
TINY = ["--shape", "width=0.0625", "--epochs", "60", "--finetune-epochs", "1"]


def run(*arguments):
    return CliRunner().invoke(cli, ["modularize", *arguments])


def write_images(folder, classes, count=8, side=16):
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 60, (side, side, 3)) + 60 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of images, and the first module cut from a model trained on them."""
    root = tmp_path_factory.mktemp("own")
    write_images(root / "pets", ["cat", "dog", "owl"])
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    command = ["--model", "resnet18", "--data", "pets", "--classes", "owl+cat", *TINY]
    result = run(*command, "--out", "modules/a")
    assert result.exit_code == 0, result.output
    patch.undo()
    return root, result.output


def test_classes_of_any_name_become_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "my pets", ["C++", "golden retriever", "Кошка"])
    command = ["--model", "resnet18", "--data", "my pets", *TINY, "--classes"]
    unknown = run(*command, "golden+C++", "--out", "m")
    assert unknown.output.count("\n") == 1
    assert (
        "'golden' is no class; accepted: all, file:PATH, random:2@0, or joined by +: ranges such "
        "as 0-2, and 0 C" in unknown.output
    )
    result = run(*command, "golden retriever+C+++Кошка", "--out", "my module")
    assert result.exit_code == 0, result.output
    module = nemo.load("my module")
    assert module.info["class_names"] == ["golden retriever", "C++", "Кошка"]
    assert module.classes == [1, 0, 2]
    images = sorted((tmp_path / "my pets/C++").iterdir())
    predicted = CliRunner().invoke(cli, ["predict", "my module", *map(str, images)])
    assert {line.split("\t")[1] for line in predicted.output.splitlines()} == {"C++"}


def test_images_that_need_a_size_name_the_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / f"wide/{name}").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 16)).save(tmp_path / f"wide/{name}/{i}.png")
    said = run("--model", "resnet18", "--data", "wide", "--list-layers").output
    assert "images of 20 x 16; accepted: square ones, or --size to make them so" in said
    assert said.count("\n") == 1


def test_an_image_folder_becomes_a_fine_tuned_module(made):
    root, output = made
    module = nemo.load(root / "modules/a")
    assert module.info["class_names"] == ["owl", "cat"]
    assert module.classes == [2, 0]
    assert "finetuned" in module.info
    assert module(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    assert "pets: 3 classes, 15 train, 3 val, 6 test images of 16 x 16" in output
    assert "masked: 19 of 21 layers" in output
    assert "classifier: its outputs are the logits" in output
    for name in ("all", "subset", "as_cut", "finetuned"):
        assert f"{module.info['test_accuracy'][name]:.1%}" in output
    assert not (root / "runs").exists()


def test_the_table_of_layers_is_that_of_the_module(made):
    root, output = made
    rows = [line.split() for line in output.splitlines()]
    kept = {row[0]: (row[2], row[1]) for row in rows if len(row) == 3 and row[2].isdigit()}
    layers = nemo.load(root / "modules/a").report["layers"]
    assert len(kept) == 19
    for layer, shown in kept.items():
        assert shown == (str(layers[layer]["kept"]), str(layers[layer]["total"]))


def test_another_module_of_the_same_parent_needs_no_training(made, monkeypatch):
    root, _ = made
    monkeypatch.chdir(root)
    command = ["--model", "resnet18", "--data", "folder:pets", *TINY]
    result = run(*command, "--classes", "cat+dog", "--out", "modules/b", "--threshold", "0.8")
    assert result.exit_code == 0, result.output
    assert "already" in result.output
    first, second = (nemo.load(root / "modules" / name).info for name in "ab")
    assert first["parent_sha256"] == second["parent_sha256"]
    other = run(*command, "--classes", "cat+dog", "--out", "modules/c", "--tau", "0.5")
    assert "training the parent" in other.output
    third = nemo.load(root / "modules/c").info
    assert third["parent_sha256"] != first["parent_sha256"]


def test_a_module_trained_as_it_is_cut_can_be_had_without_fine_tuning(made, monkeypatch):
    root, output = made
    monkeypatch.chdir(root)
    command = ["--model", "resnet18", "--data", "pets", "--classes", "owl+cat", *TINY]
    result = run(*command, "--cut-pass", "--finetune-epochs", "0", "--out", "modules/cut")
    assert result.exit_code == 0, result.output
    (history,) = [
        rows
        for file in root.glob("nemo-work/*/runs/**/train/history.csv")
        if "cut_loss" in (rows := file.read_text().splitlines())[0]
    ]
    where = history[0].split(",").index("cut_loss")
    assert float(history[1].split(",")[where]) == 0 < float(history[-1].split(",")[where])
    assert "fine-tun" not in result.output.replace("fine-tuned   not recorded", "")
    assert "fine-tuning owl+cat" in output
    module = nemo.load("modules/cut")
    assert module.info["recalibrated_bn"] is True
    assert "finetuned" not in module.info.keys() | module.info["test_accuracy"].keys()
    data = load("nemo-work/data/pets")
    test, (cat, _, owl) = data.splits["test"], range(3)
    right = []
    for image, label in zip(test.images[:], test.labels, strict=True):
        if label in (owl, cat):
            pixels = (image.float() / 255 - torch.tensor(data.mean).view(-1, 1, 1)) / torch.tensor(
                data.std
            ).view(-1, 1, 1)
            right.append(module(pixels[None]).argmax().item() == [owl, cat].index(label))
    assert module.info["test_accuracy"]["as_cut"] == pytest.approx(sum(right) / len(right))


def test_a_module_that_knows_nothing_is_told(made, capsys):
    module = nemo.load(made[0] / "modules/a")
    for finetuned, told in ((None, 1), (0.5, 1), (0.6, 0)):
        reached = {"all": 1.0, "subset": 1.0, "as_cut": 0.5, "one_class": 0.5}
        module.info["test_accuracy"] = reached | ({"finetuned": finetuned} if finetuned else {})
        _show(module)
        assert capsys.readouterr().err.count("the module knows nothing") == told
    module.info["test_accuracy"] = reached | {"as_cut": 0.6}
    _show(module)
    assert not capsys.readouterr().err


def test_a_cut_pass_that_never_ran_is_told_of_each_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--model", "resnet18", "--shape", "width=0.125", "--data", "digits", "--epochs", "2"]
    for out in "ab":
        result = run(*command, "--cut-pass", "--finetune-epochs", "0", "--out", out)
        assert result.exit_code == 0, result.output
        assert result.output.count("warning: the cut pass never ran in 2 epochs; try more") == 1
    assert "already" in result.output


def test_layers_are_listed_without_training(made, tmp_path, monkeypatch):
    root, _ = made
    monkeypatch.chdir(tmp_path)
    command = ["--model", "timm/resnet10t", "--data", str(root / "pets"), "--size", "32"]
    result = run(*command, "--list-layers")
    assert result.exit_code == 0, result.output
    assert "ops at which neurons must stay: none" in result.output
    assert "layer1.0.conv1" in result.output
    assert "training" not in result.output


def test_the_rehearsal_finds_ops_that_block_and_leaves_the_model_alone(made):
    data = load(made[0] / "nemo-work/data/pets")

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 3)
            nn.init.zeros_(self.second.weight)

        def forward(self, x):
            x = self.second(self.first(x).relu()).mean((2, 3))
            return self.head(torch.cumsum(x, 1))

    modular = modularize(Sorted())
    report = rehearse(modular, data)
    assert any("cumsum" in op for op in report["blocked"])
    assert not modular.model.second.weight.any()
    lines = coverage(modular, report)
    assert lines[0] == "masked: 1 of 3 layers, 8 neurons"
    assert "skipped: first  first convolution or patch embedding" in lines
    assert "cumsum" in lines[-1]
    assert layer_table(modular.layers)[1].split() == ["second", "8"]


def test_a_model_that_cannot_be_traced_is_found_before_training(made):
    data = load(made[0] / "nemo-work/data/pets")

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.head((self.second(x) if x.sum() > 0 else self.second(-x)).mean((2, 3)))

    with pytest.raises(ValueError, match="the model cannot be traced"):
        rehearse(modularize(Branching()), data)


def test_a_model_that_cannot_be_trained_is_found_before_training(made):
    data = load(made[0] / "nemo-work/data/pets")

    class Auxiliary(nn.Module):
        """In train mode another head speaks, too, as in torchvision's Inception."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
            self.head, self.other = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x):
            x = self.second(self.first(x)).mean((2, 3))
            return (self.head(x), self.other(x)) if self.training else self.head(x)

    wrong = (
        r"^the model cannot be trained: in train mode it returns tuple, not \(B, 3\) logits; acc"
    )
    with pytest.raises(ValueError, match=wrong):
        rehearse(modularize(Auxiliary()), data)
    rehearse(modularize(Auxiliary()), data, distilled=True)
    four = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), *four)
    with pytest.raises(ValueError, match=r"returns \(8, 4\), not \(B, 3\) .* model of 3 classes$"):
        rehearse(modularize(other), data)


class Overwritten(nn.Module):
    """Fails in the backward pass only: what it needs is written over."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.sigmoid(self.second(self.first(x)))
        if self.training:
            x.mul_(2)
        return self.head(x.mean((2, 3)))


def test_a_model_whose_backward_pass_fails_is_found_before_training(made):
    data = load(made[0] / "nemo-work/data/pets")
    modular = modularize(Overwritten())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"^the model cannot be trained: .*inplace operation") as e:
        rehearse(modular, data)
    assert "\n" not in str(e.value)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in modular.parameters())


def test_the_recipe_is_that_of_the_quick_profile():
    quick = yaml.safe_load((ROOT / "profiles/quick.yaml").read_text())
    recipe = defaults()
    assert recipe.keys() == {"train", "loss", "masks", "decompose", "finetune"}
    assert recipe.pop("loss") == {  # quick's is for digits
        "warmup": 4, "alpha": {"cnn": 0.5, "transformer": 0.05}, "tau": 0.2, "form": "equation"
    }  # fmt: skip
    for key, section in recipe.items():
        assert section == {name: quick[key][name] for name in section}
        # the first decides nothing, and modules are fine-tuned, which estimates statistics anew
        assert quick[key].keys() - section.keys() <= {"processes", "batch_norm"}
    changes = {"train.epochs": 2, "loss.tau": None, "data.limit": 99}
    params = own_params("resnet18", "digits", "3+5", 1, changes)
    assert (params.data["digits"].limit, params.loss.warmup.transformer) == (99, 4)
    assert (params.train.epochs.cnn, params.loss.tau, params.seeds) == (2, 0.2, [1])
    assert defaults() == {**recipe, "loss": defaults()["loss"]}


def test_missing_pretrained_weights_are_one_line(made, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("no connection\nand a long story")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.create_model", offline)
    arguments = ["--model", "timm/resnet10t", "--data", str(made[0] / "pets"), "--out", "new"]
    result = run(*arguments, "--pretrained")
    assert result.exit_code == 1
    assert result.stderr == "nemo: timm/resnet10t: no pretrained weights here (no connection)\n"


OPTIONS = ["--model", "resnet18", "--out", "new", "--data"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["pets", "--threshold", "2"], "--threshold: input should be less than or equal to 1"),
        (["pets", "--threshold", "2", "--cut-pass"], "--threshold: input should be less than or"),
        (["pets", "--lr", "inf"], "--lr: input should be a finite number, got inf"),
        (["pets", "--alpha", "-1"], "--alpha: input should be greater than or equal to 0"),
        (["pets", "--size", "4"], "--size: input should be greater than or equal to 8, got 4"),
        (["pets", "--crop", "16"], "--crop: 16 on 16 x 16 images; accepted: 0 to 15"),
        (["pets", "--shape", "width=-1"], "--shape width: input should be greater than 0, got -1"),
        (["pets", "--classes", "cat|dog"], "'cat|dog' is no class; accepted: all, file:PATH"),
        (["pets", "--classes", "cat"], "--classes: 'cat' is one class; accepted: two or more"),
        (["pets", "--device", "gpu"], "--device: unknown device 'gpu'; accepted: auto, cpu, mps"),
        (
            ["noise", "--shape", "width=0.0625", "--epochs", "1", "--lr", "1e-9"],
            "try more --epochs or another --lr",
        ),
    ],
)
def test_errors_name_options(made, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").symlink_to(made[0] / "pets")
    for name in ("dark", "bright"):  # images that say nothing of their class
        for i in range(8):
            (tmp_path / "noise" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "noise" / name / f"{i}.png")
    result = run(*OPTIONS, *options)
    assert result.exit_code == 1, result.output
    (said,) = result.stderr.splitlines()
    assert said.startswith("nemo: ")
    assert line in said
    assert not any(key in said for key in ("train.", "loss.", "data.", "options", "architecture"))

"""The whole pipeline, shrunken but real, through the commands that its stages call."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import nemo
from nemo import bn_for_cuts, recalibrate_bn
from nemo.cells import Layout
from nemo.cli.main import cli
from nemo.config import EXTRAS, check_params
from nemo.data import Augment, Batches, load
from nemo.data.stored import StoredImages
from nemo.evaluation.modular import load_class_masks
from nemo.pipeline.inputs import images
from nemo.predict import accuracy, predict
from nemo.results import read_result
from nemo.settings import fits
from nemo.trained import load_cell, weights_sha256
from tests.test_config import DEFAULT

ROOT = Path(__file__).parents[1]
TINY = {
    **DEFAULT,
    "models": ["resnet18", "deit_small"],
    "subsets": ["0+1", "all"],
    "data": {"digits": {"source": "digits", "size": 16, "crop": 1}},
    "architecture": {
        "resnet18": {"width": 0.0625},
        "deit_small": {"dim": 16, "depth": 2, "heads": 2, "patch": 8, "teacher": {"width": 0.0625}},
    },
    "train": {**DEFAULT["train"], "epochs": 2, "at_chance": "keep"},
    "finetune": {**DEFAULT["finetune"], "epochs": 1},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Every command has run once."""
    root = tmp_path_factory.mktemp("cli")
    (root / "params.yaml").write_text(yaml.safe_dump(TINY))
    patch = pytest.MonkeyPatch()
    patch.chdir(root)

    def call(*command):
        result = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    call("plan")
    call("prepare", "--dataset", "digits")
    for model in TINY["models"]:
        for method in TINY["methods"]:
            cell = ["--dataset", "digits", "--model", model, "--method", method]
            call("train", *cell)
            if method != "standard":
                call("masks", *cell)
            for subset in TINY["subsets"] if method != "standard" else ():
                call("decompose", *cell, "--subset", subset)
                call("finetune", *cell, "--subset", subset)
            call("evaluate", *cell)
    call("report")
    patch.undo()
    return root


@pytest.mark.parametrize("method", TINY["methods"])
@pytest.mark.parametrize("model", TINY["models"])
def test_the_files_agree_with_each_other(project, model, method):
    file = project / f"results/{TINY['profile']}/digits/{model}/{method}-0.json"
    result = json.loads(file.read_text())
    assert result["cell"] == {"dataset": "digits", "model": model, "method": method, "seed": 0}
    assert read_result(file).cell.method == method
    assert len(result["modules"]) == (0 if method == "standard" else 2)
    assert set(result["subsets"]) == {"0+1", "all"}
    assert result["subsets"]["all"] == pytest.approx(result["metrics"]["accuracy"])
    for row in result["modules"]:
        cell = project / f"runs/digits/{model}/{method}-0"
        module = nemo.load(cell / "modules" / row["subset"])
        assert module.classes == row["classes"]
        assert row["parameters"] == sum(p.numel() for p in module.parameters())
        assert 0 <= row["certificate"] <= 1e-9
        masks = load_file(cell / "masks/masks.safetensors")  # eight neurons to a byte
        unions = [np.bitwise_or.reduce(mask[row["classes"]].numpy()) for mask in masks.values()]
        kept = sum(int(byte).bit_count() for union in unions for byte in union)
        about = json.loads((cell / "masks/metrics.json").read_text())["layers"]
        total = sum(layer["neurons"] for layer in about)
        assert sum(map(len, unions)) == sum(-(-layer["neurons"] // 8) for layer in about)
        assert row["nrr"] == pytest.approx(kept / total, rel=1e-5)
        tuned = nemo.load(cell / "finetuned" / row["subset"])
        assert set(tuned.info["finetuned"]) >= {"best_epoch", "val_accuracy"}


def test_a_result_states_the_params_that_made_it(project):
    file = project / f"results/{TINY['profile']}/digits/resnet18/nemo-0.json"
    result = read_result(file)
    assert result.params["loss.tau"] == TINY["loss"]["tau"]
    assert result.params["loss.alpha"] == TINY["loss"]["alpha"]["cnn"]
    assert result.made["trained"]["machine"] == result.made["evaluated"]["machine"]
    params = check_params(copy.deepcopy(TINY))
    assert fits(result, params) == []
    other = check_params({**TINY, "loss": {**TINY["loss"], "tau": 0.7}})
    assert fits(result, other) == ["made with loss.tau 0.2, and params have 0.7"]


def test_the_base_model_of_a_modular_cell_loads_into_the_standard_one(project):
    standard = load_file(project / "runs/digits/resnet18/standard-0/train/weights.safetensors")
    modular = load_file(project / "runs/digits/resnet18/nemo-0/train/weights.safetensors")
    base = {k.removeprefix("model."): v for k, v in modular.items() if k.startswith("model.")}
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in standard.items()}


def test_training_twice_gives_the_same_bytes(project, monkeypatch):
    monkeypatch.chdir(project)
    folder = project / "runs/digits/resnet18/nemo-0/train"
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    arguments = ["train", "--dataset", "digits", "--model", "resnet18", "--method", "nemo"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_a_module_describes_itself_and_classifies_images(project, tmp_path):
    folder = project / "runs/digits/resnet18/nemo-0/finetuned/0+1"
    card = CliRunner().invoke(cli, ["inspect", str(folder)], catch_exceptions=False).output
    assert "classes      0, 1\n" in card
    assert "cut from     digits/resnet18/nemo-0\n" in card
    assert "fine-tuned   yes" in card
    nemo.save(nemo.load(folder), tmp_path / "other", {"finetuned": None})  # or tuned elsewhere
    card = CliRunner().invoke(cli, ["inspect", str(tmp_path / "other")]).output
    assert "fine-tuned   not recorded\n" in card
    data = load(project / "data/digits")
    files = []
    for i, image in enumerate(data.restrict([0, 1]).splits["test"].images[:3]):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    arguments = ["predict", str(folder), *map(str, files)]
    lines = CliRunner().invoke(cli, arguments, catch_exceptions=False).output.splitlines()
    batches = Batches(data.restrict([0, 1]).splits["test"], data.mean, data.std, 3)
    expected = nemo.load(folder)(next(iter(batches))[0]).softmax(1).max(1)
    assert [line.split("\t")[0] for line in lines] == list(map(str, files))
    assert [int(line.split("\t")[1]) for line in lines] == expected.indices.tolist()
    values = [float(line.split("\t")[2]) for line in lines]
    assert values == pytest.approx(expected.values.tolist(), abs=1e-3)


def test_parts_of_another_training_are_refused(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    other = {**TINY, "loss": {**TINY["loss"], "tau": 0.7}}
    Path("params.yaml").write_text(yaml.safe_dump(other))
    arguments = ["train", "--dataset", "digits", "--model", "resnet18", "--method", "nemo"]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    cut = CliRunner().invoke(cli, ["decompose", *arguments[1:], "--subset", "0+1"])
    assert "class masks of other weights; run `nemo masks` again" in cut.output
    measured = CliRunner().invoke(cli, ["evaluate", *arguments[1:]])
    assert "a module of other weights; run `nemo decompose` again" in measured.output
    assert (cut.exit_code, measured.exit_code) == (1, 1)


@pytest.mark.parametrize(
    ("section", "value", "line"),
    [
        ("loss", {"tau": 0.7}, "made with loss.tau 0.2, and params have 0.7; run `nemo train`"),
        ("masks", {"threshold": 0.5},
         "made with masks.threshold 0.9, and params have 0.5; run `nemo masks`"),
        ("finetune", {"lr": 0.5}, "made with finetune.lr 0.001, and params have 0.5; "
         "run `nemo finetune`"),
    ],
)  # fmt: skip
def test_results_are_not_labelled_with_params_that_did_not_make_them(
    project, tmp_path, monkeypatch, section, value, line
):
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    other = {**TINY, section: {**TINY[section], **value}}
    Path("params.yaml").write_text(yaml.safe_dump(other))
    cell = ["--dataset", "digits", "--model", "resnet18", "--method", "nemo"]
    file = Path(f"results/{TINY['profile']}/digits/resnet18/nemo-0.json")
    before = file.read_bytes()
    refused = CliRunner().invoke(cli, ["evaluate", *cell])
    assert refused.exit_code == 1
    assert line in refused.output
    assert file.read_bytes() == before


def test_a_cut_takes_the_statistics_that_stage_masks_has_for_it(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    asked = {**TINY, "masks": {**TINY["masks"], "batch_norm": True}}
    Path("params.yaml").write_text(yaml.safe_dump(asked))
    cell = ["--dataset", "digits", "--model", "resnet18", "--method", "nemo"]
    run, data = Path("runs/digits/resnet18/nemo-0"), load(Path("data/digits"))
    bits = (run / "masks/masks.safetensors").read_bytes()
    assert not (run / "masks/batch_norm.safetensors").exists()
    stale = CliRunner().invoke(cli, ["evaluate", *cell])
    assert "made with masks.batch_norm None, and params have True" in stale.output
    asked["loss"] = {**TINY["loss"], "cut": {"sizes": [4]}}
    Path("params.yaml").write_text(yaml.safe_dump(asked))
    stale = CliRunner().invoke(cli, ["evaluate", *cell])  # what was made first is named first
    assert "made with loss.cut.after None, and params have 3; run `nemo train`" in stale.output
    assert CliRunner().invoke(cli, ["masks", *cell]).exit_code == 0
    assert (run / "masks/masks.safetensors").read_bytes() == bits
    made = CliRunner().invoke(cli, ["decompose", *cell, "--subset", "0+1"])
    assert made.exit_code == 0, made.output
    modular = load_cell(run / "train")
    masks = load_class_masks(run / "masks", modular.layers, weights_sha256(run / "train"))
    training = Batches(data.splits["train"], data.mean, data.std, TINY["train"]["batch_size"],
                       shuffle=True, augment=Augment(crop=1), steps=400)  # fmt: skip
    found = bn_for_cuts(modular, masks, training, sizes=[4])
    kept = load_file(run / "masks/batch_norm.safetensors")
    assert torch.equal(kept.pop("drawn"), found.drawn)
    assert kept.keys() == {n for n in modular.model.state_dict() if "running" in n}
    assert all(torch.equal(kept[name], value) for name, value in found.statistics.items())
    module = nemo.load(run / "modules/0+1")
    cut = nemo.decompose(found.ready(modular, [0, 1]), masks.select([0, 1])).state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in module.state_dict().items())
    assert module.certificate["error"] < 1e-9


def test_batch_norm_is_estimated_anew_by_the_cut_where_params_ask(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    Path("params.yaml").write_text(yaml.safe_dump({**TINY, "decompose": {"recalibrate_bn": True}}))
    cell = ["--dataset", "digits", "--model", "resnet18", "--method", "nemo"]
    folder = Path("runs/digits/resnet18/nemo-0/modules/0+1")
    file = Path(f"results/{TINY['profile']}/digits/resnet18/nemo-0.json")
    before, plain = nemo.load(folder), json.loads(file.read_text())
    stale = CliRunner().invoke(cli, ["evaluate", *cell])
    assert "made with decompose.recalibrate_bn None, and params have True" in stale.output
    for subset in TINY["subsets"]:
        for stage in ("decompose", "finetune"):
            made = CliRunner().invoke(cli, [stage, *cell, "--subset", subset])
            assert made.exit_code == 0, made.output
    module, data = nemo.load(folder), load(Path("data/digits"))
    own = data.restrict([0, 1])
    expected = copy.deepcopy(before)
    training = Batches(own.splits["train"], own.mean, own.std, TINY["finetune"]["batch_size"],
                       shuffle=True, augment=Augment(crop=1))  # fmt: skip
    recalibrate_bn(expected, training)
    weights = {name for name, _ in before.named_parameters()}
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name
        assert name not in weights or torch.equal(value, before.state_dict()[name])
    assert module.info["recalibrated_bn"] is True
    assert module.certificate == before.certificate
    assert CliRunner().invoke(cli, ["evaluate", *cell]).exit_code == 0
    result = json.loads(file.read_text())
    for row, old in zip(result["modules"], plain["modules"], strict=True):
        assert row["accuracy_step0"] == old["accuracy_step0"]
        assert "accuracy_step0_bn" not in old
    test = Batches(own.splits["test"], own.mean, own.std, 256)
    assert result["modules"][0]["accuracy_step0_bn"] == round(accuracy(*predict(module, test)), 6)


def test_no_file_names_a_machine_or_a_time(project):
    for file in [*project.glob("runs/**/*.json"), *project.glob("results/**/*.json")]:
        assert str(project) not in file.read_text()


def test_data_above_the_cap_in_params_stays_in_its_file(project, monkeypatch):
    monkeypatch.chdir(project)
    for memory, kind in ((None, torch.Tensor), (1.0, torch.Tensor), (1e-6, StoredImages)):
        source = {**TINY["data"]["digits"], "memory": memory}
        params = check_params({**TINY, "data": {"digits": source}})
        assert isinstance(images(params, "digits", Layout()).splits["train"].images, kind)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_has_help(command):
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert cli.commands[command].help.split()[0] in result.output


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_help_of_an_extra_says_what_it_measures(extra):
    rows = (ROOT / "docs/pipeline.md").read_text().splitlines()
    (row,) = (row for row in rows if row.startswith(f"| `{extra}: {{"))
    assert row.split(" | ")[1].removesuffix(" (T8)") in cli.commands[extra].help


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError("Unable to allocate 7.11 PiB for an array"),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, error):
    def run(*args):
        raise error

    monkeypatch.setattr("nemo.pipeline.inputs.class_names", lambda *args: ["0", "1"])
    monkeypatch.setattr("nemo.pipeline.train.run", run)
    monkeypatch.setattr("nemo.pipeline.masks.run", run)
    cell = ["--dataset", "digits", "--model", "resnet18", "--params", str(ROOT / "params.yaml")]
    trained = CliRunner().invoke(cli, ["train", *cell])
    line = "nemo: out of memory: try a smaller train.batch_size, or another device\n"
    assert (trained.exit_code, trained.output) == (1, line)
    masks = CliRunner().invoke(cli, ["masks", *cell])
    assert (masks.exit_code, masks.output) == (1, "nemo: out of memory: try another device\n")


def test_another_error_of_torch_is_a_bug(monkeypatch):
    def run(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("nemo.pipeline.masks.run", run)
    cell = ["--dataset", "digits", "--model", "resnet18", "--params", str(ROOT / "params.yaml")]
    with pytest.raises(RuntimeError, match=r"^mat1"):
        CliRunner().invoke(cli, ["masks", *cell], catch_exceptions=False)


def test_a_reader_that_ends_early_is_no_error():
    command = "from nemo.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "cells"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(60)

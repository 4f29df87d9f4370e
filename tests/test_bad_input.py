"""Everything that people get wrong, one row each: one clear line, and nothing is left behind.

A row of the command line is one mistake in a small finished project: what is spoilt in it, the
command, and what the line must hold. Each ends with exit code 1, one line on stderr that begins
with `nemo: `, no traceback, in under 5 s of CPU time beside torch's import, and with every file as
it was. A command that is not even well-formed is click's own error: its usage, and one line that
begins with `Error`, and exit code 2. A row of the API is a call that raises one line.
"""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import nemo
from nemo.cli.main import cli
from nemo.cut import DecomposedModule
from nemo.data import Batches, Split
from nemo.device import resolve_device
from nemo.masking.class_masks import ClassMasks
from nemo.masking.objectives import OBJECTIVES
from nemo.models import build_model
from nemo.models.shapes import CnnShape
from nemo.training.checkpoint import Checkpoint, open_checkpoint
from nemo.training.fit import Plan, fit
from nemo.training.tasks import Task, cross_entropy
from tests.test_config import DEFAULT
from tests.training.test_tasks import mwt_penalty, nemo_penalty

ROOT = Path(__file__).parents[1]
SECONDS = 5.0  # of CPU time, beyond what a machine needs to start Python and import torch
Spoil = Callable[[Path], object]
PARAMS = {
    **DEFAULT,
    "profile": "tiny",
    "datasets": ["pets"],
    "models": ["resnet18"],
    "methods": ["standard", "nemo"],
    "subsets": ["cat+dog", "owl+pig"],
    "data": {
        "pets": {"source": "folder:pets"},
        "other": {"source": "folder:other"},
        "packed": {"source": "folder:packed.tar"},
    },
    "architecture": {
        "resnet18": {"width": 0.0625},
        "vit_small": {"dim": 16, "depth": 2, "heads": 2, "patch": 8},
    },
    "train": {**DEFAULT["train"], "epochs": 1, "batch_size": 8, "at_chance": "keep"},
    "finetune": {**DEFAULT["finetune"], "epochs": 1, "batch_size": 8},
}
CELL = "--dataset pets --model resnet18"
RUN = "runs/pets/resnet18/nemo-0"
MODULE = f"{RUN}/finetuned/cat+dog"
RESULT = "results/tiny/pets/resnet18/nemo-0.json"
OTHER = f"{RUN}/finetuned/owl+pig"
OWN = "modularize --model resnet18 --data pets --shape width=0.0625"
BOTH = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}
REMOVE = object()


# What is spoilt, and how: each makes a function of the project's folder.


def nothing(root: Path) -> None:
    """The command itself is wrong."""


def params(key: str | tuple[str, ...], value: object) -> Spoil:
    """Set a dotted key of params.yaml, or remove it."""

    def spoil(root: Path) -> None:
        file = root / "params.yaml"
        content = place = yaml.safe_load(file.read_text())
        *path, last = key if isinstance(key, tuple) else key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place.pop(last, None) if value is REMOVE else place.update({last: value})
        file.write_text(yaml.safe_dump(content))

    return spoil


def write(name: str, content: bytes = b"") -> Spoil:
    def spoil(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return spoil


def remove(name: str) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def cut(name: str, keep: float = 0.5) -> Spoil:
    """The file's first part."""

    def spoil(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(keep * len(content))])

    return spoil


def edit(name: str, **values: object) -> Spoil:
    """Other values in a JSON file."""

    def spoil(root: Path) -> None:
        content = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**content, **values}))

    return spoil


def other_statistics(root: Path) -> None:
    """Of one draw, and a weight, which would be taken over without a word."""
    edit(f"{RUN}/masks/metrics.json", masks={"batch_norm": True})(root)
    weights = load_file(root / f"{RUN}/train/weights.safetensors")
    of_model = {n.removeprefix("model."): v for n, v in weights.items() if n.startswith("model.")}
    chosen = {n: v[None].clone() for n, v in of_model.items() if "running" in n or n == "fc.weight"}
    chosen["drawn"] = torch.ones(1, 10).bool()
    save_file(chosen, root / f"{RUN}/masks/batch_norm.safetensors")


def images(name: str, counts: dict[str, int], size: tuple[int, int] = (16, 16)) -> Spoil:
    """PNGs of noise that is brighter from class to class."""

    def spoil(root: Path) -> None:
        random = np.random.default_rng(0)
        for number, (folder, count) in enumerate(counts.items()):
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (size[1], size[0], 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / folder / f"{i}.png")

    return spoil


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Spoil:
    return lambda root: Image.new(mode, size).save(root / name)


def packed(mode: str = "w", keep: float = 1.0, link: bool = False) -> Spoil:
    """packed.tar of a good folder, compressed, cut short or with a link in it."""

    def spoil(root: Path) -> None:
        with tarfile.open(root / "packed.tar", mode) as tar:
            tar.add(root / "pets", "pets")
            if link:
                member = tarfile.TarInfo("pets/cat/passwd.png")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
        cut("packed.tar", keep)(root)

    return spoil


def evaluated(root: Path) -> None:
    result = CliRunner().invoke(cli, ["evaluate", *CELL.split()])
    assert result.exit_code == 0, result.output


def linked(name: str, target: str) -> Spoil:
    return lambda root: (root / name).symlink_to(root / target)


def all_of(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]


@dataclass(frozen=True)
class Row:
    """A command of nemo, what its error says, and what is spoilt before."""

    command: str
    message: str
    spoil: Spoil = nothing


def param_row(
    key: str | tuple[str, ...], value: object, message: str, without: str | None = None
) -> Row:
    spoil = params(key, value)
    if without is not None:
        spoil = all_of(spoil, params(without, REMOVE))
    return Row("prepare --dataset pets", f"params.yaml: {message}", spoil)


def variant_row(variant: object, message: str, between: str = ".") -> Row:
    return param_row("variants", {"mine": variant}, f"variants.mine{between}{message}")


def plugin_row(content: bytes, message: str) -> Row:
    spoil = all_of(params("plugins", ["mine.py"]), write("mine.py", content))
    return Row("prepare --dataset pets", f"params.yaml: plugins: mine.py, {message}", spoil)


def subset_row(subsets: list[str], message: str) -> Row:
    return Row("prepare --dataset pets", message, params("subsets", subsets))


def own(options: str, message: str) -> Row:
    return Row(f"{OWN} --out new {options}", message)


def folder_row(message: str, *spoils: Spoil, data: str = "other") -> Row:
    return Row(f"prepare --dataset {data}", message, all_of(params("subsets", ["all"]), *spoils))


ROWS = {
    # training
    "a model that learned nothing": Row(
        f"train {CELL}",
        "is no better than always saying the most frequent class (25.0 %); try more train.epochs",
        params("train.at_chance", REMOVE),
    ),
    # params.yaml
    "unknown key": param_row("nope", 1, "nope: unknown key; accepted: alternatives, architecture"),
    "typing error": param_row(
        "loss.taau", 1, "loss.taau: unknown key; accepted: alpha, cut, form, tau, warmup"
    ),
    "unknown family": param_row(
        "loss.alpha",
        {"cnn": 1, "transformer": 1, "rnn": 1},
        "loss.alpha.rnn: unknown key; accepted: cnn, transformer",
    ),
    "unknown key of data": param_row(
        "data.pets.colour", 1, "data.pets.colour: unknown key; accepted: classes, crop,"
    ),
    "missing key": param_row("loss", REMOVE, "loss: required by the method 'nemo', and missing"),
    "tau zero": param_row("loss.tau", 0, "loss.tau: input should be greater than 0, got 0"),
    "tau NaN": param_row(
        "loss.tau", float("nan"), "loss.tau: input should be a finite number, got nan"
    ),
    "alpha negative": param_row(
        "loss.alpha", -1, "loss.alpha: input should be greater than or equal to 0, got -1"
    ),
    "beta infinite": param_row(
        "mwt.beta", float("inf"), "mwt.beta: input should be a finite number, got inf"
    ),
    "no processes": param_row(
        "train.processes", 0, "train.processes: input should be greater than or equal to 1"
    ),
    "processes that share no batch evenly": param_row(
        "train.processes", 7, "train.processes: 7 processes do not share batch_size"
    ),
    "images of a class that fill no batch": param_row(
        "train.per_class", 7, "train.per_class: 7 do not divide batch_size"
    ),
    "processes of fine-tuning": param_row(
        "finetune.processes", 7, "finetune.processes: 7 processes do not share batch_size"
    ),
    "form": param_row(
        "loss.form", "paper", "loss.form: input should be 'equation' or 'released', got 'paper'"
    ),
    "threshold": param_row(
        "masks.threshold", 1.5, "masks.threshold: input should be less than or equal to 1"
    ),
    "half an epoch": param_row(
        "train.epochs", 2.5, "train.epochs: input should be a valid integer, got 2.5"
    ),
    "no epochs": param_row("train.epochs", 0, "train.epochs: input should be greater than"),
    "optimizer": param_row(
        "train.optimizer", "lion", "train.optimizer: input should be 'sgd' or 'adamw'"
    ),
    "lr negative": param_row("train.lr", -0.1, "train.lr: input should be greater than 0"),
    "momentum one": param_row("train.momentum", 1, "train.momentum: input should be less than 1"),
    "batch of one": param_row(
        "train.batch_size", 1, "train.batch_size: input should be greater than or equal to 2"
    ),
    "fine-tuning batch of one": param_row(
        "finetune.batch_size", 1, "finetune.batch_size: input should be greater than or equal to 2"
    ),
    "head": param_row(
        "finetune.head", "old", "finetune.head: input should be 'inherit' or 'new', got 'old'"
    ),
    "cosine that rises": param_row(
        "finetune", {**DEFAULT["finetune"], "t_max": 3}, "finetune: t_max: the cosine would rise"
    ),
    "model": param_row("models", ["vgg17"], "models: unknown model 'vgg17'; accepted: simcnn,"),
    "timm model": param_row("models", ["timm/nope"], "models: timm has no model 'nope'"),
    "timm tag": param_row(
        "models", ["timm/resnet18.a1_in1k"], "models: 'timm/resnet18.a1_in1k': give the timm name"
    ),
    "no models": param_row("models", [], "models: list should have at least 1 item"),
    "architecture": param_row(
        "architecture.vgg17", {}, "architecture: unknown model 'vgg17'; accepted: simcnn,"
    ),
    "model without a shape": param_row(
        "models", ["vgg16"], "architecture.vgg16: missing; {} is the paper's shape"
    ),
    "heads": param_row(
        "architecture.vit_small.heads", 3, "architecture.vit_small: heads must divide dim"
    ),
    "no width": param_row(
        "architecture.resnet18.width", 0, "architecture.resnet18.width: input should be greater"
    ),
    "no standard method": param_row(
        "methods", ["nemo"], "methods: 'standard' is always part; all else is compared with it"
    ),
    "method": param_row(
        "methods",
        ["standard", "nemo", "mine"],
        "methods: unknown 'mine'; accepted: standard, mwt, nemo",
    ),
    "method by a name that is no file's": param_row(
        "methods", ["standard", "../nemo"], "methods.1: string should match pattern"
    ),
    "section of a method in use": param_row(
        "methods", ["standard", "mwt"], "mwt: required by the method 'mwt', and missing", "mwt"
    ),
    "variant of nothing": variant_row({"loss.tau": 1}, "method: unknown None; accepted: standard,"),
    "variant of an unknown method": variant_row(
        {"method": "magic"}, "method: unknown 'magic'; accepted: standard, mwt, nemo"
    ),
    "variant with another method's key": variant_row(
        {"method": "nemo", "mwt.alpha": 1}, "mwt.alpha: decides nothing here; accepted: method, and"
    ),
    "variant with a key that is not dotted": variant_row(
        {"method": "nemo", "tau": 1}, "tau: decides nothing here; accepted: method, and dotted keys"
    ),
    "variant with an unknown key": variant_row(
        {"method": "nemo", "loss.taau": 1},
        "loss.taau: unknown key; accepted: alpha, cut, form, tau, warmup",
    ),
    "variant with a key of a value": variant_row(
        {"method": "nemo", "loss.tau.cnn": 1}, "loss.tau.cnn: tau has no keys"
    ),
    "variant with a bad value": variant_row(
        {"method": "nemo", "loss.tau": -1}, "loss.tau: input should be greater than 0, got -1"
    ),
    "variant with an unknown selector": variant_row(
        {"method": "nemo", "masks.selector": "mine"}, "masks.selector: unknown selector 'mine'; acc"
    ),
    "variant that is no mapping": variant_row(3, " input should be a valid dictionary, got 3", ":"),
    "variant called as a method": param_row(
        "variants", {"mwt": {"method": "nemo"}}, "variants.mwt: a method has that name; choose an"
    ),
    "plugin that is not there": param_row(
        "plugins", ["mine.py"], "plugins: mine.py: no such file; accepted: paths of Python files"
    ),
    "plugin that is no Python": plugin_row(b"a: [", "line 1: SyntaxError: "),
    "plugin that raises": plugin_row(
        b"import nemo\n1 / 0", "line 2: ZeroDivisionError: division by"
    ),
    "plugin with a name that is taken": plugin_row(
        b"from nemo.masking.objectives import OBJECTIVES\n\nOBJECTIVES.add('mwt', None)",
        "line 3: ValueError: method 'mwt' exists already: choose another name",
    ),
    "selector": param_row(
        "masks.selector", "mine", "masks.selector: unknown selector 'mine'; accepted: frequency"
    ),
    "key of another selector": param_row(
        "masks.share", 0.5, "masks.share: unknown key; accepted: batch_norm, selector, threshold"
    ),
    "alternatives of a standard model": param_row(
        "alternatives.of",
        ["standard"],
        "alternatives.of: 'standard' has no modules here; accepted, of methods: nemo",
    ),
    "gap of a method that is not listed": param_row(
        "gap.of", ["mwt"], "gap.of: 'mwt' has no modules here; accepted, of methods: nemo"
    ),
    "alternative": param_row(
        "alternatives.kinds", ["tiny"], "alternatives.kinds: unknown alternative 'tiny'; accepted: "
    ),
    "threshold of a table": param_row(
        "thresholds.values", [0.5, 2], "thresholds.values.1: input should be less than or equal"
    ),
    "data set without data": param_row(
        "datasets", ["svhn"], "datasets: 'svhn' is not in data; accepted: "
    ),
    "source": param_row(
        "data.pets.source", "mnist", "data.pets.source: unknown source 'mnist'; accepted:"
    ),
    "validation share": param_row(
        "data.pets.validation", 0.9, "data.pets.validation: input should be less than"
    ),
    "image size": param_row(
        "data.pets.size", 4, "data.pets.size: input should be greater than or equal to 8"
    ),
    "seed twice": param_row("seeds", [0, 0], "seeds: [0, 0] names something twice"),
    "seed negative": param_row(
        "seeds", [-1], "seeds.0: input should be greater than or equal to 0, got -1"
    ),
    "device": param_row("device", "tpu", "device: string should match pattern"),
    "profile": param_row("profile", "../x", "profile: string should match pattern"),
    "empty params": Row("prepare --dataset pets", "got NoneType", write("params.yaml")),
    "no YAML": Row("prepare --dataset pets", "not YAML", write("params.yaml", b"a: [")),
    "no mapping": Row("prepare --dataset pets", "a mapping of keys", write("params.yaml", b"- 1")),
    "no text": Row("prepare --dataset pets", "not UTF-8 text", write("params.yaml", b"\xff\xfe")),
    "no params": Row("prepare --dataset pets", "No such file", remove("params.yaml")),
    # class subsets
    "subset of what is no word": param_row(
        "subsets",
        ["cat|dog"],
        "subsets: 'cat|dog' is no name of a subset, for its '|'; accepted: all, 0-4,",
    ),
    "subset that a shell reads": param_row(
        "subsets",
        ["$(cat)+dog"],
        "subsets: '$(cat)+dog' is no name of a subset, for its '$'; accepted:",
    ),
    "subset of a folder above": param_row(
        "subsets",
        ["../cat"],
        "subsets: '../cat' is no name of a subset, for its '.'; accepted: all,",
    ),
    "subset of no class": subset_row(
        ["cat dog"], "accepted: all, ranges such as 0-3, file:PATH, random:2@0, and 0 cat"
    ),
    "subset twice": param_row(
        "subsets", ["all", "all"], "subsets: ['all', 'all'] names something twice"
    ),
    "no subsets": param_row("subsets", [], "subsets: list should have at least 1 item"),
    "empty subset": param_row("subsets", [""], "subsets: '' is no name of a subset"),
    "unknown class": subset_row(["cow+0"], "'cow' is no class; accepted: all,"),
    "class twice": subset_row(["cat+0"], "class 0 (cat) is named twice"),
    "range past the end": subset_row(["0-9"], "'0-9' is no range of classes"),
    "range backwards": subset_row(["2-1"], "'2-1' is no range of classes"),
    "one class": subset_row(["cat"], "'cat' is one class; accepted: two or more"),
    "the same classes": subset_row(["0+1", "dog+cat"], "are the same classes"),
    "unknown class of a table": Row(
        "prepare --dataset pets",
        "'cow' is no class; accepted: all,",
        params("granularity", {"of": ["nemo"], "subsets": ["cow+pig"]}),
    ),
    "subset of decompose": Row(f"decompose {CELL} --subset cow+pig", "'cow' is no class"),
    "subset of finetune": Row(f"finetune {CELL} --subset 7", "'7' is no class"),
    # names and order of the stages
    "unknown data set": Row("prepare --dataset mnist", "'mnist' is not in data; accepted: other"),
    "unknown model": Row("train --dataset pets --model vgg17", "unknown model 'vgg17'; accepted:"),
    "not prepared": Row(f"train {CELL}", "`nemo prepare`", remove("data/pets")),
    "not trained": Row(f"masks {CELL} --seed 5", "run `nemo train` first"),
    "no masks": Row(
        f"decompose {CELL} --subset all", "run `nemo masks` first", remove(f"{RUN}/masks")
    ),
    "not cut": Row(f"finetune {CELL} --subset all", "modules/all: cannot read"),
    "not fine-tuned": Row(f"evaluate {CELL}", "run `nemo finetune` first", remove(MODULE)),
    "not evaluated": Row("report", "results/tiny: none of the cells of params has results; `dvc"),
    "method that params do not name": Row(
        f"train {CELL} --method magic", "unknown 'magic'; accepted: standard, mwt, nemo"
    ),
    "masks of a standard cell": Row(
        f"masks {CELL} --method standard", "--method: 'standard' has no masks and no modules"
    ),
    "all stages of a method that params do not name": Row(
        f"run {CELL} --method magic", "unknown 'magic'; accepted: standard, mwt, nemo"
    ),
    "no report to show": Row("report --show", "reports/tiny/T1-models.md is missing"),
    "no report to compare with": Row("report --check", "git ls-tree: "),
    # devices, and shapes that do not fit
    "no such GPU": Row(
        f"train {CELL}",
        "device: cuda:7 is not available here; accepted: auto",
        params("device", "cuda:7"),
    ),
    "patch size": Row(
        "train --dataset pets --model vit_small",
        "patch 5 must divide",
        params("architecture.vit_small.patch", 5),
    ),
    "crop as large as the image": Row(
        "prepare --dataset pets",
        "data.pets.crop: 16 on 16 x 16 images",
        params("data.pets.crop", 16),
    ),
    # numbers
    "training diverges": Row(
        f"train {CELL} --seed 1",
        "is not finite; try a smaller lr, a smaller loss.alpha",
        all_of(params("train.lr", 1e30), params("train.optimizer", "sgd")),
    ),
    "training diverges in its last step": Row(
        f"train {CELL} --seed 1 --method standard",
        "epoch 1, after its last step: weights",
        all_of(params("train.lr", 1e300), params("train.batch_size", 512)),
    ),
    "fine-tuning diverges": Row(
        f"finetune {CELL} --subset cat+dog",
        "is not finite; try a smaller lr",
        all_of(params("finetune.lr", 1e30), params("finetune.epochs", 3)),
    ),
    # image folders and .tar files
    "no folder": folder_row("no such folder or .tar; accepted: train/CLASS/image"),
    "empty folder": folder_row(
        "no class folders; accepted: train/CLASS/image", lambda root: (root / "other").mkdir()
    ),
    "a file": folder_row("neither a folder nor a .tar", write("other", b"PK")),
    "only loose images": folder_row("no class folders", write("other/0.png")),
    "one class folder": folder_row("only one class folder (cat)", images("other", {"cat": 3})),
    "empty class": folder_row(
        "class 'dog' of train has no images", images("other", {"cat": 3, "dog": 0})
    ),
    "class of text files": folder_row(
        "class 'dog' of train has no images",
        images("other", {"cat": 3, "dog": 0}),
        write("other/dog/notes.txt"),
    ),
    "class with one image": folder_row(
        "class 'dog' has too few images to hold some out for testing: 1",
        images("other", {"cat": 5, "dog": 1}),
    ),
    "class with two images": folder_row(
        "class 'dog' has too few images to hold some out for validation: 1",
        images("other", {"cat": 5, "dog": 2}),
    ),
    "class only in test": folder_row(
        "class 'cow' is in test but not in train", images("other", {**BOTH, "test/cow": 2})
    ),
    "class only in train": folder_row(
        "class 'cow' is in train but not in test", images("other", {**BOTH, "train/cow": 2})
    ),
    "class not in val": folder_row(
        "class 'dog' is in train but not in val", images("other", {**BOTH, "val/cat": 2})
    ),
    "two validation folders": folder_row(
        "valid is a second val folder",
        images("other", {**BOTH, "val/cat": 2, "valid/dog": 2}),
    ),
    "no training images": folder_row(
        "test without train", images("other", {"test/cat": 1, "test/dog": 1})
    ),
    "splits without classes": folder_row(
        "no class folders in test", images("other", {"train": 3, "test": 3})
    ),
    "image that is text": folder_row(
        "cat/9.png: damaged, or in no image format",
        images("other", BOTH),
        write("other/train/cat/9.png", b"no png"),
    ),
    "image of no bytes": folder_row(
        "cat/9.png: damaged, or in no image format",
        images("other", BOTH),
        write("other/train/cat/9.png"),
    ),
    "image cut short": folder_row(
        "dog/1.png: cannot be decoded (", images("other", BOTH), cut("other/test/dog/1.png")
    ),
    "image of 16 bits": folder_row(
        "dog/1.png: more than 8 bits a channel",
        images("other", BOTH),
        picture("other/test/dog/1.png", "I;16"),
    ),
    "images of two sizes": folder_row(
        "images differ in size: ",
        images("other", BOTH),
        picture("other/test/dog/1.png", size=(20, 20)),
    ),
    "images that are not square": folder_row(
        "data.other: images of 20 x 16; accepted: square ones",
        images("other", BOTH, size=(20, 16)),
    ),
    "a stray file": folder_row(
        "cat/9.npy: no image file; accepted: .jpg",
        images("other", BOTH),
        write("other/train/cat/9.npy"),
    ),
    "a link to nowhere": folder_row(
        "cat/9.png: No such file", images("other", BOTH), linked("other/train/cat/9.png", "nowhere")
    ),
    "a link back": folder_row(
        "nested too deep; does a link lead back",
        images("other", BOTH),
        linked("other/train/cat/again", "other"),
    ),
    "train and train.tar": folder_row(
        "both train and train.tar; accepted: one of them",
        images("other", BOTH),
        packed(),
        lambda root: (root / "packed.tar").rename(root / "other/train.tar"),
    ),
    "no .tar": folder_row("no such folder or .tar", data="packed"),
    ".tar of text": folder_row(
        "not a whole, uncompressed .tar", write("packed.tar", b"what"), data="packed"
    ),
    ".tar compressed": folder_row("not a whole, uncompressed .tar", packed("w:gz"), data="packed"),
    ".tar cut short": folder_row("packed.tar: ", packed(keep=0.4), data="packed"),
    ".tar with a link": folder_row("a link or special file", packed(link=True), data="packed"),
    ".tar that is not the one of SHA256SUMS": folder_row(
        "its SHA-256 is not the one in SHA256SUMS",
        packed(),
        write("SHA256SUMS", b"0" * 64 + b"  packed.tar\n"),
        data="packed",
    ),
    "someone else's folder at data/": Row(
        "prepare --dataset pets", "exists and is no prepared folder", remove("data/pets/meta.json")
    ),
    # files of the project that are damaged, of another version or of another training
    "prepared by another version": Row(
        f"train {CELL}",
        "not written by this version of `nemo prepare`",
        edit("data/pets/meta.json", extra=1),
    ),
    "prepared images damaged": Row(
        f"train {CELL}",
        "not the arrays that meta.json describes",
        cut("data/pets/arrays.safetensors"),
    ),
    "weights cut short": Row(
        f"masks {CELL}", "train: damaged, or of other code", cut(f"{RUN}/train/weights.safetensors")
    ),
    "cell of another shape": Row(
        f"masks {CELL}",
        "train: damaged, or of other code",
        edit(f"{RUN}/train/cell.json", shape={"width": 0.125}),
    ),
    "cell that is no JSON": Row(
        f"masks {CELL}", "cell.json: damaged", write(f"{RUN}/train/cell.json", b"{")
    ),
    "masks of other weights": Row(
        f"decompose {CELL} --subset all",
        "class masks of other weights; run `nemo masks` again",
        edit(f"{RUN}/masks/metrics.json", parent_sha256="0"),
    ),
    "masks cut short": Row(
        f"decompose {CELL} --subset all",
        "masks.safetensors: damaged",
        cut(f"{RUN}/masks/masks.safetensors"),
    ),
    "statistics for cuts that are not there": Row(
        f"decompose {CELL} --subset all",
        "batch_norm.safetensors: missing or damaged; run `nemo masks` again",
        edit(f"{RUN}/masks/metrics.json", masks={"batch_norm": True}),
    ),
    "statistics for cuts that are something else": Row(
        f"decompose {CELL} --subset all",
        "batch_norm.safetensors: missing or damaged; run `nemo masks` again",
        other_statistics,
    ),
    "module of other weights": Row(
        f"evaluate {CELL}",
        "a module of other weights; run `nemo decompose` again",
        lambda root: shutil.copytree(
            root / "foreign", root / f"{RUN}/modules/cat+dog", dirs_exist_ok=True
        ),
    ),
    "result that is no JSON": Row("report", f"{RESULT} is not JSON; `dvc rep", write(RESULT, b"{")),
    "result of another version": Row(
        "report", f"{RESULT} holds no results of format 1; `dvc repro`", write(RESULT, b'{"a": 1}')
    ),
    "result without modules": Row(
        "report", f"{RESULT} is damaged (cell: Field req", write(RESULT, b'{"format": 1}')
    ),
    "result with a word for a number": Row(
        "report",
        f"{RESULT} is damaged (subsets.cat+dog.float: Input should be a valid number); `dvc repro`",
        all_of(evaluated, edit(RESULT, subsets={"cat+dog": "good"})),
    ),
    "result with a word for a number, to be published": Row(
        "publish",
        f"{RESULT} is damaged (metrics.accuracy.float: Input should be a valid number); ",
        all_of(evaluated, edit(RESULT, metrics={"accuracy": "good"})),
    ),
    "result without epochs": Row(
        "publish",
        f"{RESULT} is damaged (history.0: Value error, no epoch); `dvc repro` makes it",
        all_of(evaluated, edit(RESULT, history=[{"loss": 1.0}])),
    ),
    "times that are damaged": Row(
        "report",
        "results/tiny/times/pets/resnet18-0.json is damaged (training: Field required); `python",
        all_of(evaluated, write("results/tiny/times/pets/resnet18-0.json", b"{}")),
    ),
    "result of other params": Row(
        "report",
        f"{RESULT}: made with loss.tau 0.2, and params have 0.5; `dvc repro` makes it anew",
        all_of(evaluated, params("loss.tau", 0.5)),
    ),
    "result of other params, to be published": Row(
        "publish",
        f"{RESULT}: made with finetune.epochs 1, and params have 2; `dvc repro` makes it anew",
        all_of(evaluated, params("finetune.epochs", 2)),
    ),
    "result of another cell": Row(
        "report",
        f"{RESULT}: is the file of pets/resnet18/nemo-1; `dvc repro` makes it anew",
        all_of(
            evaluated,
            edit(
                RESULT, cell={"dataset": "pets", "model": "resnet18", "method": "nemo", "seed": 1}
            ),
        ),
    ),
    "someone else's folder at reports/": Row(
        "report",
        "holds files and is no report",
        all_of(evaluated, write("reports/tiny/thesis.tex")),
    ),
    # modules as files
    "no module": Row("inspect nope", "nope: cannot read"),
    "module of another version": Row(
        f"inspect {MODULE}",
        "version 99, this nemo reads versions 1 and 2",
        edit(f"{MODULE}/module.json", version=99),
    ),
    "module that was edited": Row(
        f"inspect {MODULE}",
        "module.json has been changed since it was written",
        edit(f"{MODULE}/module.json", classes=[1, 0]),
    ),
    "module cut short": Row(
        f"inspect {MODULE}", "module.json is not JSON", cut(f"{MODULE}/module.json")
    ),
    "weights of another module": Row(
        f"predict {MODULE} pets/cat/0.png",
        "is not the file that module.json was written with",
        cut(f"{MODULE}/module.safetensors"),
    ),
    "no image": Row(f"predict {MODULE} nope.png", "nope.png: No such file"),
    "image that is none": Row(f"predict {MODULE} params.yaml", "params.yaml: damaged, or in no"),
    "no preprocessing": Row(
        "predict foreign pets/cat/0.png", "does not say how images are prepared"
    ),
    "export format": Row(f"export {MODULE} --to tflite", "unknown format 'tflite'; accepted: onnx"),
    "export to another ending": Row(
        f"export {MODULE} --to pt2 --out a.onnx", "does not end in .pt2"
    ),
    "export into no folder": Row(f"export {MODULE} --to pt2 --out a/b.pt2", "a is not a folder"),
    # merging
    "merge with itself": Row(
        f"merge {MODULE} {MODULE} --data pets --out new", "both modules have the classes cat, dog"
    ),
    "merge with nothing": Row(f"merge {MODULE} nope --data pets --out new", "nope: cannot read"),
    "merge without images": Row(f"merge {MODULE} {OTHER} --data nope --out new", "no such folder"),
    "merge on other images": Row(
        f"merge {MODULE} {OTHER} --data digits --out new", "digits: no class 'cat', which a module"
    ),
    "merge over a folder": Row(f"merge {MODULE} {OTHER} --data pets --out pets", "pets: exists"),
    "merge without any preprocessing": Row(
        "merge foreign stranger --data pets --out new", "does not say how images are prepared"
    ),
    "merge without one's preprocessing": Row(
        f"merge {MODULE} foreign --data pets --out new", "only one module says how images are"
    ),
    # a model of one's own
    "own unknown model": Row(
        "modularize --model vgg17 --data pets --out new", "unknown model 'vgg17'; accepted: simcnn"
    ),
    "own images nowhere": Row(
        "modularize --model resnet18 --data nope --out new",
        "nope: no such folder or .tar; accepted",
    ),
    "own unknown class": own("--classes cat+cow", "'cow' is no class; accepted:"),
    "own single class": own("--classes cat", "'cat' is one class; accepted:"),
    "own existing out": Row(f"{OWN} --out pets", "pets: exists; name another folder or remove it"),
    "own out below a file": Row(f"{OWN} --out pets/cat/0.png/a", "cannot be made in"),
    "own work is a file": own("--work params.yaml", "--work: params.yaml is a file"),
    "own unknown shape": own("--shape depth=3", "depth: unknown key; accepted:"),
    "own shape without a value": own("--shape wide", "--shape wide: accepted: KEY"),
    "own shape that is no YAML": own("--shape width=[", "accepted: KEY=VALUE"),
    "own pretrained": own("--pretrained", "pretrained: unknown key; accepted:"),
    "own threshold": own("--threshold 1.5", "--threshold: input should be less"),
    "own tau": own("--tau nan", "--tau: input should be a finite number, got nan"),
    "own alpha": own("--alpha -1", "--alpha: input should be greater than or"),
    "own device": own("--device tpu", "--device: string should match"),
}
USAGE = {
    "no command of that name": ("trian", "No such command 'trian'"),
    "missing option": ("train --model resnet18", "Missing option '--dataset'"),
    "unknown option": (f"train {CELL} --epochs 3", "No such option"),
    "seed that is no number": (f"train {CELL} --seed one", "'one' is not a valid integer range"),
    "tau zero by hand": (f"{OWN} --out new --tau 0", "0 is not in the range x>0"),
    "modularize without out": (OWN, "Missing option '--out'"),
}
# run as DVC runs them: in a process of their own
PROCESSES = ("tau zero", "not trained", "prepared images damaged", "training diverges")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    return root


def make_project(root: Path) -> None:
    """A finished project of four classes, evaluated and reported on by nobody yet."""
    images("pets", dict.fromkeys(["cat", "dog", "owl", "pig"], 10))(root)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    cuts = [
        f"{c} {CELL} --subset {s}" for s in PARAMS["subsets"] for c in ("decompose", "finetune")
    ]
    for command in (
        "prepare --dataset pets",
        f"train {CELL} --method standard",
        f"train {CELL}",
        f"masks {CELL}",
        *cuts,
    ):
        result = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    nemo.save(nemo.decompose(tiny(), {}, [2, 3]), root / "foreign")
    nemo.save(nemo.decompose(tiny(), {}, [0, 1]), root / "stranger")
    patch.undo()


@pytest.fixture
def copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    shutil.copytree(project, root)
    monkeypatch.chdir(root)
    return root


def tiny(seed: int = 0, size: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet18", 4, size, CnnShape(width=0.0625)).eval()


def files(root: Path) -> dict[str, str]:
    """Every file, with a digest of what it holds."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def check(root: Path, before: dict[str, str], code: int, stderr: str, message: str) -> None:
    assert code == 1, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("nemo: ")
    assert message in line
    assert files(root) == before


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_one_line_and_leaves_nothing(name: str, copy: Path) -> None:
    row = ROWS[name]
    row.spoil(copy)
    before, begin = files(copy), time.process_time()
    result = CliRunner().invoke(cli, row.command.split())
    assert time.process_time() - begin < SECONDS
    check(copy, before, result.exit_code, result.stderr, row.message)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_damaged_result_of_another_profile_is_nobodys_business(copy: Path) -> None:
    write("results/other/pets/resnet18/nemo-0.json", b"{")(copy)
    for command in (f"evaluate {CELL}", "report"):
        result = CliRunner().invoke(cli, command.split())
        assert result.exit_code == 0, result.output
    assert (copy / "results/other/pets/resnet18/nemo-0.json").read_bytes() == b"{"


@pytest.mark.parametrize("name", USAGE)
def test_a_command_that_is_not_well_formed_is_a_usage_error(name: str, copy: Path) -> None:
    command, message = USAGE[name]
    before = files(copy)
    result = CliRunner().invoke(cli, command.split())
    assert result.exit_code == 2
    usage, *_, line = result.stderr.splitlines()
    assert usage.startswith("Usage: ")
    assert line.startswith("Error: ")
    assert message in line
    assert files(copy) == before


@pytest.fixture(scope="module")
def imports() -> float:
    """Seconds of CPU time: 2 on one machine of CI, 4 on another."""
    return child("import torch")[0]


@pytest.mark.parametrize("name", PROCESSES)
def test_the_same_in_a_process_of_its_own(name: str, imports: float, copy: Path) -> None:
    row = ROWS[name]
    row.spoil(copy)
    before = files(copy)
    spent, done = child("from nemo.cli import main; main()", *row.command.split())
    assert spent < imports + SECONDS * (1 + ("train" in row.command))
    check(copy, before, done.returncode, done.stderr, row.message)


def child(code: str, *args: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A Python process's seconds of CPU time, and how it ended."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime, done


# The API


class Branching(nn.Module):
    """What torch.export cannot trace."""

    input_size = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return (self.second(x) if x.sum() > 0 else self.second(-x)).mean((2, 3))


def loader(labels: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.zeros(len(labels), 3, 16, 16), torch.tensor(labels))]


def module(classes: list[int], size: int = 16) -> DecomposedModule:
    return nemo.decompose(tiny(size=size), {}, classes)


def first_layer(mask: object) -> dict[str, object]:
    return {next(iter(nemo.modularize(tiny()).layers)): mask}


def all_ones() -> ClassMasks:
    return ClassMasks({"l": torch.ones(4, 3, dtype=torch.bool)}, {})


def diverging(task: Task) -> None:
    """Three epochs of a training whose weights are too large from the first step on."""
    network = tiny() if task.penalty is None else nemo.modularize(tiny())
    split = Split(torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 4)
    batches = Batches(split, (0.5,) * 3, (0.25,) * 3, 4, shuffle=True)
    plan = Plan(3, "sgd", 1e30, 0.0, 0.0, 3)
    fit(network, task, batches, plan, device=torch.device("cpu"), validate=dict)


def one_image() -> None:
    split = Split(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    Batches(split, (0.5,) * 3, (0.25,) * 3, 8, shuffle=True)


def moved_checkpoint() -> None:
    """One of other params, at the place of this one."""
    root = Path("checkpoints")
    folders = []
    for tau in (0.2, 0.5):
        with open_checkpoint({"tau": tau}, root, keep=True) as checkpoint:
            checkpoint.save({})
        folders.append(checkpoint.folder)
    shutil.rmtree(folders[1])
    folders[0].rename(folders[1])
    try:
        with open_checkpoint({"tau": 0.5}, root):
            pass
    finally:
        shutil.rmtree(root)


def damaged_checkpoint() -> None:
    folder = Path("checkpoint")
    folder.mkdir()
    (folder / "last.pt").write_bytes(b"what")
    try:
        Checkpoint(folder).load(torch.device("cpu"))
    finally:
        shutil.rmtree(folder)


def save_onto_a_file() -> None:
    with tempfile.NamedTemporaryFile() as file:
        nemo.save(module([0]), file.name)


API: dict[str, tuple[Callable[[], object], str]] = {
    "a model that cannot be traced": (
        lambda: nemo.decompose(Branching(), {}),
        "the model cannot be traced: it decides by the values of a tensor",
    ),
    "a model without layers": (
        lambda: nemo.modularize(nn.Sequential(nn.Conv2d(3, 4, 3))),
        "the model has no layer to mask",
    ),
    "a mask of the wrong length": (
        lambda: nemo.decompose(tiny(), first_layer(torch.ones(3, dtype=torch.bool))),
        "(4,), got (3,)",
    ),
    "a mask of floats": (
        lambda: nemo.decompose(tiny(), first_layer(torch.ones(4))),
        "must be a bool tensor, got torch",
    ),
    "a mask that is a list": (
        lambda: nemo.decompose(tiny(), first_layer([True] * 4)),
        "must be a bool tensor, got list",
    ),
    "a mask of no layer": (
        lambda: nemo.decompose(tiny(), {"conv9": torch.ones(4)}),
        "no layer called 'conv9'",
    ),
    "a class that does not exist": (
        lambda: module([7]),
        "classes must be distinct, at least one, in",
    ),
    "no classes": (lambda: module([]), "classes must be distinct, at least one, in 0..3, got []"),
    "a class below zero": (lambda: module([-1]), "distinct, at least one, in 0..3, got [-1]"),
    "a class twice": (lambda: module([1, 1]), "classes must be distinct, at least one, in 0..3"),
    "masks of a class that does not exist": (
        lambda: all_ones().select([4]),
        "no masks of class 4; accepted: 0..3",
    ),
    "masks of no classes": (lambda: all_ones().select([]), "distinct and at least one, got []"),
    "masks of a class by its name": (
        lambda: all_ones().select(["cat"]),
        "classes: ['cat']; accepted: positions, such as [3, 5]",
    ),
    "masks of half a class": (lambda: all_ones().select([3.7]), "classes: [3.7]; accepted: pos"),
    "masks of classes in a text": (lambda: all_ones().select("13"), "classes: '13'; accepted: pos"),
    "masks of a truth": (lambda: all_ones().select([True]), "classes: [True]; accepted: pos"),
    "a module of classes in a text": (lambda: module("13"), "classes: '13'; accepted: positions"),
    "a module of half a class": (lambda: module([1.5]), "classes: [1.5]; accepted: positions"),
    "a tolerance below zero": (
        lambda: nemo.decompose(Branching(), {}, tolerance=-1),
        "tolerance: -1; accepted: a number, 0 or above",
    ),
    "a tolerance that is no number": (
        lambda: nemo.decompose(Branching(), {}, tolerance=float("nan")),
        "tolerance: nan; accepted: a number, 0 or above",
    ),
    "a tolerance as text": (
        lambda: nemo.decompose(Branching(), {}, tolerance="1e-9"),
        "tolerance: '1e-9'; accepted: a number, 0 or above",
    ),
    "masks in a list": (lambda: nemo.decompose(tiny(), [1]), "masks: a list; accepted: {layer: "),
    "a mask of numpy": (
        lambda: nemo.decompose(tiny(), first_layer(np.ones(4, dtype=bool))),
        "must be a bool tensor, got ndarray",
    ),
    "class masks of a plain network": (
        lambda: nemo.class_masks(tiny(), loader([0, 1])),
        "accepted: what nemo.modularize returns",
    ),
    "a plain network made smaller": (
        lambda: nemo.shrink(tiny(), loader([0, 1]), [0], keep=0.5),
        "accepted: what nemo.modularize returns",
    ),
    "merging a plain network": (
        lambda: nemo.merge(module([0, 1]), tiny(), loader([0, 2])),
        "cannot be merged; accepted: what nemo.decompose returns",
    ),
    "class masks of images alone": (
        lambda: nemo.class_masks(nemo.modularize(tiny()), [torch.ones(2, 3, 16, 16)]),
        "a batch is a Tensor; accepted: a pair (inputs, labels)",
    ),
    "importance of images and more": (
        lambda: nemo.class_masks(nemo.modularize(tiny()), [(1, 2, 3)], selector="taylor", keep=0.5),
        "a batch is a tuple of 3; accepted: a pair (inputs, labels)",
    ),
    "contrastive loss of logits": (
        lambda: nemo.contrastive_loss(torch.ones(2, 3), torch.arange(2), 0.2),
        "masks: a Tensor; accepted: {layer: (B, N_l)}, of (logits, masks)",
    ),
    "contrastive loss of logits and masks": (
        lambda: nemo.contrastive_loss((torch.ones(2, 3), {}), torch.arange(2), 0.2),
        "masks: a tuple; accepted: {layer: (B, N_l)}, of (logits, masks)",
    ),
    "a modular model made modular": (
        lambda: nemo.modularize(nemo.modularize(tiny())),
        "the model is modular already",
    ),
    "what is no model": (
        lambda: nemo.modularize("resnet18"),
        "the model is a str; accepted: a torch",
    ),
    "a model without parameters": (
        lambda: nemo.modularize(torch.nn.ReLU()),
        "no layer to mask (it has no parameters)",
    ),
    "saving what is no module": (
        lambda: nemo.save(tiny(), "here"),
        "cannot be saved here; accepted: what nemo.decompose returns",
    ),
    "saving onto a file": (save_onto_a_file, "is a file; accepted: a folder, which may be new"),
    "masks of a class twice": (lambda: all_ones().select([1, 1]), "distinct and at least one, got"),
    "class masks of no images": (
        lambda: nemo.class_masks(nemo.modularize(tiny()), []),
        "the loader gave no batches",
    ),
    "class masks of a class without images": (
        lambda: nemo.class_masks(nemo.modularize(tiny()), loader([0, 2])),
        "no sample of class(es) [1]",
    ),
    "class masks of threshold zero": (
        lambda: nemo.class_masks(nemo.modularize(tiny()), loader([0, 1]), 0.0),
        "frequency: threshold: input should be greater than 0; its settings: threshold",
    ),
    "contrastive loss with tau zero": (
        lambda: nemo.contrastive_loss({"l": torch.ones(2, 3)}, torch.arange(2), 0.0),
        "tau must be above",
    ),
    "contrastive loss of no masks": (
        lambda: nemo.contrastive_loss({}, torch.arange(2), 0.2),
        "masks",
    ),
    "contrastive loss of other labels": (
        lambda: nemo.contrastive_loss({"l": torch.ones(2, 3)}, torch.arange(3), 0.2),
        "expected (3, N_l), one row per label",
    ),
    "a batch with one sample": (
        one_image,
        "1 images in batches of 8: accepted: 2 or more of each when shuffling",
    ),
    "merging modules of two dtypes": (
        lambda: nemo.merge(module([0, 1]), module([2, 3]).double(), loader([0, 2])),
        "the modules compute in float32 and float64; accepted: one dtype",
    ),
    "merging modules of two sizes": (
        lambda: nemo.merge(module([0, 1]), module([2, 3], 32), loader([0, 2])),
        "accepted: one size",
    ),
    "merging on no images": (
        lambda: nemo.merge(module([0, 1]), module([2, 3]), []),
        "the loader gave no batches",
    ),
    "merging on one module's classes": (
        lambda: nemo.merge(module([0, 1]), module([2, 3]), loader([0, 1])),
        "labels must lie in 0..3",
    ),
    "a GPU that is not there": (lambda: resolve_device("cuda:7"), "cuda:7 is not available here"),
    "a patch that does not divide": (
        lambda: build_model("vit_small", 4, 18),
        "patch 4 must divide",
    ),
    "a checkpoint of other params": (
        moved_checkpoint,
        "a checkpoint of other params or other code",
    ),
    "a damaged checkpoint": (
        damaged_checkpoint,
        "last.pt: damaged; remove it to train from the start",
    ),
    "standard training diverges": (
        lambda: diverging(Task(cross_entropy)),
        "loss, task is not finite; try a smaller lr",
    ),
    "NeMo's training diverges": (
        lambda: diverging(Task(cross_entropy, nemo_penalty(1.0, 0.2), OBJECTIVES["nemo"].remedy)),
        "try a smaller lr, a smaller loss.alpha or a larger loss.tau",
    ),
    "MwT's training diverges": (
        lambda: diverging(Task(cross_entropy, mwt_penalty(1.0, 1.0), OBJECTIVES["mwt"].remedy)),
        "try a smaller lr or smaller mwt.alpha and mwt.beta",
    ),
}


@pytest.mark.parametrize("name", API)
def test_a_call_that_cannot_work_says_why(name, tmp_path, monkeypatch):
    call, message = API[name]
    monkeypatch.chdir(tmp_path)
    begin = time.process_time()
    with pytest.raises((ValueError, ArithmeticError)) as caught:
        call()
    assert time.process_time() - begin < SECONDS
    (line,) = str(caught.value).splitlines()
    assert message in line
    assert files(tmp_path) == {}


def test_there_are_at_least_sixty_and_as_many_as_the_documentation_says():
    assert len(ROWS) + len(USAGE) + len(API) >= 60
    text = (ROOT / "docs/reliability.md").read_text()
    for table, what in ((ROWS, "commands"), (USAGE, "commands"), (API, "calls")):
        assert f"| {len(table)} {what} |" in text

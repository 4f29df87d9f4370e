"""Mistakes of the command line, a row each: what is spoilt, the command, what its error says."""

import shutil
from dataclasses import dataclass

from tests.bad_input.project import (
    BOTH,
    CELL,
    MODULE,
    OTHER,
    OWN,
    REMOVE,
    RESULT,
    RUN,
    Spoil,
    all_of,
    cut,
    edit,
    evaluated,
    images,
    linked,
    nothing,
    other_statistics,
    packed,
    params,
    picture,
    remove,
    write,
)
from tests.test_config import DEFAULT


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
    "device": param_row(
        "device", "tpu", "device: unknown device 'tpu'; accepted: auto, cpu, mps, cuda, cuda:N"
    ),
    "device that is a number": param_row("device", 0, "device: unknown device 0; accepted: auto,"),
    "profile": param_row("profile", "../x", "profile: string should match pattern"),
    "empty params": Row("prepare --dataset pets", "got NoneType", write("params.yaml")),
    "no YAML": Row("prepare --dataset pets", "not YAML", write("params.yaml", b"a: [")),
    "no mapping": Row("prepare --dataset pets", "a mapping of keys", write("params.yaml", b"- 1")),
    "no text": Row("prepare --dataset pets", "not UTF-8 text", write("params.yaml", b"\xff\xfe")),
    "no params": Row("prepare --dataset pets", "No such file", remove("params.yaml")),
    "someone else's folder at plan/": Row(
        "plan --out pets", "--out: pets exists and is no plan; name another folder, or remove it"
    ),
    "someone else's files beside those of a plan": Row(
        "plan",
        "--out: plan exists and is no plan",
        all_of(write("plan/report.json", b"{}"), write("plan/thesis.tex")),
    ),
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
        ["cat dog"],
        "accepted: all, file:PATH, random:2@0, or joined by +: ranges such as 0-3, and 0 cat",
    ),
    "subset twice": param_row(
        "subsets", ["all", "all"], "subsets: ['all', 'all'] names something twice"
    ),
    "subsets that are numbers": param_row(
        "subsets", [3, 5], "subsets: [3, 5]; accepted: names in quotes, such as ['0+1', all]"
    ),
    "subset without a list": param_row("subsets", "all", "subsets: 'all'; accepted: names in quo"),
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
    "one class, to be cut": Row(
        f"decompose {CELL} --subset owl", "--subset: 'owl' is one class; accepted: two or more"
    ),
    "one class, to be fine-tuned": Row(
        f"finetune {CELL} --subset 3", "--subset: '3' is one class; accepted: two or more"
    ),
    # names and order of the stages
    "unknown data set": Row("prepare --dataset mnist", "'mnist' is not in data; accepted: other"),
    "unknown model": Row("train --dataset pets --model vgg17", "unknown model 'vgg17'; accepted:"),
    "model without a shape, by hand": Row(
        "train --dataset pets --model vgg16", "architecture.vgg16: missing; {} is the paper's shape"
    ),
    "not prepared": Row(f"train {CELL}", "`nemo prepare`", remove("data/pets")),
    "not trained": Row(f"masks {CELL} --seed 5", "run `nemo train` first"),
    "no masks": Row(
        f"decompose {CELL} --subset all", "run `nemo masks` first", remove(f"{RUN}/masks")
    ),
    "not cut": Row(
        f"finetune {CELL} --subset all", "modules/all: no module here; run `nemo decompose` first"
    ),
    "not fine-tuned": Row(f"evaluate {CELL}", "run `nemo finetune` first", remove(MODULE)),
    "not measured": Row(
        f"evaluate {CELL}",
        f"{RUN}/gap/rows.json: No such file or directory; run `nemo gap` first",
        params("gap.of", ["nemo"]),
    ),
    "no history of the fine-tuning": Row(
        f"evaluate {CELL}",
        "finetuned/cat+dog/history.csv: No such file or directory; run `nemo finetune` first",
        remove(f"{MODULE}/history.csv"),
    ),
    "no masks to evaluate": Row(
        f"evaluate {CELL}",
        "masks/metrics.json: No such file or directory; run `nemo masks` first",
        remove(f"{RUN}/masks"),
    ),
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
        "predict foreign pets/cat/0.png",
        'does not say how images are prepared for it; accepted: those saved with {"preprocessing"',
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
    "own shape twice": own("--shape width=0.5", "--shape width=0.5: width is given twice"),
    "own shape that is no YAML": own("--shape width=[", "accepted: KEY=VALUE"),
    "own pretrained": own("--pretrained", "pretrained: unknown key; accepted:"),
    "own threshold": own("--threshold 1.5", "--threshold: input should be less"),
    "own tau": own("--tau nan", "--tau: input should be a finite number, got nan"),
    "own alpha": own("--alpha -1", "--alpha: input should be greater than or"),
    "own device": own("--device tpu", "--device: unknown device 'tpu'; accepted: auto,"),
}
USAGE = {
    "no command of that name": ("trian", "No such command 'trian'"),
    "missing option": ("train --model resnet18", "Missing option '--dataset'"),
    "unknown option": (f"train {CELL} --epochs 3", "No such option"),
    "seed that is no number": (f"train {CELL} --seed one", "'one' is not a valid integer range"),
    "tau zero by hand": (f"{OWN} --out new --tau 0", "0 is not in the range x>0"),
    "modularize without out": (OWN, "Missing option '--out'"),
}

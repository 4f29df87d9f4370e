"""Mistakes in Python, a row each: a call that raises one line, and leaves no file."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nemo
from nemo.cut import DecomposedModule
from nemo.data import Batches, Split
from nemo.device import resolve_device
from nemo.masking.class_masks import ClassMasks
from nemo.masking.objectives import OBJECTIVES
from nemo.models import build_model
from nemo.training.checkpoint import Checkpoint, open_checkpoint
from nemo.training.fit import Plan, fit
from nemo.training.tasks import Task, cross_entropy
from tests.bad_input.project import ROOT, SECONDS, files, tiny
from tests.training.test_tasks import mwt_penalty, nemo_penalty


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
    "a device of no kind": (
        lambda: resolve_device("gpu"),
        "device: unknown device 'gpu'; accepted: auto, cpu, mps, cuda, cuda:N",
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


def test_there_are_as_many_as_the_documentation_says():
    assert f"| {len(API)} calls |" in (ROOT / "docs/reliability.md").read_text()

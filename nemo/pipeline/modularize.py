"""Bring your own model: from a model, images and a class subset to a fine-tuned module (ours).

What the pipeline's stages do, one after the other and without DVC. The prepared images and the
trained parent stay in a work folder, so that another module of the same parent costs no training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params, check_params, check_subset_name
from nemo.data import Batches, DataError, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.fields import ParamsError
from nemo.files import new_folder, read_csv
from nemo.masking.generators import Modular, modularize
from nemo.models import build_model
from nemo.models.factory import is_factory, register_factory
from nemo.models.registry import TIMM, check_model_name
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import load, save
from nemo.pipeline import decompose, finetune, masks
from nemo.pipeline.existing import load_weights
from nemo.predict import accuracy, guess_accuracy, predict
from nemo.recipe import recipe
from nemo.sections import SOURCES
from nemo.trained import load_cell
from nemo.training.cell import idle, train_cell

Say = Callable[[str], object]
METHOD = "nemo"


def defaults() -> dict[str, Any]:
    """The sections of params that options may change, as they are without any."""
    text = files("nemo").joinpath("defaults.yaml").read_text(encoding="utf-8")
    sections: dict[str, Any] = yaml.safe_load(text)
    return sections


def _silent(line: str) -> None:
    """Say nothing."""


def architecture(
    model: str, shape: Mapping[str, Any], pretrained: bool = False
) -> tuple[str, dict[str, Any]]:
    """The name of a model in params, and its section there.

    Args:
        model: a model's name, or `package.module:function`, which is registered.
        shape: of our models their own keys; else arguments of timm, or of the function.

    Raises:
        ValueError: an unknown model, or what the function raises.
    """
    if is_factory(model):
        model, section = register_factory(model, shape)
        return model, section.model_dump()
    try:
        check_model_name(model)
    except ValueError as error:
        raise ValueError(f"{error}, package.module:function") from None
    if model.startswith(TIMM):
        return model, {"pretrained": pretrained, "arguments": dict(shape) or None}
    return model, {**shape, **({"pretrained": True} if pretrained else {})}


def own_params(
    model: str,
    source: str,
    subset: str,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Params:
    """Checked params of one model, one data set and one subset.

    Args:
        source: as in `data.NAME.source`, or the path of an image folder or .tar.
        seed: of the training; the images are split alike for all of them.
        changes: values by dotted key, such as `loss.tau` or `data.size`; None leaves the default.

    Raises:
        ValueError: an unknown model, or a value that is not accepted.
    """
    check_model_name(model)
    name, source = data_source(source)
    raw: dict[str, Any] = {
        "profile": "own", "datasets": [name], "models": [model], "methods": [STANDARD, METHOD],
        "subsets": _named(subset), "seeds": [seed], "data": {"source": source},
        "architecture": {}, **defaults(),
    }  # fmt: skip
    for key, value in (changes or {}).items():
        if value is not None:
            section, _, leaf = key.rpartition(".")
            target = raw[section] if section else raw
            target[leaf] = value
    raw["data"] = {name: raw["data"]}
    raw["architecture"] = {model: raw["architecture"]}
    return check_params(raw, "options")


def _named(subset: str) -> dict[str, str]:
    """The subset, by a name that a folder can have."""
    try:
        check_subset_name(subset)
    except ParamsError:
        digest = hashlib.sha256(subset.encode()).hexdigest()[:8]
        return {f"classes-{digest}": subset}
    return {subset: subset}


def data_source(source: str) -> tuple[str, str]:
    """A name for the data, and its source; what is none of the known sources is a path."""
    if source in SOURCES[:-1]:
        return source, source
    path = Path(source.removeprefix("folder:"))
    name = re.sub(r"[^A-Za-z0-9]+", "-", path.resolve().name.removesuffix(".tar")).strip("-")
    return name or "images", f"folder:{path}"


def cell_of(params: Params) -> Cell:
    return Cell(params.datasets[0], params.models[0], METHOD, params.seeds[0])


def own_model(params: Params, data: Prepared, weights: Path | None = None) -> Modular:
    """The modular model that training begins with; downloads pretrained weights where asked for.

    Args:
        weights: a file of the model's weights, which is then trained already.

    Raises:
        ValueError: the model does not take images of this size, has no layer to mask, or its
            weights cannot be had.
    """
    cell, size = cell_of(params), data.size[0]
    torch.manual_seed(cell.seed)
    try:
        shape = params.architecture.of(cell.model)
        model = build_model(cell.model, len(data.classes), size, shape)
        if weights is not None:
            load_weights(model, weights)
        return modularize(model)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{cell.model}: no pretrained weights here ({reason})") from error
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{cell.model} on {size} x {size} images: {reason}") from error


def train_parent(params: Params, data: Prepared, work: Path, say: Say = _silent) -> Layout:
    """Train the parent, unless the same training has ended in the folder `work` before.

    Returns:
        Where it is: a folder in `work` named after everything that decides the result.
    """
    cell = cell_of(params)
    decides = {
        **(recipe(params, cell, "train") or {}),
        "cell": cell.name,
        "device": params.device,
        "data": [data.sha256, data.flip, data.crop],
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    layout = Layout(work / key, images=work)
    if layout.train(cell).is_dir():
        say(f"the parent is in {layout.root} already")
    else:
        say(f"training the parent in {layout.root}")
        train_cell(params, cell, data, layout.train(cell))
    for line in idle(read_csv(layout.train(cell) / "history.csv")):
        say(f"warning: {line}")
    return layout


def make_module(
    params: Params,
    data: Prepared,
    layout: Layout,
    out: Path,
    say: Say = _silent,
    *,
    tune: bool = True,
) -> DecomposedModule:
    """Cut the module out of the parent in `layout`, fine-tune it, measure it, and save it to `out`.

    `info["test_accuracy"]` of the module holds top-1 accuracies on the test images, in [0, 1]: of
    the parent with its soft masks on `all` its classes and on those of the `subset`, of the module
    `as_cut` and `finetuned`; and of always saying the most frequent of its classes, `one_class`.

    Args:
        tune: False saves the module as cut.
    """
    cell, (subset, text) = cell_of(params), next(iter(params.subsets.items()))
    classes, device = parse_subset(text, data.classes), resolve_device(params.device)
    say("finding the neurons of each class")
    masks.run(params, cell, layout)
    say(f"cutting {subset}")
    decompose.run(params, cell, subset, layout)
    test = Batches(data.splits["test"], data.mean, data.std, 256, device=device)
    parent = predict(load_cell(layout.train(cell)).to(device), test)
    own = data.restrict(classes).splits["test"]
    test = Batches(own, data.mean, data.std, 256, device=device)
    module = load(layout.module(cell, subset))
    measured = {
        "all": accuracy(*parent),
        "subset": accuracy(*parent, classes=classes),
        "as_cut": accuracy(*predict(module.to(device), test)),
        "one_class": guess_accuracy(own.labels),
    }
    if tune:
        say(f"fine-tuning {subset}")
        finetune.run(params, cell, subset, layout)
        module = load(layout.finetuned(cell, subset))
        measured["finetuned"] = accuracy(*predict(module.to(device), test))
    module.info["test_accuracy"] = measured
    with new_folder(out) as folder:
        save(module, folder)
    return module.cpu()


def check_new(out: Path) -> None:
    """Raise DataError unless nothing is at `out` yet, and a folder can be made there."""
    if os.path.lexists(out):
        raise DataError(f"{out}: exists; name another folder or remove it")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise DataError(f"{out}: cannot be made in {parent}")

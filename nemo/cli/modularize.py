"""Commands that need no params file: a module of one's own model, and two modules as one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from nemo.cli.modules import card, show

if TYPE_CHECKING:
    from nemo.config import Params
    from nemo.data import Prepared

_DEFAULTS = yaml.safe_load(files("nemo").joinpath("defaults.yaml").read_text(encoding="utf-8"))
_count = click.IntRange(min=1)
_positive = click.FloatRange(min=0, min_open=True)
_data = click.option(
    "--data", "source", required=True, help="An image folder or .tar, digits, cifar10, svhn, ..."
)


def _tuned(name: str, kind: Any, text: str, key: str) -> Callable[..., Any]:
    """An option that changes the params' `key`; its default is the one in defaults.yaml."""
    section, leaf = key.split(".")
    value = _DEFAULTS[section][leaf]
    shown = (
        f"{value['cnn']}, a Transformer {value['transformer']}"
        if isinstance(value, dict)
        else str(value)
    )
    TUNED[key] = name.removeprefix("--").replace("-", "_")
    return click.option(name, type=kind, help=text, show_default=shown)


TUNED: dict[str, str] = {"data.size": "size", "data.flip": "flip", "data.crop": "crop"}
TUNED["device"] = "device"
MEASURED = {  # test accuracies, in `info` of the module
    "all": "parent, all its classes:",
    "subset": "parent, these classes:",
    "as_cut": "module, as cut:",
    "finetuned": "module, fine-tuned:",
}


@click.command()
@click.option("--model", required=True, help="timm/NAME, or one of ours, such as vgg16.")
@_data
@click.option("--classes", default="all", show_default=True, help="all, 0-4, 3+5, cat+dog.")
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for the module.")
@click.option("--pretrained", is_flag=True, help="Start from timm's weights, which it downloads.")
@click.option("--shape", multiple=True, help="Of our models: width=0.25, dim=64; repeatable.")
@click.option("--size", type=int, help="Resize images to this side; by default they keep theirs.")
@click.option("--flip", is_flag=True, help="Augment: mirror half of the images.")
@click.option("--crop", type=click.IntRange(min=0), help="Augment: shift by up to these pixels.")
@_tuned("--epochs", _count, "Of training.", "train.epochs")
@_tuned("--finetune-epochs", _count, "Of fine-tuning.", "finetune.epochs")
@_tuned("--lr", _positive, "Of training.", "train.lr")
@_tuned("--alpha", float, "Weight of the contrastive loss.", "loss.alpha")
@_tuned("--tau", _positive, "Temperature of the contrastive loss.", "loss.tau")
@_tuned(
    "--threshold",
    float,
    "Share of a class's images that must switch a neuron on.",
    "masks.threshold",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda, mps.")
@click.option(
    "--work", type=click.Path(path_type=Path), default="nemo-work", show_default=True,
    help="Keeps the trained parent: its next module needs no training. One run at a time.",
)  # fmt: skip
@click.option("--list-layers", is_flag=True, help="Say what can be cut, and train nothing.")
def modularize(
    model: str,
    source: str,
    classes: str,
    out: Path | None,
    pretrained: bool,
    shape: tuple[str, ...],
    seed: int,
    work: Path,
    list_layers: bool,
    **options: Any,
) -> None:
    """Train your model on your images, and cut and fine-tune the module of some classes."""
    if out is None and not list_layers:
        raise click.UsageError("Missing option '--out'.")
    from nemo.locks import locked
    from nemo.models.shapes import DeitShape
    from nemo.pipeline.modularize import check_new, make_module, own_params, train_parent, untrained
    from nemo.pipeline.rehearsal import coverage, layer_table, rehearse

    changes = {
        "architecture": {**_shape(shape), **({"pretrained": True} if pretrained else {})},
        **{key: options[name] for key, name in TUNED.items()},
    }
    params = own_params(model, source, classes, seed, changes)
    if out is not None:
        check_new(out)
    # another run in this folder may be about to replace the images that this one reads
    with locked(work.with_name(f".{work.name}.lock.partial")):
        data = _prepared(params, work)
        modular = untrained(params, data)
        distilled = isinstance(params.architecture.of(model), DeitShape)
        report = rehearse(modular, data, distilled)
        click.echo("\n".join(coverage(modular, report)))
        if list_layers:
            click.echo("\n".join(layer_table(modular.layers)))
            return
        assert out is not None
        layout = train_parent(params, data, work, click.echo)
        module = make_module(params, data, layout, out, click.echo)
        click.echo("\n".join(layer_table(modular.layers, module.report["layers"])))
        show(card(module))
        for key, what in MEASURED.items():
            click.echo(f"test accuracy of the {what:<24} {module.info['test_accuracy'][key]:.1%}")
        click.echo(f"wrote {out}")


def _shape(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE options as a dict."""
    shape = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        try:
            shape[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found = ""
        if not found:
            raise ValueError(f"--shape {pair}: accepted: KEY=VALUE, such as width=0.25")
    return shape


def _prepared(params: Params, work: Path) -> Prepared:
    """The images, decoded into the work folder once the classes are known to be good."""
    from nemo.cells import Layout
    from nemo.data import check_subsets, load, prepare
    from nemo.device import resolve_device

    resolve_device(params.device)
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work: {work} is a file; accepted: a folder, or a new one")
    ((name, source),) = params.data.items()
    folder = Layout(work).data(name)
    prepare(name, source, folder, check=lambda names: check_subsets(params.subsets, names))
    data = load(folder)
    counts = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    size = " x ".join(map(str, data.size))
    click.echo(f"{data.title}: {len(data.classes)} classes, {counts} images of {size}")
    return data


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@_data
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
def merge(a: Path, b: Path, source: str, out: Path) -> None:
    """Merge the modules in folders A and B, which have no class in common, into one.

    Their logits are calibrated on the data's validation images, and both measured on its test
    images.
    """
    from nemo.data import Batches
    from nemo.files import new_folder
    from nemo.module.files import load, save
    from nemo.module.union import check_mergeable, class_names
    from nemo.module.union import merge as merge_modules
    from nemo.pipeline.modularize import check_new
    from nemo.predict import accuracy, predict

    check_new(out)
    first, second = load(a), load(b)
    names = check_mergeable(first, second)
    if "preprocessing" not in first.info:
        raise ValueError(f"{a}: the module does not say how images are prepared for it")
    data = _images_of(names, source, first.input_size[1])
    how = first.info["preprocessing"]
    validation, test = (
        Batches(data.splits[split], how["mean"], how["std"], 256) for split in ("val", "test")
    )
    module = merge_modules(first, second, validation)
    with new_folder(out) as folder:
        save(module, folder)
    for path, part in zip((a, b), module.info["merged"], strict=True):
        click.echo(f"{path}: logits x {part['scale']:.3f} {part['bias']:+.3f}")
    measured = predict(module, test)
    count = len(class_names(first))
    for what, classes in ((a, range(count)), (b, range(count, len(names))), (out, None)):
        click.echo(f"test accuracy of {what}: {accuracy(*measured, classes=classes):.1%}")
    click.echo(f"wrote {out}")


def _images_of(names: list[str], source: str, size: int) -> Prepared:
    """The images of these classes, labelled in this order."""
    from nemo.data import DataError, load, prepare
    from nemo.pipeline.modularize import data_source
    from nemo.sections import DataSource

    def positions(classes: Sequence[str]) -> list[int]:
        missing = [name for name in names if name not in classes]
        if missing:
            raise DataError(f"{source}: no class {missing[0]!r}, which a module has")
        return [classes.index(name) for name in names]

    name, where = data_source(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        prepare(name, DataSource(source=where, size=size), folder, check=positions)
        data = load(folder)
    return data.restrict(positions(data.classes))


COMMANDS = (modularize, merge)

"""The command that needs no params file: from a model and images to a module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from nemo.cli.modules import card, data_option, show

if TYPE_CHECKING:
    from nemo.config import Params
    from nemo.data import Prepared
    from nemo.module.decomposed import DecomposedModule

_DEFAULTS = yaml.safe_load(files("nemo").joinpath("defaults.yaml").read_text(encoding="utf-8"))
_count = click.IntRange(min=1)
_whole = click.IntRange(min=0)
_positive = click.FloatRange(min=0, min_open=True)
_share = click.FloatRange(min=0, max=1, min_open=True, max_open=True)  # lets nan through


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
TUNED |= {"data.limit": "limit", "device": "device"}
TRAINING = ("epochs", "lr", "alpha", "tau", "warmup", "threshold")  # nothing to a trained model
TRAINED = ("keep", "of", "selector", "mean", "std")  # nothing to one that is not
MEASURED = {  # test accuracies, in `info` of the module
    "all": "parent, all its classes:",
    "subset": "parent, these classes:",
    "as_cut": "module, as cut:",
    "finetuned": "module, fine-tuned:",
    "one_class": "most frequent class alone:",
}


def _channels(context: Any, option: Any, text: str | None) -> tuple[float, ...] | None:
    """A number for each of three channels, or one for all."""
    if text is None:
        return None
    try:
        numbers = tuple(float(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    zero = option.name == "mean"  # a standard deviation of 0 would divide by it
    fits = all(0 < number <= 1 or (number == 0 and zero) for number in numbers)
    if len(numbers) not in (1, 3) or not fits:
        kind = "from 0 to 1" if zero else "above 0, at most 1"
        raise click.BadParameter(f"{text}: accepted: one or three numbers {kind}: 0.5,0.4,0.5")
    return numbers if len(numbers) == 3 else numbers * 3


def _finite(context: Any, option: Any, number: float | None) -> float | None:
    if number is not None and math.isnan(number):
        raise click.BadParameter("nan is not in the range 0<x<1.")
    return number


@click.command()
@click.option(
    "--model",
    required=True,
    help="timm/NAME, one of ours, such as vgg16, or your package.module:function.",
)
@data_option
@click.option(
    "--classes",
    default="all",
    show_default=True,
    help="all, 0-4, 3+5, cat+dog, file:PATH, random:10@3.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder for the module.")
@click.option("--pretrained", is_flag=True, help="Start from timm's weights, which it downloads.")
@click.option(
    "--shape",
    multiple=True,
    help="width=0.25 of ours; arguments of other models, drop_rate=0.1; repeatable.",
)
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Weights of a trained model, safetensors or a state_dict; it is cut without training.",
)
@click.option(
    "--keep",
    type=_share,
    callback=_finite,
    help="With --weights: the module's largest share of the model, such as 0.3.",
)
@click.option(
    "--of",
    type=click.Choice(["parameters", "flops"]),
    help="With --weights: what --keep is a share of.  [default: parameters]",
)
@click.option(
    "--selector",
    type=click.Choice(["taylor", "activation"]),
    help="With --weights: by what a neuron matters to a class.  [default: taylor]",
)
@click.option(
    "--mean",
    callback=_channels,
    help="With --weights: of the pixels, from 0 to 1, as the model was trained; one or three "
    "numbers with commas. 0 for pixels as is.  [default: of the training images]",
)
@click.option("--std", callback=_channels, help="With --mean: likewise; 1 for pixels as is.")
@click.option("--size", type=int, help="Resize images to this side; needed if not square.")
@click.option("--limit", type=_count, help="Training images at most, each class in proportion.")
@click.option("--flip", is_flag=True, help="Augment: mirror half of the images.")
@click.option("--crop", type=_whole, help="Augment: shift by up to these pixels.")
@_tuned("--epochs", _count, "Of training.", "train.epochs")
@_tuned("--finetune-epochs", _whole, "Of fine-tuning; 0: the module as cut.", "finetune.epochs")
@click.option(
    "--cut-pass",
    is_flag=True,
    help="Train it as it will be cut: its modules work without fine-tuning, and the last epochs "
    "take longer.",
)
@_tuned("--lr", _positive, "Of training.", "train.lr")
@_tuned("--alpha", float, "Weight of the contrastive loss.", "loss.alpha")
@_tuned("--tau", _positive, "Temperature of the contrastive loss.", "loss.tau")
@_tuned("--warmup", _count, "Epochs over which the contrastive loss rises.", "loss.warmup")
@_tuned(
    "--threshold",
    float,
    "Share of a class's images that must switch a neuron on.",
    "masks.threshold",
)
@click.option("--seed", type=_whole, default=0, show_default=True)
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
    weights: Path | None,
    seed: int,
    work: Path,
    list_layers: bool,
    cut_pass: bool,
    **options: Any,
) -> None:
    """Train your model on your images, and cut and fine-tune the module of some classes.

    A model that is trained already, given by its --weights, is cut to the size --keep. Options of
    a training are refused then: --pretrained, --epochs, --cut-pass, --lr, --alpha, --tau, --warmup
    and --threshold.
    """
    flags = [name for name, on in (("pretrained", pretrained), ("cut-pass", cut_pass)) if on]
    _check_together(out, list_layers, weights, flags, options)
    from nemo.locks import locked
    from nemo.models.shapes import DeitShape
    from nemo.pipeline import existing
    from nemo.pipeline.modularize import (
        architecture,
        check_new,
        make_module,
        own_model,
        own_params,
        train_parent,
    )
    from nemo.pipeline.rehearsal import coverage, layer_table, rehearse

    model, section = architecture(model, _shape(shape), pretrained)
    changes = {"architecture": section, **{key: options[name] for key, name in TUNED.items()}}
    if cut_pass:  # as the module will be cut
        threshold = options["threshold"]
        changes["loss.cut"] = {} if threshold is None else {"threshold": threshold}
    if as_cut := changes["finetune.epochs"] == 0:
        del changes["finetune.epochs"]  # a recipe has one at least; it is not followed
    # another run in this folder may be about to replace the images that this one reads
    with _named_as_options(), locked(work.with_name(f".{work.name}.lock.partial")):
        params = own_params(model, source, classes, seed, changes)
        if out is not None:
            check_new(out)
        data = _prepared(params, work)
        data = replace(data, mean=options["mean"] or data.mean, std=options["std"] or data.std)
        modular = own_model(params, data, weights)
        distilled = isinstance(params.architecture.of(model), DeitShape)
        report = rehearse(modular, data, distilled)
        click.echo("\n".join(coverage(modular, report)))
        if list_layers:
            click.echo("\n".join(layer_table(modular.layers)))
            return
        assert out is not None
        if weights is None:
            layout = train_parent(params, data, work, click.echo)
            module = make_module(params, data, layout, out, click.echo, tune=not as_cut)
        else:
            size = {name: options[name] for name in ("keep", "of", "selector") if options[name]}
            module = existing.make_module(
                params, data, modular, weights, out, click.echo, tune=not as_cut, **size
            )
        click.echo("\n".join(layer_table(modular.layers, module.report["layers"])))
        _show(module)
        click.echo(f"wrote {out}")


def _show(module: DecomposedModule) -> None:
    """Print its card and what it reaches."""
    show(card(module))
    reached = module.info["test_accuracy"]
    for key, what in MEASURED.items():
        if key in reached:
            click.echo(f"test accuracy of the {what:<26} {reached[key]:.1%}")
    if reached.get("finetuned", reached["as_cut"]) <= reached["one_class"]:
        click.echo("nemo: the module knows nothing: one class for all is as good", err=True)


def _check_together(
    out: Path | None,
    list_layers: bool,
    weights: Path | None,
    flags: list[str],
    options: dict[str, Any],
) -> None:
    """Raise UsageError where an option is missing, or decides nothing."""
    if list_layers:
        return
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    if weights is not None and options["keep"] is None:
        raise click.UsageError("Missing option '--keep': the size that the module shall have.")
    if (options["mean"] is None) != (options["std"] is None):
        raise click.UsageError("--mean and --std go together.")
    idle = TRAINED if weights is None else TRAINING
    given = [name for name in idle if options[name] is not None]
    if weights is not None:
        given += flags
    if given:
        how = "without" if weights is None else "with"
        raise click.UsageError(f"--{given[0]}: decides nothing {how} --weights.")


@contextmanager
def _named_as_options() -> Iterator[None]:
    """Name options in errors, which name the keys of params that they stand for."""
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        text = re.sub(r"^options: ", "", str(error), flags=re.M)
        text = re.sub(r"^subsets: ", "classes: ", text, flags=re.M)
        text = re.sub(r"^(classes|keep|device|selector): ", r"--\1: ", text, flags=re.M)
        text = re.sub(r"\bdata\.[\w-]+\.", "data.", text)
        text = re.sub(
            r"; name one: output=.*", "; accepted: a model that returns only logits", text
        )
        text = text.replace(" (tried, as there is no example=)", " (--size resizes them)")
        text = re.sub(r"\barchitecture\.[^\s:]+\.", "--shape ", text)
        text = text.replace("loss.cut.threshold", "masks.threshold")  # one option for both
        for key, name in TUNED.items():
            option = "--" + name.replace("_", "-")
            if "." in key:
                text = re.sub(rf"\b{re.escape(key)}(\.cnn|\.transformer)?\b", option, text)
        raise ValueError("\n".join(dict.fromkeys(text.split("\n")))) from error


def _shape(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE options as a dict."""
    shape = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        twice = key in shape
        try:
            shape[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            found = ""
        if not (key and found):
            raise ValueError(f"--shape {pair}: accepted: KEY=VALUE, such as width=0.25")
        if twice:
            raise ValueError(f"--shape {pair}: {key} is given twice; accepted: once")
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


COMMANDS = (modularize,)

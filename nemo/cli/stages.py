"""One command per stage. Heavy imports are inside, so that `--help` and mistakes cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemo.cells import MODULAR, Cell, Layout
from nemo.config import Params, load_params

if TYPE_CHECKING:
    from nemo.data import Prepared

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
METHODS = ("standard", *MODULAR)


def _params(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option(
        "--params", "params_file", default="params.yaml", show_default=True, help="Params file."
    )
    return option(command)


def _cell(*methods: str) -> Decorator:
    """The four options that name a cell."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
            click.option("--method", type=click.Choice(methods), default="nemo", show_default=True),
            click.option(
                "--model", required=True, help="One of ours, such as vgg16, or timm/NAME."
            ),
            click.option("--dataset", required=True, help="A key of `data` in the params file."),
        ):
            command = option(command)
        return _params(command)

    return decorate


_subset = click.option("--subset", required=True, help="Classes: all, 0-4, 3+5, cat+dog.")


@click.command()
@click.option("--dataset", required=True, help="A key of `data` in the params file.")
@_params
def prepare(dataset: str, params_file: str) -> None:
    """Decode a data set once: images, labels, statistics and splits."""
    params = _checked(params_file, dataset)
    from nemo.data import prepare, read_meta

    out = Layout().data(dataset)
    # a typing error in the subsets should not cost a training first
    prepare(dataset, params.data[dataset], out, check=lambda names: check_subsets(params, names))
    meta = read_meta(out)
    counts = ", ".join(f"{count} {split}" for split, count in meta["counts"].items())
    click.echo(f"{meta['title']}: {len(meta['classes'])} classes, {counts} images in {out}")


@click.command()
@_cell(*METHODS)
@click.option("--track/--no-track", default=False, help="Log the curves to MLflow as they come.")
def train(dataset: str, model: str, method: Any, seed: int, params_file: str, track: bool) -> None:
    """Train a cell: a model on a data set by a method."""
    params = _checked(params_file, dataset, model)
    _classes(dataset, params)
    from nemo.cli.launch import launch

    launch(params, "train", _train, Cell(dataset, model, method, seed), track)


def _train(params: Params, cell: Cell, track: bool) -> None:
    """What each process of a training does."""
    from nemo.distributed import is_first
    from nemo.tracking import training_run
    from nemo.training.cell import train_cell

    data, out = _data(cell.dataset, params), Layout().train(cell)
    with training_run(params, cell, enabled=track and is_first()) as log_epoch:
        train_cell(params, cell, data, out, log_epoch)
    if is_first():
        click.echo(f"trained {cell.name}: {_metrics(out)}")


@click.command()
@_cell(*MODULAR)
def masks(dataset: str, model: str, method: Any, seed: int, params_file: str) -> None:
    """Find the neurons each class uses, and measure NRR, cohesion and coupling."""
    params = _checked(params_file, dataset, model)
    data = _data(dataset, params)
    from nemo.data import Batches
    from nemo.device import resolve_device
    from nemo.evaluation.modular import measure_masks
    from nemo.training.cell import load_cell, weights_sha256

    cell, layout = Cell(dataset, model, method, seed), Layout()
    device = resolve_device(params.device)
    modular = load_cell(layout.train(cell)).to(device)
    batches = Batches(data.splits["train"], data.mean, data.std, 256, device=device)
    weights = weights_sha256(layout.train(cell))
    measure_masks(modular, batches, params.masks.threshold, layout.masks(cell), weights)  # type: ignore[arg-type]
    click.echo(f"class masks of {cell.name}: {_metrics(layout.masks(cell))}")


@click.command()
@_cell(*MODULAR)
@_subset
def decompose(
    dataset: str, model: str, method: Any, seed: int, subset: str, params_file: str
) -> None:
    """Cut the module of a class subset out of a modular model, with its certificate."""
    _checked(params_file, dataset, model)
    from nemo.data import read_meta
    from nemo.module.files import load
    from nemo.pipeline.decompose import cut_module

    cell, layout = Cell(dataset, model, method, seed), Layout()
    out = layout.module(cell, subset)
    cut_module(
        cell, subset, layout.train(cell), layout.masks(cell), read_meta(layout.data(dataset)), out
    )
    module = load(out)
    report, error = module.report, module.certificate["error"]
    click.echo(
        f"module {subset} of {cell.name}: {report['parameters']:,} of "
        f"{report['parent_parameters']:,} parameters, float64 error {error:.1e} of the output's std"
    )


@click.command()
@_cell(*MODULAR)
@_subset
def finetune(
    dataset: str, model: str, method: Any, seed: int, subset: str, params_file: str
) -> None:
    """Fine-tune a module on the images of its classes; validation images choose the epoch."""
    params = _checked(params_file, dataset, model)
    classes = _classes(dataset, params)
    from nemo.cli.launch import launch
    from nemo.data import parse_subset

    parse_subset(subset, classes)
    launch(params, "finetune", _finetune, Cell(dataset, model, method, seed), subset)


def _finetune(params: Params, cell: Cell, subset: str) -> None:
    """What each process of a fine-tuning does."""
    from nemo.distributed import is_first
    from nemo.training.finetune import finetune_module

    data, layout = _data(cell.dataset, params), Layout()
    out = layout.finetuned(cell, subset)
    finetune_module(params, cell, layout.module(cell, subset), data, out)
    if is_first():
        click.echo(f"fine-tuned module {subset} of {cell.name}: {_metrics(out)}")


@click.command()
@click.option("--dataset", required=True, help="A key of `data` in the params file.")
@click.option("--model", required=True, help="One of ours, such as vgg16, or timm/NAME.")
@_params
def evaluate(dataset: str, model: str, params_file: str) -> None:
    """Measure every cell and module of a model on the test images."""
    params = _checked(params_file, dataset, model)
    data = _data(dataset, params)
    from nemo.evaluation.evaluate import evaluate_model
    from nemo.training.checkpoint import checkpoints_root, sweep

    evaluate_model(params, dataset, model, data, Layout())
    sweep(checkpoints_root())
    click.echo(f"evaluated {model} on {dataset}: {Layout().evaluation(dataset, model)}")


COMMANDS = (prepare, train, masks, decompose, finetune, evaluate)


def _checked(params_file: str, dataset: str, model: str | None = None) -> Params:
    """The params, once they and the names given on the command line are known to be good."""
    from nemo.config import ParamsError, check_model_name

    params = load_params(params_file)
    if dataset not in params.data:
        raise ParamsError(
            f"--dataset: {dataset!r} is not in data; accepted: {', '.join(params.data)}"
        )
    if model is not None:
        check_model_name(model)
    return params


def _classes(dataset: str, params: Params) -> list[str]:
    """The prepared data's class names, once they fit the subsets and the device is there."""
    from nemo.data import read_meta
    from nemo.device import resolve_device

    classes: list[str] = read_meta(Layout().data(dataset))["classes"]
    check_subsets(params, classes)
    resolve_device(params.device)
    return classes


def _data(dataset: str, params: Params) -> Prepared:
    from nemo.data import load

    _classes(dataset, params)
    return load(Layout().data(dataset), params.data[dataset].memory)


def check_subsets(params: Params, names: list[str]) -> None:
    """Raise DataError unless every subset is two or more of the classes, and no two are equal."""
    from nemo.data import DataError, parse_subset

    seen: dict[frozenset[int], str] = {}
    for subset in params.subsets:
        classes = parse_subset(subset, names)
        if len(classes) < 2:
            raise DataError(f"subsets: {subset!r} is one class; accepted: two or more")
        first = seen.setdefault(frozenset(classes), subset)
        if first != subset:
            raise DataError(f"subsets: {first!r} and {subset!r} are the same classes")


def _metrics(folder: Path) -> str:
    from nemo.files import read_json

    numbers = {
        k: v for k, v in read_json(folder / "metrics.json").items() if isinstance(v, int | float)
    }
    return ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())

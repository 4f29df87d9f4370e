"""One command per stage. Heavy imports are inside, so that `--help` and mistakes cost nothing."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nemo.cells import Cell, Layout
from nemo.config import EXTRAS, Params, check_subset_name, load_params
from nemo.fields import ParamsError

params_option = click.option(
    "--params", "params_file", default="params.yaml", show_default=True, help="Params file."
)
MEASURED = {
    "alternatives": "what else has a module's size, fine-tuned as the module is",
    "budgets": "what a module and its rivals reach after how much fine-tuning",
    "gap": "what one mask for all images loses, and what wins it back",
    "granularity": "modules of whole heads and MLPs instead of neurons",
    "thresholds": "class masks at other thresholds",
}
_dataset = click.option("--dataset", required=True, help="A key of `data` in the params file.")
_subset = click.option(
    "--subset", required=True, help="Classes: all, 0-4, 3+5, cat+dog, or a name."
)


def _cell(command: Callable[..., Any]) -> Callable[..., Any]:
    """The four options that name a cell."""
    for option in (
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        click.option(
            "--method", default="nemo", show_default=True, help="One of `methods` or `variants`."
        ),
        click.option("--model", required=True, help="One of ours, such as vgg16, or timm/NAME."),
        _dataset,
    ):
        command = option(command)
    return params_option(command)


@click.command()
@params_option
@click.option("--out", default="plan", show_default=True, type=click.Path(path_type=Path))
def plan(params_file: str, out: Path) -> None:
    """Write what decides the result of each stage, for DVC to compare."""
    params = load_params(params_file)
    from nemo.pipeline import plan
    from nemo.report.collect import others_of

    others_of(params, Path())  # what the report would find after all trainings
    click.echo(f"{plan.run(params, out)} files in {out}")


@click.command()
@_dataset
@params_option
def prepare(dataset: str, params_file: str) -> None:
    """Decode a data set once: images, labels, statistics and splits."""
    params = _checked(params_file, dataset)
    from nemo.pipeline import prepare

    meta = prepare.run(params, dataset, Layout())
    counts = ", ".join(f"{count} {split}" for split, count in meta["counts"].items())
    out = Layout().data(dataset)
    click.echo(f"{meta['title']}: {len(meta['classes'])} classes, {counts} images in {out}")


@click.command()
@_cell
@click.option("--track/--no-track", default=False, help="Log the curves to MLflow as they come.")
def train(track: bool, **names: Any) -> None:
    """Train a cell: a model on a data set by a method."""
    params, cell = _known(**names)
    from nemo.cli.launch import launch
    from nemo.pipeline import train
    from nemo.pipeline.inputs import class_names

    class_names(params, cell.dataset, Layout())
    recipe = params.for_method(cell.method).train
    launch(params, "train", recipe, train.run, cell, Layout(), track)
    _say("trained", cell.name, Layout().train(cell))


@click.command()
@_cell
def masks(**names: Any) -> None:
    """Find the neurons each class uses, and measure NRR, cohesion and coupling."""
    params, cell = _known(**names, modular=True)
    from nemo.pipeline import masks

    masks.run(params, cell, Layout())
    _say("class masks of", cell.name, Layout().masks(cell))


@click.command()
@_cell
@_subset
def decompose(subset: str, **names: Any) -> None:
    """Cut the module of a class subset out of a modular model, with its certificate."""
    params, cell = _known(**names, modular=True, subset=subset)
    from nemo.data import read_meta
    from nemo.pipeline import decompose

    _check_subset(params, subset, read_meta(Layout().data(cell.dataset))["classes"])
    module = decompose.run(params, cell, subset, Layout())
    report, error = module.report, module.certificate["error"]
    click.echo(
        f"module {subset} of {cell.name}: {report['parameters']:,} of "
        f"{report['parent_parameters']:,} parameters, float64 error {error:.1e} of the output's std"
    )


@click.command()
@_cell
@_subset
def finetune(subset: str, **names: Any) -> None:
    """Fine-tune a module on the images of its classes; validation images choose the epoch."""
    params, cell = _known(**names, modular=True, subset=subset)
    from nemo.cli.launch import launch
    from nemo.pipeline import finetune
    from nemo.pipeline.inputs import class_names

    _check_subset(params, subset, class_names(params, cell.dataset, Layout()))
    if not (cut := Layout().module(cell, subset)).is_dir():
        raise FileNotFoundError(f"{cut}: no module here; run `nemo decompose` first")
    recipe = params.for_method(cell.method).finetune
    launch(params, "finetune", recipe, finetune.run, cell, subset, Layout())
    _say(f"fine-tuned module {subset} of", cell.name, Layout().finetuned(cell, subset))


@click.command()
@_cell
def evaluate(**names: Any) -> None:
    """Measure a cell and its modules on the test images; write its file of results."""
    params, cell = _known(**names)
    from nemo.pipeline import evaluate

    click.echo(f"evaluated {cell.name}: {evaluate.run(params, cell, Layout())}")


@click.command()
@params_option
@click.option("--dvc", is_flag=True, help="List DVC's names of the stages of each cell instead.")
def cells(params_file: str, dvc: bool) -> None:
    """List the commands that compute params.yaml's cells without DVC, one a line.

    Several may run at once: nemo cells | OMP_NUM_THREADS=1 xargs -P 2 -I @ sh -c @
    """
    params = load_params(params_file)
    from nemo.cells import cells, targets

    if dvc:
        for cell in cells(params):
            click.echo(shlex.join(targets(params, cell)))
        return
    given = "" if params_file == "params.yaml" else f" --params {shlex.quote(params_file)}"
    for cell in cells(params):
        names = f"--dataset {cell.dataset} --model {cell.model} --method {cell.method}"
        click.echo(f"nemo run {names} --seed {cell.seed}{given}")


@click.command()
@_cell
def run(**names: Any) -> None:
    """Run all stages of a cell, one after the other: those whose results are not there."""
    params, cell = _known(**names)
    from nemo.pipeline import cell as stages

    click.echo(f"results of {cell.name}: {stages.run(params, cell, Layout(), click.echo)}")


def _extra(name: str) -> click.Command:
    @click.command(name, help=f"Measure {MEASURED[name]}.")
    @_cell
    def command(**names: Any) -> None:
        params, cell = _known(**names, modular=True)
        from nemo.pipeline import extras

        rows = extras.run(name, params, cell, Layout())
        click.echo(f"{name} of {cell.name}: {len(rows)} rows in {Layout().extra(cell, name)}")

    return command


COMMANDS = (
    plan, prepare, train, masks, decompose, finetune, evaluate, cells, run,
    *(_extra(name) for name in EXTRAS),
)  # fmt: skip


def _checked(params_file: str, dataset: str) -> Params:
    """The params, once the data set named on the command line is known to be one."""
    params = load_params(params_file)
    if dataset not in params.data:
        raise ParamsError(
            f"--dataset: {dataset!r} is not in data; accepted: {', '.join(params.data)}"
        )
    return params


def _known(
    dataset: str,
    model: str,
    method: str,
    seed: int,
    params_file: str,
    modular: bool = False,
    subset: str = "all",
) -> tuple[Params, Cell]:
    """The params and the cell, once the names given on the command line are known to be good."""
    from nemo.models.registry import check_model_name

    params = _checked(params_file, dataset)
    check_model_name(model)
    params.check_shape(model)
    base = params.base_of(method)
    if modular and not base.modular:
        raise ParamsError(f"--method: {method!r} has no masks and no modules")
    if subset not in params.subsets:
        check_subset_name(subset)
    return params, Cell(dataset, model, method, seed)


def _check_subset(params: Params, subset: str, classes: list[str]) -> None:
    """Raise ValueError unless the subset is two or more of the classes."""
    from nemo.data import parse_subset

    if len(parse_subset(params.text_of(subset), classes)) < 2:
        raise ParamsError(f"--subset: {subset!r} is one class; accepted: two or more")


def _say(done: str, what: str, folder: Path) -> None:
    """The numbers that a stage wrote; of several processes the main one says them."""
    import os

    from nemo.files import read_json

    if os.environ.get("RANK", "0") == "0":
        found = read_json(folder / "metrics.json").items()
        numbers = {name: value for name, value in found if isinstance(value, int | float)}
        shown = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
        click.echo(f"{done} {what}: {shown}")

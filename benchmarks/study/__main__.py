"""Command line of the study."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.study.figures import draw
from benchmarks.study.page import write_page
from benchmarks.study.plan import Unit, units
from benchmarks.study.provenance import provenance
from benchmarks.study.rows import Facts, plain_units
from benchmarks.study.run import CELLS, WORK, claimed, digest, run_unit
from benchmarks.study.tables import read_units, setting, summarised, tables
from benchmarks.study.times import measure_times
from benchmarks.study.together import run_together
from nemo.config import Params, ParamsError, load_params
from nemo.data import load, prepare
from nemo.device import resolve_device
from nemo.locks import locked

PROFILE = Path("profiles/cifar10-cpu.yaml")
DATASET = "cifar10"
TIMES = CELLS.with_name("times")


@click.group()
def cli() -> None:
    """The paper's tables on real CIFAR-10."""


@cli.command("list")
def list_units() -> None:
    """Every unit, and whether its file is there; one of other params does not count."""
    done = _finished()
    for unit in units():
        click.echo(f"{'done' if unit.name in done else '-':5} {unit.name}")


def _finished() -> dict[str, Facts]:
    """The units of the plan that were made with the profile as it is now."""
    profile, found = load_params(PROFILE), read_units(CELLS)
    return {
        unit.name: found[unit.name]
        for unit in units()
        if unit.name in found and unit.fits(found[unit.name], profile)
    }


def _options(command: Callable[..., None]) -> Callable[..., None]:
    source = "As `data.cifar10.source` of the params: folder:PATH offline."
    title = "As `data.cifar10.title`: what the tables call these images."
    command = click.option("--title", help=title)(command)
    command = click.option("--source", help=source)(command)
    return click.argument("names", nargs=-1)(command)


@cli.command()
@_options
@click.option("--device", default="cpu", show_default=True, help="As `device` of the params.")
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
def run(
    names: tuple[str, ...], source: str | None, title: str | None, device: str, jobs: int
) -> None:
    """Compute units, those without a file by default; a killed run goes on where it was."""
    profile, folder, wanted = _prepare(names, source, title, device)
    finished, data = _finished(), load(folder)
    wanted = [unit for unit in wanted if names or unit.name not in finished]
    provenance(profile)  # of no use later if it cannot be told
    with _one_line(), claimed(wanted, profile, data):
        if jobs > 1:
            files = run_together(wanted, profile, folder, jobs)
        else:
            files = (run_unit(unit, profile, data) for unit in wanted)
        for file in files:
            click.echo(file)


@cli.command()
@_options
def times(names: tuple[str, ...], source: str | None, title: str | None) -> None:
    """Time finished units whose weights are still in study/, on a quiet machine's CPU."""
    profile, folder, wanted = _prepare(names, source, title, "cpu")
    finished, data = _finished(), load(folder)
    for unit in wanted:
        if names or (unit.modular and unit.name in finished):
            file = TIMES / f"{unit.name}.json"
            measure_times(unit, profile, data, file)
            click.echo(file)


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can mend, as one line."""
    try:
        yield
    except (ParamsError, RuntimeError, ArithmeticError) as error:
        raise click.ClickException(str(error)) from error


def _prepare(
    names: tuple[str, ...], source: str | None, title: str | None, device: str
) -> tuple[Params, Path, list[Unit]]:
    """The profile, its images' folder and the units asked for: all where none is named."""
    known = {unit.name: unit for unit in units()}
    for name in names:
        if name not in known:
            raise click.UsageError(f"no unit {name!r}; see `python -m benchmarks.study list`")
    with _one_line():
        profile = Params.model_validate(load_params(PROFILE).model_dump() | {"device": device})
        resolve_device(device)
    changed = {k: v for k, v in (("source", source), ("title", title)) if v is not None}
    origin = profile.data[DATASET].model_copy(update=changed)
    folder = WORK / "data" / digest(origin.model_dump()) / DATASET
    with locked(folder.with_name("lock")):  # studies that start at once
        if not folder.exists():
            prepare(DATASET, origin, folder)
    return profile, folder, [known[name] for name in names or known]


@cli.command("tables")
def write_tables() -> None:
    """The tables of all finished units, as CSV (a row per seed) and Markdown (over seeds), their
    figures, and one page of everything."""
    units_done = _finished()
    if not units_done:
        raise click.ClickException(f"{CELLS}: no finished unit; `python -m benchmarks.study run`")
    folder = CELLS.parent
    times = read_units(TIMES)
    made, where = tables(units_done, times), setting(units_done, times)
    (folder / "figures").mkdir(exist_ok=True)
    pictures = [draw(table, folder / "figures") for table in made]
    for table, picture in zip(made, pictures, strict=True):
        text = table.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        (folder / f"{table.name}.csv").write_text(text)
        over_seeds = summarised(table).to_markdown(index=False, disable_numparse=True)
        shown = f"![{picture.how}](figures/{picture.file})"
        parts = [f"# {table.title}", where, table.how, shown, over_seeds]
        (folder / f"{table.name}.md").write_text("\n\n".join(parts) + "\n")
        click.echo(folder / f"{table.name}.md")
    if any(True for _ in plain_units(units_done)):  # else there are only sweeps so far
        write_page(units_done, made, pictures, where, folder)
        click.echo(folder / "index.html")


if __name__ == "__main__":
    cli()

"""Command line of the study."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.study.plan import Unit, units
from benchmarks.study.run import CELLS, WORK, digest, run_unit
from benchmarks.study.tables import read_units, setting, summarised, tables
from nemo.config import load_params
from nemo.data import load, prepare

PROFILE = Path("profiles/cifar10-cpu.yaml")
DATASET = "cifar10"


@click.group()
def cli() -> None:
    """The paper's tables on real CIFAR-10."""


@cli.command("list")
def list_units() -> None:
    """Every unit, and whether its file is there."""
    for unit in units():
        click.echo(f"{'done' if (CELLS / f'{unit.name}.json').exists() else '-':5} {unit.name}")


@cli.command()
@click.argument("names", nargs=-1)
@click.option("--source", help="As `data.cifar10.source` of the params: folder:PATH offline.")
@click.option("--title", help="As `data.cifar10.title`: what the tables call these images.")
def run(names: tuple[str, ...], source: str | None, title: str | None) -> None:
    """Compute units, those without a file by default; a killed run goes on where it was."""
    known = {unit.name: unit for unit in units()}
    for name in names:
        if name not in known:
            raise click.UsageError(f"no unit {name!r}; see `python -m benchmarks.study list`")
    wanted: list[Unit] = [known[name] for name in names or known]
    profile = load_params(PROFILE)
    changed = {k: v for k, v in (("source", source), ("title", title)) if v is not None}
    origin = profile.data[DATASET].model_copy(update=changed)
    folder = WORK / "data" / digest(origin.model_dump()) / DATASET
    if not folder.exists():
        prepare(DATASET, origin, folder)
    data = load(folder)
    for unit in wanted:
        if names or not (CELLS / f"{unit.name}.json").exists():
            click.echo(run_unit(unit, profile, data))


@cli.command("tables")
def write_tables() -> None:
    """The tables of all finished units, as CSV (a row per seed) and Markdown (over seeds)."""
    units_done = read_units(CELLS)
    if not units_done:
        raise click.ClickException(f"{CELLS}: no finished unit; `python -m benchmarks.study run`")
    for table in tables(units_done):
        text = table.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        (CELLS.parent / f"{table.name}.csv").write_text(text)
        over_seeds = summarised(table).to_markdown(index=False, disable_numparse=True)
        content = f"# {table.title}\n\n{setting(units_done)} {table.how}\n\n{over_seeds}\n"
        (CELLS.parent / f"{table.name}.md").write_text(content)
        click.echo(CELLS.parent / f"{table.name}.md")


if __name__ == "__main__":
    cli()

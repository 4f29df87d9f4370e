"""Commands that show finished work: the report and MLflow."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nemo.config import load_params
from nemo.layout import Layout

_params = click.option(
    "--params", "params_file", default="params.yaml", show_default=True, help="Params file."
)


@click.command()
@_params
@click.option("--show", is_flag=True, help="Print the tables of the finished report.")
@click.option(
    "--check",
    "committed",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Compare the finished report's tables with those in this folder; fail on drift.",
)
def report(params_file: str, show: bool, committed: Path | None) -> None:
    """Write the tables, figures and page of the profile's results."""
    params = load_params(params_file)
    out = Layout().report(params.profile)
    from nemo.report import check, render_tables, write_report

    if show:
        render_tables(out)
    elif committed is not None:
        drift = check(out, committed)
        for line in drift:
            click.echo(f"nemo: {line}", err=True)
        if drift:
            sys.exit(1)
        click.echo(f"{out}: same rows as {committed}, every metric within its tolerance")
    else:
        write_report(params, Path(), out)
        click.echo(f"wrote {out}/index.html")


@click.command()
@_params
def publish(params_file: str) -> None:
    """Log every finished cell and module to MLflow; what is there already stays as it is."""
    params = load_params(params_file)
    from nemo.tracking import publish as publish_results

    click.echo(publish_results(params, Path()))


COMMANDS = (report, publish)

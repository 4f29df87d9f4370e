"""Commands that show finished work: the report and MLflow."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from nemo.cells import Layout
from nemo.cli.stages import params_option
from nemo.config import load_params

NEEDED = ("jinja2", "matplotlib", "pandas", "tabulate")  # by the tables, their figures and page
HEAD = "HEAD"  # the value of a bare --check: the last commit


@click.command()
@params_option
@click.option("--show", is_flag=True, help="Print T1 and T2 of the finished report.")
@click.option(
    "--check",
    "against",
    is_flag=False,
    flag_value=HEAD,
    help="Compare the finished report's tables with the committed ones, or with those of another "
    "folder, and fail on drift.",
)
@click.option("--publish", "tracked", is_flag=True, help="Also bring MLflow up to date.")
def report(params_file: str, show: bool, against: str | None, tracked: bool) -> None:
    """Write the tables, figures and page of the profile's results."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} not found: pip install 'nemo-modular[report]'")
    params = load_params(params_file)
    out = Layout().report(params.profile)
    from nemo.report.build import render_tables, write_report

    if show:
        render_tables(out)
    elif against == HEAD:
        with tempfile.TemporaryDirectory() as folder:
            _check(out, _committed(out, Path(folder)))
    elif against is not None:
        _check(out, Path(against))
    else:
        for line in write_report(params, Path(), out):
            click.echo(f"nemo: {line}", err=True)
        click.echo(f"wrote {out}/index.html")
        if tracked:
            from nemo.tracking import publish_quietly

            publish_quietly(params, Path())


def _check(out: Path, committed: Path) -> None:
    from nemo.report.drift import check

    drift = check(out, committed)
    for line in drift:
        click.echo(f"nemo: {line}", err=True)
    if drift:
        sys.exit(1)
    click.echo(f"{out}: the same rows, and every metric within its tolerance")


def _committed(out: Path, folder: Path) -> Path:
    """The tables of `out` as the last commit has them, written into `folder`."""
    listed = _git("ls-tree", "--name-only", "HEAD", f"{out}/").splitlines()
    tables = [name for name in listed if name.endswith(".csv")]
    if not tables:
        raise ValueError(f"{out}: the last commit has no report there to compare with")
    for name in tables:
        (folder / Path(name).name).write_text(_git("show", f"HEAD:{name}"))
    return folder


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.strip().splitlines()[0]}")
    return done.stdout


@click.command()
@params_option
def publish(params_file: str) -> None:
    """Log every finished cell and module to MLflow; what is there already stays as it is."""
    params = load_params(params_file)
    from nemo.tracking import publish as publish_results

    click.echo(publish_results(params, Path()))


COMMANDS = (report, publish)

"""The command group, and how its commands fail: one line on stderr and a non-zero exit code."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import click

from nemo.cli import merge, modularize, modules, stages, views
from nemo.cli.failures import expected, text


class Group(click.Group):
    """Turns what a user can cause into one clear line per mistake, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly where its reader has, such as head
        except Exception as error:
            if ctx.params["traceback"] or not expected(error):
                raise
            for line in text(error, ctx.invoked_subcommand).splitlines():
                click.echo(f"nemo: {line}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("nemo: stopped", err=True)
            sys.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
@click.version_option(package_name="nemo-modular")
def cli(traceback: bool) -> None:
    """Modular training of neural networks, and exact modules for a few of their classes."""


for part in (stages, views, modules, modularize, merge):
    for command in part.COMMANDS:
        cli.add_command(command)


def ignore_warnings() -> None:
    """Not to show what torch says when timm is imported: nothing a user here could change."""
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def leave_quickly() -> None:
    """Python looks for garbage once more before it ends: a second, in all that torch has made."""
    atexit.register(gc.freeze)


def interrupt_again() -> None:
    """Python drops what is raised in a weakref's callback, also Ctrl-C and SIGTERM: while garbage
    is collected, a run could not be stopped. It is raised again a moment later."""
    former = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            former(dropped)

    sys.unraisablehook = hook


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` default to those of the process."""
    ignore_warnings()
    leave_quickly()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as cleanly as by Ctrl-C
        interrupt_again()
    cli.main(args=arguments, prog_name="nemo")

"""The `nemo` command: one subcommand per stage of the pipeline, and those used by hand."""

from nemo.cli.main import main

__all__ = ["main"]

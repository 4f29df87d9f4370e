"""Tables, figures and one offline page from finished results; imports no torch.

Everything is read from the files that params.yaml names and is byte-identical for identical files.
"""

from nemo.report.build import render_tables, write_report
from nemo.report.drift import check
from nemo.report.results import MissingResultError

__all__ = ["MissingResultError", "check", "render_tables", "write_report"]

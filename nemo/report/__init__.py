"""Tables, figures and one offline page from finished results; imports no torch.

Everything is read from the files that params.yaml names and is byte-identical for identical files.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo.report.build import render_tables, write_report
    from nemo.report.drift import check

__all__ = ["check", "render_tables", "write_report"]


def __getattr__(name: str) -> Any:
    # lazily, since training reads results for MLflow where pandas need not be installed
    if name in ("render_tables", "write_report"):
        from nemo.report import build

        return getattr(build, name)
    if name == "check":
        from nemo.report.drift import check

        return check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Files of the user's own, named by `plugins` in params.yaml: imported before all else (ours)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from nemo.fields import ParamsError


def import_plugins(files: Iterable[str]) -> None:
    """Run each Python file once in this process; what it registers can then be named in params.

    Raises:
        ParamsError: a file is missing, is no Python file, or fails; one line that names it.
    """
    for file in files:
        path = Path(file)
        if path.suffix != ".py" or not path.is_file():
            raise ParamsError(f"plugins: {file}: no such file; accepted: paths of Python files")
        _import(path.resolve(), file)


def _import(path: Path, shown: str) -> None:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"nemo_plugin_{path.stem}_{digest}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # as an import does it: classes look their module up
    try:
        spec.loader.exec_module(module)
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever a user's file raises, the user needs its place
        del sys.modules[name]
        where = f", line {line}" if (line := _line(error, path)) else ""
        text = " ".join(str(error).split())
        raise ParamsError(f"plugins: {shown}{where}: {type(error).__name__}: {text}") from error


def _line(error: BaseException, path: Path) -> int | None:
    """Where in the file an error comes from, or goes through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    found, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            found = step.tb_lineno
        step = step.tb_next
    return found

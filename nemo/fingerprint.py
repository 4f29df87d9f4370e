"""Which code decides a result, as a hash (ours).

DVC runs a stage again when this hash changes. It covers every file of the package that the stage
imports, directly or not, read as Python reads it: comments, docstrings and layout do not count.
Files behind a registry (objectives, selectors, models, alternatives) count where they are used.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Code that moves results without deciding them: the typed edge of params, whose values count
# themselves, files and paths, the device, checkpoints, and the views of finished results.
PLUMBING = (
    "nemo.cells", "nemo.cli", "nemo.config", "nemo.device", "nemo.fields", "nemo.files",
    "nemo.fingerprint", "nemo.locks", "nemo.mistakes", "nemo.params_file", "nemo.plugins",
    "nemo.provenance", "nemo.recipe", "nemo.registry", "nemo.report", "nemo.results",
    "nemo.sections", "nemo.settings", "nemo.tracking", "nemo.training.checkpoint",
)  # fmt: skip
EXTENSIONS = (
    "nemo.masking.objectives", "nemo.masking.selectors", "nemo.models.cnn", "nemo.models.vit",
    "nemo.alternatives.kinds",
)  # fmt: skip
APART = (*PLUMBING, *EXTENSIONS)


def fingerprint(
    entries: Iterable[str], plugins: Iterable[str] = (), without: tuple[str, ...] = APART
) -> str:
    """SHA-256 of the code behind modules of this package, of what they read from files beside them
    (a template, a table), and of plugin files.

    Args:
        entries: dotted names; of a module behind a registry, itself and what it imports.
        plugins: paths of files of the user's own; what they import of this package counts too.
        without: modules and packages that decide nothing in this case.
    """
    digest = hashlib.sha256()
    texts = {path: Path(path).read_text(encoding="utf-8") for path in plugins}
    used = {name for text in texts.values() for name in _imports(ast.parse(text))}
    reached = code_behind({name for name in used if not _within(name, without)}, without)
    for name in sorted(code_behind(entries, without) | reached):
        digest.update(f"{name}\0{_text(_file(name))}\0".encode())
        for file in _beside(_file(name)):
            digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    for path in texts:
        digest.update(f"{path}\0{_text(Path(path))}\0".encode())
    return digest.hexdigest()


def code_behind(entries: Iterable[str], without: tuple[str, ...] = APART) -> set[str]:
    """The modules of this package that `entries` import, directly or not, themselves included."""
    found: set[str] = set()
    todo = list(entries)
    wanted = set(todo)
    while todo:
        name = todo.pop()
        if name in found or (name not in wanted and _within(name, without)):
            continue
        found.add(name)
        todo += imported(name)
    return found


def _within(name: str, heads: tuple[str, ...]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


@cache
def imported(name: str) -> frozenset[str]:
    """The modules of this package that a module imports, anywhere but for type checkers."""
    return frozenset(_imports(_tree(_file(name))))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in _parts(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nemo":
            assert node.module is not None
            for alias in node.names:  # a module, or a name in one
                inner = f"{node.module}.{alias.name}"
                yield inner if _exists(inner) else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "nemo")
        yield from _imports(node)


def _file(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(name: str) -> bool:
    return _file(name).is_file()


@cache
def _beside(module: Path) -> list[Path]:
    """Files in a module's folder that its code names."""
    beside, text = sorted(module.parent.iterdir()), _text(module)
    return [file for file in beside if repr(file.name) in text and file.is_file()]


@cache
def _text(path: Path) -> str:
    """A file's code without comments, docstrings and layout."""
    return ast.unparse(_tree(path))


def _parts(node: ast.AST) -> list[ast.AST]:
    """What can be or hold a statement; expressions, most of a file, cannot."""
    return [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.expr)]


@cache
def _tree(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        todo += _parts(node)
    return tree

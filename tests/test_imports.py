"""Who may import whom: no circles, and each package only what lies below it. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "nemo").rglob("*.py"))
}
# Imports in functions that close a circle, (importer, imported), each with its reason.
CIRCLES_ALLOWED = {
    ("nemo.cli.launch", "nemo.cli.main"),  # what `main` sets, in a process of its own
}
# What a package may import of nemo, besides itself.
PARAMS = {"nemo.fields", "nemo.registry"}
CALLS = {"nemo.signature"}
EDGE = PARAMS | {
    "nemo.cells", "nemo.config", "nemo.mistakes", "nemo.plugins", "nemo.sections", "nemo.settings",
    "nemo.masking.objectives", "nemo.masking.selectors",
}  # fmt: skip
BASICS = EDGE | CALLS | {
    "nemo.calibration", "nemo.cost", "nemo.data", "nemo.device", "nemo.distributed", "nemo.files",
    "nemo.fingerprint", "nemo.locks", "nemo.masking", "nemo.models", "nemo.module", "nemo.predict",
    "nemo.provenance", "nemo.recipe", "nemo.results", "nemo.trained",
}  # fmt: skip
READING = EDGE | {
    "nemo.alternatives", "nemo.data.subsets", "nemo.files", "nemo.forms", "nemo.metrics",
    "nemo.models", "nemo.results",
}  # fmt: skip
LAYERS = {
    "nemo.models": PARAMS,
    "nemo.signature": set(),
    "nemo.masking": PARAMS | CALLS | {"nemo.tracing", "nemo.data", "nemo.models"},
    "nemo.module": CALLS | {"nemo.cost", "nemo.files", "nemo.predict"},
    "nemo.proof": {"nemo.masking", "nemo.module", "nemo.signature"},
    "nemo.cut": CALLS | {"nemo.cost", "nemo.files", "nemo.masking", "nemo.module", "nemo.proof",
                "nemo.tracing"},
    "nemo.for_cuts": {"nemo.calibration", "nemo.data", "nemo.masking", "nemo.signature"},
    "nemo.training": BASICS,
    "nemo.evaluation": BASICS | {"nemo.cut", "nemo.for_cuts"},
    "nemo.alternatives": BASICS | {"nemo.cut", "nemo.training", "nemo.evaluation"},
    "nemo.report": READING,
    "nemo.tracking": READING | {"nemo.locks", "nemo.report"},
    "nemo.pipeline": BASICS
    | {"nemo.alternatives", "nemo.cut", "nemo.evaluation", "nemo.for_cuts", "nemo.tracking"}
    | {"nemo.training"},
}  # fmt: skip
WITHOUT_TORCH = ["nemo.report", "nemo.tracking"]


def imports(name: str, in_functions: bool) -> set[str]:
    """The modules that a file imports when it is imported, or those that its functions import."""
    return {
        found
        for node in _nodes(ast.parse(FILES[name].read_text()), in_functions)
        for found in _targets(node)
    }


def _nodes(node: ast.AST, in_functions: bool, inside: bool = False) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)) and inside == in_functions:
            yield child
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _nodes(child, in_functions, inside or function)


def _targets(node: ast.AST) -> Iterator[str]:
    """`from a import b` imports the file a.b if there is one, else a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "relative import"
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in FILES else str(node.module)


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """All that importing a file imports."""
    found: set[str] = set()
    queue = [start]
    while queue:
        new = graph.get(queue.pop(), set()) - found
        found |= new
        queue += new
    return found


AT_ONCE = {name: imports(name, in_functions=False) for name in FILES}
LATER = {name: imports(name, in_functions=True) for name in FILES}


def belongs(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_no_import_circles() -> None:
    assert [name for name in FILES if name in reachable(name, AT_ONCE)] == []


def closing(allowed: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports in functions that close a circle, were it not for those allowed."""
    later = {n: {t for t in LATER[n] if (n, t) not in allowed} for n in FILES}
    graph = {name: AT_ONCE[name] | later[name] for name in FILES}
    return {(n, t) for n in FILES for t in later[n] if n in reachable(t, graph)}


def test_no_circles_through_imports_in_functions() -> None:
    assert closing(CIRCLES_ALLOWED) == set()
    assert closing(set()) >= CIRCLES_ALLOWED  # and none that is not needed any more


def forbidden(package: str, allowed: set[str]) -> list[str]:
    """What a package imports of nemo, at once or in a function, and may not."""
    return [
        f"{name} imports {target}"
        for name in FILES
        if belongs(name, {package})
        for target in sorted(AT_ONCE[name] | LATER[name])
        if belongs(target, {"nemo"}) and not belongs(target, {package, *allowed})
    ]


@pytest.mark.parametrize("package", LAYERS)
def test_packages_import_what_lies_below_them(package: str) -> None:
    assert any(belongs(name, {package}) for name in FILES)
    assert forbidden(package, LAYERS[package]) == []


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_reports_and_tracking_import_no_torch(package: str) -> None:
    loaded = {n for name in FILES if belongs(name, {package}) for n in reachable(name, AT_ONCE)}
    assert not [n for n in loaded if belongs(n, {"torch", "torchvision", "timm"})]

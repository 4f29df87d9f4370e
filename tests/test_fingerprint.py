"""The plan's guard: what decides a result is in the hash of its stage, and nothing else moves it.

Each stage runs for real, and is watched. Every file of nemo that had a function called must be
behind the stage's hash, or in a list here that says why it decides nothing; every section of params
that was read must be in its recipe. These lists are kept apart from those of `nemo.fingerprint`:
who leaves a file out of the hash must say so twice.
"""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from nemo import fingerprint as hashed
from nemo import recipe as recipes
from nemo.cells import Cell
from nemo.cli.main import cli
from nemo.config import EXTRAS, Params, load_params
from nemo.fingerprint import code_behind, fingerprint
from nemo.settings import settings
from tests.bad_input.project import PARAMS, images

ROOT = Path(__file__).parents[1]
# Files that run in a stage and do not decide its result, and why.
MOVES = {
    "nemo.cells": "paths",
    "nemo.cli.launch": "processes that share a batch give the same weights (test_processes)",
    "nemo.cli.main": "the command line",
    "nemo.cli.stages": "the command line",
    "nemo.cli.views": "the command line",
    "nemo.config": "the values themselves are in the recipe",
    "nemo.device": "where things are computed",
    "nemo.fields": "kinds of values",
    "nemo.files": "how files are written",
    "nemo.fingerprint": "the hash itself",
    "nemo.forms": "what MLflow shows",
    "nemo.locks": "one process at a time",
    "nemo.masking.objectives.registry": "finds what params name; the objective itself is hashed",
    "nemo.metrics": "what MLflow shows",
    "nemo.params_file": "the values themselves are in the recipe",
    "nemo.pipeline.extras": "calls the one function that its stage is hashed by",
    "nemo.pipeline.train": "calls `train_cell`, and MLflow",
    "nemo.pipeline.inputs": "reads what `nemo.data` prepared",
    "nemo.plugins": "imports the user's files, whose text is in the hash",
    "nemo.provenance": "says what made a result",
    "nemo.recipe": "the plan itself",
    "nemo.registry": "finds what params name",
    "nemo.report.collect": "what MLflow shows",
    "nemo.results": "paths and reading of finished results",
    "nemo.sections": "kinds of values",
    "nemo.settings": "the values themselves are in the recipe",
    "nemo.training.checkpoint": "resuming gives the same bits (test_fit)",
}
CHECKS = {"nemo.models.registry", "nemo.models.shapes"}  # params, where no model is built
# `nemo` itself only finds names that users import, and runs where something asks for one.
# The prepared images are an input of the stages that follow, with their hash.
PREPARED = {
    f"nemo.data.{name}"
    for name in ("errors", "folder", "images", "prepared", "sources", "splits", "stored", "tree")
}
ALL = {
    **PARAMS,
    "models": ["deit_small", "resnet18"],
    "methods": ["standard", "mwt", "nemo"],
    "subsets": ["cat+dog"],
    "architecture": {
        "resnet18": {"width": 0.0625},
        "deit_small": {"dim": 16, "depth": 2, "heads": 2, "patch": 8, "teacher": {"width": 0.0625}},
    },
    "alternatives": {
        "of": ["nemo"],
        "kinds": ["random", "pruned", "dense", "mean-masks", "standard-tuned"],
    },
    "budgets": {
        "of": ["nemo"],
        "kinds": ["pruned-global", "taylor", "tuned-pruned", "dense"],
        "epochs": [0, 0.1],
        "equal": ["parameters"],
    },
    "decompose": {"recalibrate_bn": True},
    "gap": {"of": ["nemo"]},
    "thresholds": {"of": ["nemo"], "values": [0.5]},
    "granularity": {"of": ["nemo"], "subsets": ["cat+dog"], "thresholds": [0.5]},
}
WHOLE = (*("train", "masks", "decompose", "finetune"), *EXTRAS, "evaluate")
CELLS = {  # and the stages that are watched
    ("resnet18", "standard"): ("train", "evaluate"),
    ("resnet18", "mwt"): ("train",),
    ("deit_small", "standard"): ("train",),
    ("deit_small", "nemo"): WHOLE,
    ("resnet18", "nemo"): WHOLE,
}
# Keys of params that choose what is computed, or are checked early: they decide nothing of a cell.
CHOOSE = {
    *("device", "data", "datasets", "models", "profile", "seeds", "methods", "variants", "plugins"),
    *("subsets", *EXTRAS),
}
EDGE = ("nemo.config", "nemo.settings", "nemo.recipe")  # they read everything, for all stages


@dataclass
class Ran:
    """What a stage did: modules of nemo that had a function called, sections of params it read."""

    files: set[str]
    params: set[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, dict[tuple[str, ...], Ran]]:
    """The params, and what each stage did, by (stage, model, method)."""
    root = tmp_path_factory.mktemp("ran")
    images("pets", dict.fromkeys(["cat", "dog", "owl", "pig"], 8))(root)
    (root / "params.yaml").write_text(yaml.safe_dump(ALL))
    found: dict[tuple[str, ...], Ran] = {}

    def call(*command: str, key: tuple[str, ...] = ()) -> None:
        with pytest.MonkeyPatch.context() as patch, reading(patch) as params:
            patch.chdir(root)
            result, files = watched(lambda: CliRunner().invoke(cli, command))
        assert result.exit_code == 0, result.output
        found[key or command[:1]] = Ran(files, params)

    call("prepare", "--dataset", "pets")
    for (model, method), stages in CELLS.items():
        cell = ["--dataset", "pets", "--model", model, "--method", method]
        for stage in stages:
            subset = ["--subset", "cat+dog"] if stage in ("decompose", "finetune") else []
            call(stage, *cell, *subset, key=(stage, model, method))
    call("report")
    return load_params(root / "params.yaml"), found


@contextmanager
def reading(patch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The sections of params that are read, but by the code that reads them for everybody."""
    original, read = Params.__getattribute__, set()

    def recording(self: Params, name: str) -> Any:
        reader = sys._getframe(1).f_globals["__name__"]
        if name in type(self).model_fields and reader not in EDGE:
            read.add(name)
        return original(self, name)

    def section(self: Params, name: str | None) -> Any:
        if name is not None and sys._getframe(1).f_globals["__name__"] not in EDGE:
            read.add(name)
        return None if name is None else original(self, name)

    patch.setattr(Params, "__getattribute__", recording)
    patch.setattr(Params, "section", section)
    yield read


def watched(work: Callable[[], Any]) -> tuple[Any, set[str]]:
    """What `work` returns, and the modules of nemo of whose functions it called one."""
    home, files = str(ROOT / "nemo"), set()

    def look(frame: Any, event: str, argument: object) -> None:
        # the bodies of modules and classes run where they are first imported, whatever needs them
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            files.add(frame.f_code.co_filename)

    threading.settrace(look)
    sys.settrace(look)
    try:
        result = work()
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return result, {module_of(Path(file)) for file in files if file.startswith(home)}


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


@pytest.fixture
def behind(ran: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """The modules behind the hash of a stage."""

    def names(entries: Any, plugins: Any = (), without: Any = hashed.APART) -> list[str]:
        return sorted(code_behind(entries, without))

    monkeypatch.setattr(recipes, "fingerprint", names)
    params = ran[0]

    def of(stage: str, *cell: str) -> set[str]:
        if stage == "prepare":
            return set(recipes.preparation(params, "pets")["code"])
        if stage == "report":
            return set({str(f): r for f, r in recipes.plan(params)}["report.json"]["code"])
        made = recipes.recipe(params, Cell("pets", *cell, 0), stage)
        assert made is not None
        return set(made["code"])

    return of


def test_what_runs_in_a_stage_is_behind_its_hash(ran: Any, behind: Any) -> None:
    missing = {}
    for key, did in ran[1].items():
        allowed = MOVES.keys() | {"nemo"} | (PREPARED if key != ("prepare",) else CHECKS)
        if key != ("report",):  # its page is what the report is
            allowed |= {name for name in did.files if within(name, "nemo.tracking")}
        left = did.files - behind(*key) - allowed
        if left:
            missing[key] = sorted(left)
    assert missing == {}
    needed = set().union(*(did.files for did in ran[1].values()))
    assert MOVES.keys() <= needed, "a reason for a file that does not run"


@pytest.mark.parametrize("stage", WHOLE)
@pytest.mark.parametrize(("model", "method"), CELLS)
def test_the_plan_has_the_params_that_a_stage_reads(
    ran: Any, stage: str, model: str, method: str
) -> None:
    params, did = ran
    made = recipes.recipe(params, Cell("pets", model, method, 0), stage)
    if method == "standard" and stage not in ("train", "evaluate"):
        assert made is None
    elif stage in CELLS[model, method]:
        assert made is not None
        planned = {key.split(".")[0] for key in made["settings"]}
        read = did[stage, model, method].params
        assert read - CHOOSE <= planned
        if stage != "evaluate":  # its file of results states all settings
            others = [what.params for key, what in did.items() if key[0] == stage]
            assert planned - CHOOSE <= set().union(*others)


def test_the_recipe_of_a_stage_says_what_it_is_hashed_by(behind: Any) -> None:
    train = behind("train", "resnet18", "nemo")
    assert {"nemo.masking.losses", "nemo.masking.objectives.nemo", "nemo.models.cnn"} <= train
    assert not train & {"nemo.masking.objectives.mwt", "nemo.models.vit", "nemo.cut.trace"}
    assert not any(within(name, "nemo.cut") or within(name, "nemo.module") for name in train)
    assert "nemo.masking.selectors.frequency" in behind("masks", "resnet18", "nemo")
    cut = behind("decompose", "resnet18", "nemo")
    assert {"nemo.cut.trace", "nemo.cut.rules.attention", "nemo.module.codec"} <= cut
    assert not any(within(name, "nemo.training") for name in cut)
    standard = behind("train", "resnet18", "standard")
    assert not any(within(name, "nemo.masking") for name in standard), standard
    every = {module_of(path) for path in (ROOT / "nemo/report").glob("*.py")}
    assert every - behind("report") == {"nemo.report", "nemo.report.drift"}  # names, and --check


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


IMPORT = """
import os, sys
import torch, torchvision, timm, pandas, safetensors, pydantic  # what the forks share
for entry in sys.argv[1:]:
    if not os.fork():
        __import__(entry)
        mine = sorted(name for name in sys.modules if name.split(".")[0] == "nemo")
        os.write(1, (" ".join([entry, *mine]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""


NAMES = {"nemo", "nemo.report"}  # packages that hold nothing but names that users import


def test_every_import_is_seen() -> None:
    """What Python imports with a stage's module is what reading its text finds: nothing is hidden
    in a way of importing that the hash does not know. Of packages, whose own file comes along, only
    those count that hold code."""
    entries = [f"nemo.pipeline.{name}" for name in ("prepare", "train", "masks", "decompose")]
    entries += ["nemo.pipeline.finetune", "nemo.pipeline.evaluate", *recipes.MEASURES.values()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT, *entries, "nemo.report.build"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(entries) + 1
    for entry, *rest in lines:
        mine = {name for name in rest if name not in NAMES and code_of(name)}
        assert mine <= everything_behind(entry), entry


def code_of(name: str) -> list[ast.stmt]:
    """The statements of a module, but for its docstring."""
    tree = ast.parse(hashed._file(name).read_text())
    return tree.body[bool(ast.get_docstring(tree)) :]


def everything_behind(entry: str) -> set[str]:
    found, todo = set(), [entry]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += hashed.imported(name)
    return found


# What moves the hash


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether an edit of a file changes the hash of the code behind NeMo's loss."""
    copy = tmp_path / "nemo"
    shutil.copytree(ROOT / "nemo", copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(hashed, "PACKAGE", copy)
    plugin = tmp_path / "mine.py"
    plugin.write_text('"""Mine."""\n\nX = 1\n')

    def value() -> str:
        for cached in (hashed.imported, hashed._text, hashed._tree):
            cached.cache_clear()
        return fingerprint(["nemo.masking.objectives.nemo"], [str(plugin)])

    def changes(old: str, new: str, file: str = "nemo/masking/losses.py") -> bool:
        path, before = tmp_path / file, value()
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return value() != before

    yield changes
    for cached in (hashed.imported, hashed._text, hashed._tree):
        cached.cache_clear()


LOSS = "def contrastive_loss("


def test_comments_docstrings_and_layout_do_not_count(edited: Any) -> None:
    assert not edited(LOSS, f"# why\n\n\n{LOSS}")
    assert not edited('"""', '"""Other words. ')
    assert not edited("    cohesion =", "    # what follows\n    cohesion =")
    assert not edited("return ", "return  ")
    assert not edited("X = 1", "X    =   1  # one", "mine.py")
    assert not edited("Mine.", "My own.", "mine.py")


def test_code_counts(edited: Any) -> None:
    assert edited(".clamp(min=1)", ".clamp(min=2)")
    assert edited(LOSS, f"X = 1\n\n\n{LOSS}")
    assert edited("X = 1", "X = 2", "mine.py")
    assert edited("X = 2", 'X = 2\nY = "a string that is no docstring"', "mine.py")
    assert edited("return ", "return 1 * ", "nemo/masking/objectives/nemo.py")


def test_other_code_does_not_count(edited: Any) -> None:
    for file in ("nemo/masking/objectives/mwt.py", "nemo/cut/trace.py", "nemo/files.py"):
        assert not edited("import annotations", "import annotations\n\nX = 1", file)


def test_a_file_that_is_imported_anew_counts(edited: Any, tmp_path: Path) -> None:
    (tmp_path / "nemo/masking/more.py").write_text("Y = 1\n")
    assert edited(LOSS, f"from nemo.masking.more import Y\n\n\n{LOSS}")
    assert edited("Y = 1", "Y = 2", "nemo/masking/more.py")
    assert edited("Y = 2", "def f():\n    from nemo.cut import trace", "nemo/masking/more.py")


def test_a_part_of_the_images_is_in_what_decides_and_absent_keys_are_not() -> None:
    params = load_params(ROOT / "profiles/quick.yaml")
    cell = Cell("digits", "resnet18", "standard", 0)
    part = {"limit": 9, "classes": "0-4"}
    source = params.data["digits"].model_copy(update=part)
    limited = params.model_copy(update={"data": {"digits": source}})
    without, given = (settings(p, cell, "cnn") for p in (params, limited))
    assert dict(given.items() - without.items()) == {f"data.{k}": v for k, v in part.items()}
    without, given = (recipes.preparation(p, "digits")["settings"] for p in (params, limited))
    assert dict(given.items() - without.items()) == part
    assert not part.keys() & without.keys()

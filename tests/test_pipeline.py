"""dvc.yaml against the code: what each stage reads, and what a change of params re-runs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SEVEN = {"prepare", "train", "masks", "decompose", "finetune", "evaluate", "report"}
# Code that moves results without deciding them: the typed edge of params (their values are
# tracked), files and paths, the device, checkpoints (resuming changes nothing), the MLflow view.
PLUMBING = {"cli", "config.py", "device.py", "files.py", "layout.py", "locks.py", "tracking"}
PLUMBING |= {
    "__init__.py",
    "training/__init__.py",
    "training/checkpoint.py",
    "evaluation/__init__.py",
}
CUTTING = {"decompose", "finetune", "evaluate"}  # the stages whose results depend on subsets
MODULAR_ONLY = {"identifier.py", "losses.py", "sites.py"}  # what a standard training never runs


def is_plumbing(name):
    return bool(PLUMBING & {name, name.split("/")[0]})


def command_of(stage):
    return stage.split("_")[0]


def module_file(name):
    """`nemo.a.b` -> a/b.py or a/b/__init__.py, relative to nemo/, or None."""
    path = ROOT / Path(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.exists() and name.startswith("nemo"):
            return file
    return None


def imports(tree, package):
    """Files of nemo that the code imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo"):
            for alias in node.names:  # a submodule, or a name of the package
                yield module_file(f"{node.module}.{alias.name}") or module_file(node.module)
            parts = node.module.split(".")  # importing a.b.c runs a and a.b as well
            yield from (module_file(".".join(parts[: i + 1])) for i in range(len(parts)))
        elif isinstance(node, ast.Import):
            yield from (module_file(a.name) for a in node.names if a.name.startswith("nemo"))


def code_behind(command):
    """Every file of nemo that a command's function imports, directly or not."""
    source = ast.parse((ROOT / "nemo/cli/stages.py").read_text())
    if command == "report":
        source = ast.parse((ROOT / "nemo/cli/views.py").read_text())
    helpers = {n.name: n for n in source.body if isinstance(n, ast.FunctionDef)}
    wanted = [helpers[command]]
    names = {n.id for n in ast.walk(wanted[0]) if isinstance(n, ast.Name)}  # called or handed on
    wanted += [helpers[name] for name in names - {command} if name in helpers]
    todo = [file for tree in wanted for file in imports(tree, "nemo") if file]
    found = set()
    while todo:
        file = todo.pop()
        name = str(file.relative_to(ROOT / "nemo"))
        if file not in found and not is_plumbing(name):
            found.add(file)
            todo += [f for f in imports(ast.parse(file.read_text()), "nemo") if f]
    return {str(file.relative_to(ROOT / "nemo")) for file in found}


def declared(stage):
    """Files of nemo among a stage's dependencies."""
    files = set()
    for dep in STAGES[stage]["deps"]:
        path = ROOT / dep
        if dep.startswith("nemo/"):
            found = path.rglob("*.py") if path.is_dir() else [path]
            files |= {str(file.relative_to(ROOT / "nemo")) for file in found}
            assert path.exists(), dep
    return files


def test_the_stages_are_the_seven():
    assert {command_of(stage) for stage in STAGES} == SEVEN
    assert {p.stem for p in (ROOT / "stages").glob("*.py")} == SEVEN | {"__init__", "common"}
    for stage, block in STAGES.items():
        assert block["cmd"].startswith(f"python -m stages.{command_of(stage)}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_the_code_that_decides_its_result(stage):
    behind = code_behind(command_of(stage))
    if stage == "train_standard":
        behind -= MODULAR_ONLY
    if stage != "prepare":  # what it made is a dependency itself, with its hash
        used = {"data/batches.py"} | ({"data/subsets.py"} if stage in CUTTING else set())
        behind = {f for f in behind if not f.startswith("data/") or f in used}
    assert declared(stage) == behind


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The pipeline with everything 'made': every output a small file, committed to dvc.lock."""
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root)
    for name in ("nemo", "stages"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", root / ".dvc/config")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    for name, outs in outputs(root).items():
        for out in outs:
            path = root / out
            if path.suffix != ".json":
                path = path / "file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    dvc(root, "commit", "-f", "-q")
    return root


def dvc(root, *arguments):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.stdout + done.stderr


def outputs(root):
    lines = [line.split() for line in dvc(root, "stage", "list").splitlines()]
    return {name: [o.rstrip(",") for o in outs] for name, _, *outs in lines}


def rerun(project, key, old, new):
    """The stages that a change of a line of params.yaml makes DVC run, without those downstream."""
    file = project / "params.yaml"
    text = file.read_text()
    assert old in text, key
    try:
        file.write_text(text.replace(old, new, 1))
        out = dvc(project, "repro", "--dry", "--keep-going")
    finally:
        file.write_text(text)
    return set(re.findall(r"Running stage '([^']+)'", out)), out


def test_nothing_runs_twice(project):
    assert "Running stage" not in dvc(project, "repro", "--dry")


def test_tau_reruns_exactly_the_nemo_cells(project):
    stages, _ = rerun(project, "loss.tau", "tau: 0.2", "tau: 0.5")
    expected = {f"train_nemo@digits-{model}-0" for model in ("resnet18", "vit_small")}
    assert stages == expected | {"report"}


def test_mwts_weights_rerun_exactly_the_mwt_cells(project):
    stages, _ = rerun(project, "mwt.beta", "beta: {cnn: 1.5", "beta: {cnn: 1.0")
    expected = {f"train_mwt@digits-{model}-0" for model in ("resnet18", "vit_small")}
    assert stages == expected | {"report"}


def test_a_new_subset_reruns_no_training(project):
    stages, out = rerun(project, "subsets", "subsets: [0+1,", "subsets: [2+3, 0+1,")
    cut = {
        f"decompose@digits-{model}-{method}-0-2+3"
        for model in ("resnet18", "vit_small")
        for method in ("mwt", "nemo")
    }
    assert cut <= stages
    assert not any(stage.startswith(("prepare", "train", "masks")) for stage in stages), out
    assert not any("0-4" in stage for stage in stages)


def test_leaving_mwt_out_touches_no_other_training(project):
    stages, _ = rerun(
        project, "methods", "methods: [standard, mwt, nemo]", "methods: [standard, nemo]"
    )
    trained = {stage for stage in stages if stage.startswith("train")}
    assert trained == {f"train_mwt@digits-{model}-0" for model in ("resnet18", "vit_small")}


def test_a_stage_says_in_one_line_what_is_wrong_with_the_params(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("tau: 0.2", "tau: -0.2"))
    done = subprocess.run(
        [sys.executable, "-m", "stages.train", "digits", "resnet18", "mwt", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("nemo: params.yaml: loss.tau: ")

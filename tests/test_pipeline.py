"""dvc.yaml and the plan: what a change of params or of code re-runs, and nothing else."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo.cells import Cell, targets
from nemo.config import load_params
from nemo.fingerprint import code_behind, fingerprint
from nemo.recipe import recipe
from stages.plan import given_up

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
SEVEN = {"prepare", "train", "masks", "decompose", "finetune", "evaluate", "report"}
MORE = {"plan", "plugin", "alternatives", "budgets", "gap", "granularity", "thresholds"}
MODELS = ("resnet18", "vit_small")
VARIANTS = """variants:
  tau-0.1: {method: nemo, loss.tau: 0.1}
  wide: {method: nemo, loss.form: released}
"""


def test_the_seven_stages_are_there_and_each_calls_its_file():
    assert set(STAGES) == SEVEN | MORE
    for stage, block in STAGES.items():
        block = block.get("do", block)
        name = re.match(r"python -m stages\.(\w+)", block["cmd"])[1]
        assert name in (stage, "extra")
        assert (ROOT / "stages" / f"{name}.py").is_file()


def test_no_stage_lists_code_but_the_plan():
    for stage, block in STAGES.items():
        code = [dep for dep in block.get("deps", []) if dep.startswith(("nemo", "stages"))]
        assert code == (["nemo"] if stage == "plan" else []), stage


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The pipeline with everything 'made': the plan, and every output a small file in dvc.lock."""
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root)
    text = (root / "params.yaml").read_text()
    methods = "methods: [standard, mwt, nemo, tau-0.1, wide]"
    text = re.sub(r"methods: \[.*\]", methods, text)
    text = re.sub(r"variants: .*\n.*\n", VARIANTS, text)
    text = text.replace("plugins: []", "plugins: [mine.py]")
    assert VARIANTS in text
    (root / "params.yaml").write_text(text)
    (root / "mine.py").write_text('"""A file of the user\'s own."""\nX = 1\n')
    for name in ("nemo", "stages", "plugins", "subsets"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", root / ".dvc/config")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    planned = dvc(root, "repro", "plan")
    assert (root / "plan/report.json").is_file(), planned
    for name, outs in outputs(root).items():
        for out in outs if name != "plan" and not name.startswith("plugin@") else ():
            path = root / out
            if path.suffix != ".json":
                path = path / "file"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    dvc(root, "commit", "-f", "-q")
    return root


def environment():
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # stages call `python`
    return {**os.environ, "PATH": here, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}


def dvc(root, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.stdout + done.stderr


def outputs(root):
    lines = [re.split(r"\s+Outputs ", line) for line in dvc(root, "stage", "list").splitlines()]
    return {name: outs.strip().split(", ") for name, outs in lines}


def rerun(project, file, old, new):
    """The stages that a change of a file makes DVC run, without those downstream of them."""
    path, plan = project / file, project / "plan"
    text, kept = path.read_text(), project.parent / "plan"
    assert old in text
    shutil.copytree(plan, kept)
    try:
        path.write_text(text.replace(old, new, 1))
        # what DVC does first; without it, as to start it twice more takes most of a test
        stage = [sys.executable, "-m", "stages.plan"]
        subprocess.run(stage, cwd=project, env=environment(), check=True, timeout=240)
        out = dvc(project, "repro", "--dry", "--keep-going")
    finally:
        path.write_text(text)
        shutil.rmtree(plan)
        kept.rename(plan)
    stages = set(re.findall(r"Running stage '([^']+)'", out))
    assert "plan" in stages or file == "mine.py", out
    return {stage for stage in stages if not stage.startswith("pl")}, out


def cells(stage, *methods, models=MODELS, subset=""):
    ends = [f"-{subset}" if subset else ""]
    return {f"{stage}@digits-{model}-{method}-0{end}"
            for model in models for method in methods for end in ends}  # fmt: skip


def both(*methods, models=MODELS):
    return cells("train", *methods, models=models) | cells("evaluate", *methods, models=models)


def test_nothing_runs_twice(project):
    assert "Running stage" not in dvc(project, "repro", "--dry")


def test_each_cell_may_run_beside_the_others(project):
    command = "from nemo.cli import main; main(['cells', '--dvc'])"
    listed = subprocess.run(
        [sys.executable, "-c", command],
        cwd=project, env={**environment(), "PYTHONPATH": str(project)},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    made = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    maker = {out["path"]: name for name, stage in made.items() for out in stage["outs"]}
    shared = ("plan", "plugin@mine.py", "prepare@digits", "report")
    lines = [shlex.split(line) for line in listed.splitlines()]
    assert sorted(shlex.split(listed)) == sorted(set(made) - set(shared))
    for line in lines:
        for position, name in enumerate(line):
            needs = {maker.get(dep["path"]) for dep in made[name]["deps"]}
            assert needs <= {None, *shared, *line[:position]}, name


def test_what_reads_another_cell_waits_for_the_end():
    params = load_params(ROOT / "profiles/cifar10-cpu.yaml")
    for cell in [Cell("cifar10", "vgg16", "nemo", seed) for seed in params.seeds]:
        listed = " ".join(targets(params, cell))
        assert "gap@cifar10-vgg16-nemo-" in listed
        assert "alternatives@" not in listed
        assert "evaluate@" not in listed


def test_tau_reruns_the_nemo_cells_and_the_variants_that_do_not_override_it(project):
    stages, _ = rerun(project, "params.yaml", "tau: 0.2", "tau: 0.5")
    # what follows from a training is not listed, but each file of results states tau
    assert stages == both("nemo", "wide") | {"report"}


def test_a_value_for_one_family_reruns_its_models_alone(project):
    stages, _ = rerun(project, "params.yaml", "alpha: {cnn: 2.0", "alpha: {cnn: 1.5")
    assert stages == both("nemo", "tau-0.1", "wide", models=["resnet18"]) | {"report"}


def test_mwts_weights_rerun_exactly_the_mwt_cells(project):
    stages, _ = rerun(project, "params.yaml", "beta: {cnn: 1.5", "beta: {cnn: 1.0")
    assert stages == both("mwt", models=["resnet18"]) | {"report"}


def test_a_variant_reruns_itself(project):
    stages, _ = rerun(project, "params.yaml", "loss.tau: 0.1", "loss.tau: 0.15")
    assert stages == both("tau-0.1") | {"report"}


def test_a_param_that_changes_no_weight_is_stated_anew(project):
    stages, _ = rerun(project, "params.yaml", "  momentum: 0.9  ", "  momentum: 0.8  ")
    every = ("standard", "mwt", "nemo", "tau-0.1", "wide")
    assert stages == both(*every) | {"report"}


def test_a_template_of_the_report_reruns_the_report_alone(project):
    stages, _ = rerun(project, "nemo/report/page.html", "<head>", "<head >")
    assert stages == {"report"}
    stages, _ = rerun(
        project, "nemo/report/words.py", "import annotations", "import annotations\nX = 1"
    )
    assert stages == {"report"}


def test_bytecode_is_no_dependency(project):
    folder = project / "nemo/__pycache__"
    folder.mkdir()
    (folder / "cells.cpython-311.pyc").write_bytes(b"")
    assert "Running stage" not in dvc(project, "repro", "--dry")


def test_a_new_subset_reruns_no_training(project):
    stages, out = rerun(project, "params.yaml", "subsets: [0+1,", "subsets: [2+3, 0+1,")
    assert cells("decompose", "mwt", "nemo", subset="2+3") <= stages
    assert not any(stage.startswith(("prepare", "train", "masks")) for stage in stages), out
    assert not any("0-4" in stage for stage in stages)


def test_subsets_with_names_are_stages_and_folders_of_these_names(project):
    new = "subsets: {'0+1': 0+1, ten: random:10@3, all: all, few: file:subsets/README.md}"
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("subsets: [0+1, 0-4, all]", new))
    try:
        outs = outputs(project)
    finally:
        (project / "params.yaml").write_text(text)
    folder = "runs/digits/resnet18/nemo-0/modules"
    for name in ("ten", "few", "0+1"):
        assert outs[f"decompose@digits-resnet18-nemo-0-{name}"] == [f"{folder}/{name}"]


def test_a_line_of_a_file_of_names_reruns_the_plan(project):
    file = project / "subsets/README.md"
    text = file.read_text()
    file.write_text(text + "another line\n")
    try:
        assert "subsets" in dvc(project, "status", "plan")
    finally:
        file.write_text(text)


def test_leaving_a_method_out_trains_nothing(project):
    old, new = "[standard, mwt, nemo, tau-0.1, wide]", "[standard, nemo, tau-0.1, wide]"
    stages, _ = rerun(project, "params.yaml", old, new)
    assert stages == {"report"}


def test_a_docstring_of_a_loss_reruns_nothing(project):
    file = "nemo/masking/losses.py"
    stages, _ = rerun(project, file, "MwT's loss (arXiv", "The loss of MwT (arXiv")
    assert stages == set()


def test_the_code_of_a_loss_reruns_what_it_decides(project):
    stages, _ = rerun(project, "nemo/masking/losses.py", ".clamp(min=1)", ".clamp(min=1.0)")
    assert stages == cells("train", "mwt", "nemo", "tau-0.1", "wide") | {"report"}


def test_the_code_of_the_cutter_retrains_nothing(project):
    stages, _ = rerun(
        project, "nemo/cut/difference.py", "max(float(theirs.std()), ", "max(theirs.std(), "
    )
    assert {stage.split("@")[0] for stage in stages} == {"decompose", "report"}
    assert not any("standard" in stage for stage in stages)


def test_a_plugin_is_a_dependency_of_every_stage(project):
    stages, _ = rerun(project, "mine.py", "X = 1", "X = 2")
    assert cells("train", "standard", "mwt", "nemo", "tau-0.1", "wide") <= stages
    assert cells("evaluate", "standard", "nemo") <= stages
    comment, _ = rerun(project, "mine.py", "X = 1", "X = 1  # one")
    assert comment == set()


def test_a_recipe_holds_the_code_and_the_params_that_a_stage_uses():
    params = load_params(ROOT / "params.yaml")
    made = recipe(params, Cell("digits", "resnet18", "nemo", 0), "train")
    assert made["settings"]["loss.tau"] == 0.2
    assert made["settings"]["loss.alpha"] == 2.0
    assert "train.processes" not in made["settings"]  # how many share the work decides nothing
    assert recipe(params, Cell("digits", "resnet18", "standard", 0), "masks") is None
    behind = code_behind(["nemo.masking.objectives.nemo"])
    assert {"nemo.masking.losses", "nemo.masking.objectives.nemo"} <= behind
    assert "nemo.masking.objectives.mwt" not in behind
    assert len(fingerprint(["nemo.predict"])) == 64


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


def test_the_plan_is_readable_json(project):
    file = project / "plan/digits/vit_small/tau-0.1/train.json"
    assert json.loads(file.read_text())["settings"]["loss.tau"] == 0.1


def test_what_a_plugin_imports_counts_as_its_code(tmp_path):
    plain, using = tmp_path / "plain.py", tmp_path / "using.py"
    plain.write_text("X = 1\n")
    using.write_text("from nemo.masking.losses import mwt_terms\n")
    assert "nemo.masking.losses" in code_behind({"nemo.masking.losses"})
    whole = fingerprint(["nemo.predict", "nemo.masking.losses"], [str(using)])
    assert fingerprint(["nemo.predict"], [str(using)]) == whole
    assert fingerprint(["nemo.predict"], [str(plain)]) != fingerprint(
        ["nemo.predict", "nemo.masking.losses"], [str(plain)]
    )


def test_the_stage_of_a_plugin_leaves_the_file_alone(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("X = 1\n")
    project = tmp_path / "project"
    project.mkdir()
    for path, code in ((str(mine), 0), ("../mine.py", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "stages.plugin", path],
            cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        )  # fmt: skip
        assert done.returncode == code
        assert mine.read_text() == "X = 1\n"


@pytest.mark.parametrize("text", ["", "stages:\n", "stages:\n  a:\n", "stages: {a: {outs: null}}"])
def test_an_empty_lock_has_given_up_nothing(tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    assert list(given_up(load_params(ROOT / "params.yaml"), tmp_path / "dvc.lock")) == []

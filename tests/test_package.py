"""The package itself: its public names, and what importing them costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nemo

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_there():
    assert all(callable(getattr(nemo, name)) for name in nemo.__all__)


def test_reading_params_and_results_needs_no_torch_and_training_no_pandas():
    code = (
        "import sys; sys.modules['pandas'] = sys.modules['mlflow'] = sys.modules['dvc'] = None; "
        "import nemo, nemo.cli, nemo.tracking, nemo.config, nemo.cells; "
        "assert 'torch' not in sys.modules; import nemo.training.cell, nemo.training.finetune"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_help_imports_nothing_heavy_and_a_command_leaves_quickly():
    code = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(gc.get_freeze_count(), *sys.modules))\n"  # called last
        "from nemo.cli import main; main(['train', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    frozen, *loaded = done.stdout.splitlines()[-1].split()
    assert int(frozen) > 10_000
    heavy = {"torch", "torchvision", "timm", "mlflow", "pandas", "matplotlib", "sklearn", "onnx"}
    assert not heavy & set(loaded)


def test_the_locked_versions_are_plain_and_within_the_ranges():
    _, *lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = {canonicalize_name(name): v for name, v in (line.split("==") for line in lines)}
    assert all(set(version) <= set("0123456789.abrcpost") for version in locked.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for group in project["optional-dependencies"].values() for line in group]
    for wanted in map(Requirement, [*project["dependencies"], *extras]):
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)]), wanted

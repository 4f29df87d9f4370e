"""Two hundred classes, and subsets of them that have names, through the commands of the stages."""

import copy
import json

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from nemo.cli.main import cli
from nemo.config import check_params, load_params
from nemo.fields import ParamsError
from nemo.recipe import plan, recipe
from tests.test_config import DEFAULT

CLASSES, IMAGES = 200, 4
NAMES = [f"kind of thing {number:03}" for number in range(CLASSES)]
FIFTY = "+".join(NAMES[::4])
DRAWN = sorted(np.random.default_rng(3).permutation(CLASSES)[:10].tolist())
SUBSETS = {
    "few": "file:subsets/few.txt", "ten": "random:10@3", "fifty": FIFTY, "range": "150-199",
}  # fmt: skip
MANY = {
    **DEFAULT,
    "datasets": ["many"],
    "models": ["resnet18"],
    "methods": ["standard", "nemo"],
    "subsets": SUBSETS,
    "data": {"many": {"source": "folder:images", "size": 16, "validation": 0.3}},
    "architecture": {"resnet18": {"width": 0.0625}},
    "train": {**DEFAULT["train"], "epochs": 1, "at_chance": "keep"},
    "finetune": {**DEFAULT["finetune"], "epochs": 1},
}


def call(*command):
    return CliRunner().invoke(cli, command)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The results of a standard and a modular cell, and their report."""
    root = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for name in NAMES:
        (root / "images" / name).mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{number}.png")
    (root / "subsets").mkdir()
    (root / "subsets/few.txt").write_text(f"{NAMES[7]}\n\n{NAMES[3]}\n")
    (root / "params.yaml").write_text(yaml.safe_dump(MANY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        cell = ["--dataset", "many", "--model", "resnet18"]
        for command in (
            ["plan"],
            ["run", *cell, "--method", "standard"],
            ["run", *cell],
            ["report"],
        ):
            done = call(*command)
            assert done.exit_code == 0, done.output
        yield root


def test_modules_are_of_the_classes_that_names_stand_for(project):
    file = project / f"results/{MANY['profile']}/many/resnet18/nemo-0.json"
    result = json.loads(file.read_text())
    found = {row["subset"]: row["classes"] for row in result["modules"]}
    expected = {"few": [7, 3], "ten": DRAWN, "fifty": list(range(0, 200, 4))}
    assert found == {**expected, "range": list(range(150, 200))}
    assert {path.name for path in project.glob("runs/*/*/nemo-0/finetuned/*")} == set(SUBSETS)


def test_tables_name_subsets_and_captions_say_what_they_are(project):
    text = (project / f"reports/{MANY['profile']}/T2-modules.md").read_text()
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) < 250
    assert "ten: random:10@3 (10 classes)" in text
    assert "few: file:subsets/few.txt (2 classes)" in text
    assert f"fifty: {NAMES[0]}+{NAMES[4]}+{NAMES[8]}+...+{NAMES[196]}"[:57] in text
    assert "(50 classes)" in text
    assert NAMES[100] not in text

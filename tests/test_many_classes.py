"""Two hundred classes, and subsets of them that have names, through the commands of the stages."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from nemo.cells import cells
from nemo.cli.main import cli
from nemo.config import check_params, load_params
from nemo.fields import ParamsError
from nemo.recipe import recipe
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
    assert f"fifty: {FIFTY[:57]}... (50 classes)" in text
    assert NAMES[100] not in text


def test_no_labels_of_figures_overlap(project, monkeypatch):
    drawn = []

    def checked(figure, path, **how):
        save(figure, path, **how)
        for axis in (one for panel in figure.axes for one in (panel.xaxis, panel.yaxis)):
            texts = [text for text in axis.get_ticklabels() if text.get_text()]
            # as saved: style.SETTINGS
            boxes = [text.get_window_extent(dpi=150) for text in texts if text.get_visible()]
            for first, second in pairwise(boxes):
                assert not first.overlaps(second), (path, texts)
            drawn.append(len(boxes))

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", checked)
    done = call("report")
    assert done.exit_code == 0, done.output
    assert max(drawn) == 40  # of the 200 classes


def test_lines_of_a_file_decide_its_subset_and_no_training(project):
    params = load_params(project / "params.yaml")
    cell = next(cell for cell in cells(params) if cell.method == "nemo")
    stages = ("train", "masks", "decompose", "finetune", "evaluate")
    before = [recipe(params, cell, stage) for stage in stages]
    file = project / "subsets/few.txt"
    text = file.read_text()
    file.write_text(f"{NAMES[7]}\n{NAMES[5]}\n")
    try:
        after = [recipe(params, cell, stage) for stage in stages]
        changed = [s for s, one, two in zip(stages, before, after, strict=True) if one != two]
        assert changed == ["decompose", "evaluate"]  # a module that changes is fine-tuned again
        assert after[2]["settings"]["subsets"]["few"] == [NAMES[7], NAMES[5]]
        assert "the classes of 'few' are others now" in call("report").output
        again = call("run", "--dataset", "many", "--model", "resnet18")
        assert again.exit_code == 0, again.output
        made = [line for line in again.output.splitlines() if not line.startswith("results of")]
        assert [line.split("nemo-0")[1].removesuffix(".json") for line in made] == [
            "/modules/few", "/finetuned/few", ""
        ]  # fmt: skip
    finally:
        file.write_text(text)


def test_params_without_names_have_the_recipes_they_had():
    params = check_params(copy.deepcopy(DEFAULT))
    cell = next(cell for cell in cells(params) if cell.method == "nemo")
    assert params.model_dump()["subsets"] == DEFAULT["subsets"]
    assert recipe(params, cell, "evaluate")["settings"]["subsets"] == DEFAULT["subsets"]
    assert "subsets" not in recipe(params, cell, "decompose")["settings"]


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ({"few": "file:subsets/none.txt"}, "subsets: 'file:subsets/none.txt': No such file"),
        ({"few": "file:subsets"}, "subsets: 'file:subsets': Is a directory"),
        ({"a/b": "0-4"}, "subsets: 'a/b' is no name of a subset, for its '/'"),
        (["random:10@3"], "subsets: 'random:10@3' is no name of a subset, for its '@'; .* a name"),
        ([FIFTY], r"is no name of a subset; accepted: .*\{ten: random:10@3\}"),
        (["0-4", "0-4"], "subsets: .* names something twice"),
        ({}, "subsets: dictionary should have at least 1 item"),
    ],
)
def test_subsets_that_no_stage_could_have_are_refused(tmp_path, monkeypatch, subsets, message):
    (tmp_path / "subsets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=message) as raised:
        check_params({**copy.deepcopy(DEFAULT), "subsets": subsets})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("subsets", "message"),
    [
        ({"ten": "random:11@3"}, "subset 'random:11@3': accepted: random:1@3 to random:10@3"),
        ({"few": "file:few.txt"}, "subsets.few: 'file:few.txt'; accepted: files in subsets/"),
        ({"few": "file:subsets/few.txt"}, "'kind of thing 007' is no class"),
        ({"a": "random:10@3", "b": "0-9"}, "'a' and 'b' are the same classes"),
    ],
)
def test_the_plan_refuses_subsets_that_do_not_fit(monkeypatch, tmp_path, subsets, message):
    (tmp_path / "few.txt").write_text("1\n2\n")
    (tmp_path / "subsets").mkdir()
    (tmp_path / "subsets/few.txt").write_text(NAMES[7])
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**DEFAULT, "subsets": subsets}))
    monkeypatch.chdir(tmp_path)
    done = call("plan")
    assert (done.exit_code, message in done.output) == (1, True), done.output
    assert len(done.output.splitlines()) == 1
    assert not (tmp_path / "plan").exists()

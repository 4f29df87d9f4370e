"""The README is true: its Python runs, its commands exist, its numbers are those of the report."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

import nemo
from nemo.cli.main import cli
from nemo.models import build_model
from tests.test_models import SMALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci/run").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "plugins/README.md"]


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line]) <= 11
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 10
    names = {
        "model": build_model("resnet18", 10, 16, SMALL["resnet18"]),
        "images": images,
        "labels": labels,
        "alpha": 0.5,
        "loader": [(images, labels)],
        "loader_of_3_and_5": [(images[:4], torch.tensor([0, 1, 0, 1]))] * 3,
    }
    exec(example, names)
    assert names["loss"].requires_grad
    module = nemo.load("three-five")
    assert torch.equal(module(images), names["module"](images))
    assert module(images).shape == (40, 2)
    parent = sum(p.numel() for p in names["model"].parameters())
    assert sum(p.numel() for p in module.parameters()) < parent


def commands():
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.S):
            yield from ((document.name, line) for line in block.splitlines())


@pytest.mark.parametrize(("document", "command"), list(commands()))
def test_a_command_is_one_that_ci_runs(document, command):
    """CI runs `make repro` and `make test` itself, and the other blocks line by line."""
    if command.startswith("make "):
        assert re.search(rf"\b{command}\b", CI)
    else:
        assert re.search(rf"^sh_blocks .*\b{re.escape(document)}\b", CI, re.M)
    if command.startswith("nemo "):
        arguments = command.split()[1:]
        assert CliRunner().invoke(cli, [arguments[0], "--help"]).exit_code == 0
        options = {o for p in cli.commands[arguments[0]].params for o in p.opts}
        assert {a for a in arguments if a.startswith("--")} <= options


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_it(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not target.startswith("https://"):
            name, _, heading = target.partition("#")
            file = document.parent / name if name else document
            assert file.exists(), target
            assert not heading or heading in headings(file), target


def headings(file):
    """The anchors of a Markdown file, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
    return [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_results_table_is_the_reports():
    (shown,) = re.findall(r"<!-- results -->\n(.*?)<!-- /results -->", README, re.S)
    numbers = set(re.findall(r"\d+\.\d+", shown))
    assert len(numbers) > 10
    report = (ROOT / "reports/quick/T2-modules.md").read_text()
    assert numbers <= set(re.findall(r"\d+\.\d+", report))


def test_the_studys_figures_are_those_of_its_report():
    figures = set(re.findall(r"[+-]\d\.\d ± \d\.\d", (ROOT / "docs/study.md").read_text()))
    assert len(figures) > 10
    tables = ROOT / "reports/cifar10-cpu"
    shown = "".join((tables / f"{name}.md").read_text() for name in ("T7-headline", "alternatives"))
    assert {figure for figure in figures if figure not in shown} == set()


def test_the_readme_begins_with_the_two_commands_and_stays_within_two_screens():
    first = README.index("```sh\nmake repro\nmake test\n```")
    assert README[:first].count("\n") < 12
    before_details = README[: README.index("## Change something")]
    assert before_details.count("\n") < 70


def test_the_workflow_is_yaml_and_runs_the_script():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run") for step in workflow["jobs"]["check"]["steps"]]
    assert ".ci/run" in steps

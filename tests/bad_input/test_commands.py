"""Everything that people get wrong, one row each: one clear line, and nothing is left behind.

A row of the command line is one mistake in a small finished project: what is spoilt in it, the
command, and what the line must hold. Each ends with exit code 1, one line on stderr that begins
with `nemo: `, no traceback, in under 5 s of CPU time beside torch's import, and with every file as
it was. A command that is not even well-formed is click's own error: its usage, and one line that
begins with `Error`, and exit code 2.
"""

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nemo.cli.main import cli
from tests.bad_input.commands import ROWS, USAGE
from tests.bad_input.project import CELL, ROOT, SECONDS, files, make_project, write

# run as DVC runs them: in a process of their own
PROCESSES = ("tau zero", "not trained", "prepared images damaged", "training diverges")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    return root


@pytest.fixture
def copy(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    shutil.copytree(project, root)
    monkeypatch.chdir(root)
    return root


def check(root: Path, before: dict[str, str], code: int, stderr: str, message: str) -> None:
    assert code == 1, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("nemo: ")
    assert message in line
    assert files(root) == before


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_one_line_and_leaves_nothing(name: str, copy: Path) -> None:
    row = ROWS[name]
    row.spoil(copy)
    before, begin = files(copy), time.process_time()
    result = CliRunner().invoke(cli, row.command.split())
    assert time.process_time() - begin < SECONDS
    check(copy, before, result.exit_code, result.stderr, row.message)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_damaged_result_of_another_profile_is_nobodys_business(copy: Path) -> None:
    write("results/other/pets/resnet18/nemo-0.json", b"{")(copy)
    for command in (f"evaluate {CELL}", "report"):
        result = CliRunner().invoke(cli, command.split())
        assert result.exit_code == 0, result.output
    assert (copy / "results/other/pets/resnet18/nemo-0.json").read_bytes() == b"{"


@pytest.mark.parametrize("name", USAGE)
def test_a_command_that_is_not_well_formed_is_a_usage_error(name: str, copy: Path) -> None:
    command, message = USAGE[name]
    before = files(copy)
    result = CliRunner().invoke(cli, command.split())
    assert result.exit_code == 2
    usage, *_, line = result.stderr.splitlines()
    assert usage.startswith("Usage: ")
    assert line.startswith("Error: ")
    assert message in line
    assert files(copy) == before


@pytest.fixture(scope="module")
def imports() -> float:
    """Seconds of CPU time: 2 on one machine of CI, 4 on another."""
    return child("import torch")[0]


@pytest.mark.parametrize("name", PROCESSES)
def test_the_same_in_a_process_of_its_own(name: str, imports: float, copy: Path) -> None:
    row = ROWS[name]
    row.spoil(copy)
    before = files(copy)
    spent, done = child("from nemo.cli import main; main()", *row.command.split())
    assert spent < imports + SECONDS * (1 + ("train" in row.command))
    check(copy, before, done.returncode, done.stderr, row.message)


def child(code: str, *args: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A Python process's seconds of CPU time, and how it ended."""
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime, done


def test_there_are_as_many_as_the_documentation_says() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    for table in (ROWS, USAGE):
        assert f"| {len(table)} commands |" in text

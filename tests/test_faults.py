"""What a command meets from outside: signals, a full disk, a folder that may only be read."""

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from nemo.cli.main import cli
from nemo.data import load
from nemo.files import new_folder, write_json
from nemo.locks import locked
from nemo.training.checkpoint import Checkpoint
from stages.common import run as stage
from tests.bad_input.project import CELL, MODULE, ROOT, all_of, files, make_project, params


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_project(root)
    for command in (f"evaluate {CELL}", "report"):
        assert call(command, root).exit_code == 0
    return root


def call(command: str, root: Path) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return CliRunner().invoke(cli, command.split())


# Each stage, and the file that outgrows the disk at this many bytes.
STAGES = {
    "prepare --dataset pets": (1000, "arrays.safetensors: File too large"),
    f"train {CELL}": (1000, "last.pt: File too large"),
    f"train {CELL} --method standard": (100, "key.json: File too large"),
    f"masks {CELL}": (1000, "masks.safetensors: File too large"),
    f"decompose {CELL} --subset all": (1000, "module.safetensors: File too large"),
    f"finetune {CELL} --subset cat+dog": (1000, "module.safetensors: File too large"),
    f"evaluate {CELL}": (100, "nemo-0.json: File too large"),
    f"run {CELL} --seed 3": (100, ": File too large"),
    "plan": (100, ".json: File too large"),
    "report": (100, "T1-models-pets.png: File too large"),
    f"export {MODULE} --to pt2": (1000, "module.pt2"),
}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system writes no file beyond this many bytes: it stops where a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", STAGES)
def test_a_full_disk_is_one_line_and_leaves_the_last_good_state(command, project, tmp_path):
    root = shutil.copytree(project, tmp_path / "project")
    before, (size, message) = files(root), STAGES[command]
    with largest_file(size):
        result = call(command, root)
    check(result, message)
    assert files(root) == before


def check(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("nemo: ")
    assert message in line


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"epoch": 1})
    with largest_file(2000), pytest.raises(OSError, match="File too large") as caught:
        checkpoint.save({"epoch": 2, "weights": torch.zeros(10000)})
    assert caught.value.filename == str(tmp_path / "last.pt")
    assert checkpoint.load(torch.device("cpu")) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [tmp_path / "last.pt"]


def test_a_json_that_does_not_fit_leaves_the_one_before(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        write_json(tmp_path / "a.json", list(range(100)))
    assert files(tmp_path).keys() == {"a.json"}
    assert (tmp_path / "a.json").read_text() == "1\n"


@contextmanager
def reader(root: Path) -> Iterator[None]:
    """Everybody may read below `root` and nobody write; root is somebody else for so long."""
    _set_modes(root, 0o555, 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        _set_modes(root, 0o755, 0o644)


def _set_modes(root: Path, folder: int, file: int) -> None:
    for path in [root, *root.rglob("*")]:
        path.chmod(folder if path.is_dir() else file)


@pytest.mark.parametrize("command", STAGES)
def test_a_folder_that_may_only_be_read_is_one_line_and_stays_as_it_is(command, project):
    with tempfile.TemporaryDirectory() as temporary:  # whose parents everybody may enter
        Path(temporary).chmod(0o755)
        root = shutil.copytree(project, Path(temporary) / "project")
        before = files(root)
        with reader(root):
            if not os.access(ROOT / "nemo", os.R_OK | os.X_OK, effective_ids=True):
                pytest.skip("the checkout can be read by root alone")
            result = call(command, root)
        check(result, ": Permission denied")
        assert files(root) == before


def test_a_stage_that_cannot_make_its_lock_is_one_line(tmp_path, monkeypatch):
    (tmp_path / ".checkpoints").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^nemo: \.checkpoints: File exists$"):
        stage("masks", "--dataset", "pets")


def half(out, error):
    with new_folder(out) as folder:
        (folder / "file").write_text("half")
        raise error


def test_a_folder_appears_whole_or_stays_what_it_was(tmp_path):
    out = tmp_path / "out"
    for text in ("first", "second"):
        with new_folder(out) as folder:
            (folder / "file").write_text(text)
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            half(out, error)
    (tmp_path / ".out.partial").mkdir()  # as kill -9 leaves it
    (tmp_path / ".out.former.partial").mkdir()
    with new_folder(out) as folder:
        (folder / "file").write_text("third")
    assert {p.name: p.read_text() for p in tmp_path.rglob("file")} == {"file": "third"}
    assert list(tmp_path.iterdir()) == [out]


# A job in the background ignores SIGINT, and so do the processes that its tests start.
RUN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from nemo.cli import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_which_goes_on_from_its_last_epoch(number, project, tmp_path):
    root = shutil.copytree(project, tmp_path / "project")
    all_of(params("train.epochs", 500), params("train.lr", 0.001))(root)
    before = files(root)
    command = [sys.executable, "-c", RUN]
    command += f"train {CELL} --seed 1".split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(
        command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True
    )
    while not list(root.glob(".checkpoints/*/last.pt")):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(number)
    assert running.communicate()[1].splitlines()[-1] == "nemo: stopped"
    assert running.returncode == 130
    (kept,) = root.glob(".checkpoints/*")
    assert sorted(path.name for path in kept.iterdir()) == ["key.json", "last.pt"]
    history = Checkpoint(kept).load(torch.device("cpu"))["history"]
    assert [row["epoch"] for row in history] == list(range(1, len(history) + 1))
    new = files(root).keys() - before.keys()
    assert all(name.startswith(".checkpoints/") for name in new)


def hold(path, started):
    with locked(path):
        started.set()
        time.sleep(1.0)


def test_a_stage_waits_for_an_orphan_of_its_own(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    orphan = context.Process(target=hold, args=(tmp_path / "lock", started))
    orphan.start()
    assert started.wait(60)
    begin = time.monotonic()
    with pytest.raises(BlockingIOError), locked(tmp_path / "lock", wait=False):
        pass
    with locked(tmp_path / "lock"):
        assert time.monotonic() - begin > 0.5
    orphan.join()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / "lock").touch()
    with locked(tmp_path / "lock", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_stays_one_and_what_was_there_comes_back(tmp_path):
    real, link = tmp_path / "disk" / "results", tmp_path / "results"
    real.mkdir(parents=True)
    link.symlink_to(real)
    for text in ("one", "two"):
        with new_folder(link) as folder:
            (folder / "a").write_text(text)
        assert link.is_symlink()
        assert (real / "a").read_text() == text
    real.rename(real.with_name(".results.former.partial"))  # killed between the two moves
    with pytest.raises(KeyError), new_folder(real):
        raise KeyError
    assert (real / "a").read_text() == "two"
    assert [path.name for path in real.parent.iterdir()] == ["results"]


PREPARE = """
import sys
from nemo.data import load, prepare
from nemo.sections import DataSource
for size in (16, 24, 16):
    prepare("digits", DataSource(source="digits", size=size), sys.argv[1])
"""


def test_two_that_prepare_one_folder_leave_whole_images(tmp_path):
    out = tmp_path / "data/digits"
    command = [sys.executable, "-c", PREPARE, str(out)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=240)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    data = load(out)  # compares the sum of the arrays with what meta.json says
    assert data.size == (16, 16)
    assert sum(len(split) for split in data.splits.values()) == 1797
    assert [path.name for path in out.parent.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    ("command", "lock"),
    [
        (["prepare", "--dataset", "digits"], "data/.digits.lock.partial"),
        (["modularize", "--model", "resnet18", "--shape", "width=0.0625", "--data", "digits",
          "--list-layers"], ".nemo-work.lock.partial"),
    ],
)  # fmt: skip
def test_a_second_process_waits_for_the_first(tmp_path, command, lock):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with locked(tmp_path / lock):
        second = subprocess.Popen(
            [sys.executable, "-c", "from nemo.cli import main; main()", *command],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert "waiting for another process that does the same" in second.stderr.readline()
        written = [path for path in tmp_path.rglob("*.safetensors") if ".partial" not in str(path)]
        assert not written
        assert second.poll() is None
    said, failed = second.communicate(timeout=240)
    assert second.returncode == 0, failed
    assert "waiting" not in said
    assert list(tmp_path.rglob("arrays.safetensors"))
    assert not list(tmp_path.rglob("*.lock.partial"))

"""Two gloo processes against one, over more than 20 steps, and how they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

import nemo
from nemo.cli.launch import launch
from nemo.cli.main import cli
from nemo.config import check_params
from nemo.data import Augment, Batches
from nemo.distributed import is_main, rank_and_world_size
from nemo.fields import ParamsError
from nemo.masking.generators import modularize
from nemo.models import build_model
from nemo.predict import predict
from nemo.training.checkpoint import Checkpoint
from nemo.training.fit import NonFiniteLossError, Plan, fit
from nemo.training.tasks import Task, cross_entropy, make_task
from tests.masking.test_generators import Tiny
from tests.small import raw_params
from tests.test_config import DEFAULT
from tests.test_models import SMALL
from tests.training.test_fit import STATISTICS, split

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
METHODS = ("standard", "mwt", "nemo")
# A network with ReLU and BatchNorm, or AdamW, turns a last bit into percents within 20 steps of
# float32, on one process too, so these are compared in float64. `Tiny` has weights it does not use.
CASES = [(name, method) for name in ("resnet18", "vit_small") for method in METHODS]
CASES += [("deit_small", "nemo"), ("tiny", "nemo")]
IN_FLOAT64 = ("resnet18", "tiny")
EPOCHS = 3  # of 7 steps: 99 images in batches of 16, the last of 3, so of 1 and 2


def params(processes=2, batch_size=16, cuda_graphs=False, **changes):
    train = {**DEFAULT["train"], "processes": processes, "batch_size": batch_size}
    train["cuda_graphs"] = cuda_graphs
    return check_params({**DEFAULT, **changes, "train": train}, "test")


def start(params, work, *args):
    launch(params, "train", params.train, work, *args)


def build(name, method):
    torch.manual_seed(0)
    if name == "tiny":
        model = Tiny()
        model.fc = nn.Linear(4, 4)
    else:
        model = build_model(name, 4, 16, SMALL[name])
    if name == "deit_small":
        model.set_distilled_training(True)
    model = model if method == "standard" else modularize(model)
    return model.double() if name in IN_FLOAT64 else model


def train(params, name, method, epochs=EPOCHS, checkpoint=None):
    """The losses of all steps, the validation columns, and the trained weights."""
    model = build(name, method)
    dtype = torch.float64 if name in IN_FLOAT64 else torch.float32
    optimizer = "adamw" if name in IN_FLOAT64 and method == "nemo" else "sgd"
    teacher = build("resnet18", "standard").float() if name == "deit_small" else None
    base = params.base_of(method)
    task, losses = (
        make_task(
            base,
            params.section(base.section),
            "cnn",
            torch.arange(10),
            torch.device("cpu"),
            teacher,
        ),
        [],
    )

    def recorded(network, images, labels):
        parts = task(network, images.to(dtype), labels)
        losses.append(parts["loss"].item())
        return parts

    def validate():
        batches = Batches(split(99, 16), *STATISTICS, 98, part=rank_and_world_size())
        logits, labels = predict(model, batches)
        return {"logits": logits.double().norm().item(), "labels": float(labels.sum())}

    history = fit(
        model,
        recorded,
        training_batches(),
        Plan(epochs, optimizer, 0.01, 0.9, 0.01, EPOCHS),
        device=CPU,
        validate=dict if name in IN_FLOAT64 else validate,
        checkpoint=checkpoint,
    )
    return losses, history, model.state_dict()


def training_batches():
    augment = Augment(flip=True, crop=1)
    return Batches(
        split(99, 16),
        *STATISTICS,
        16,
        shuffle=True,
        augment=augment,
        seed=3,
        part=rank_and_world_size(),
    )


def train_all(params, folder):
    made = {case: train(params, *case) for case in CASES}
    checkpoint = Checkpoint(folder) if is_main() else None
    train(params, "tiny", "nemo", 1, checkpoint)
    made["resumed"] = train(params, "tiny", "nemo", checkpoint=checkpoint)
    torch.save((made, torch.initial_seed()), folder / f"{rank_and_world_size()[0]}.pt")


@pytest.fixture(scope="module")
def made_by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    start(params(), train_all, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(mine, theirs, tolerance):
    for a, b in zip(mine, theirs, strict=True):
        a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


@pytest.mark.parametrize(("name", "method"), CASES)
def test_two_processes_train_as_one_does(made_by_two, name, method):
    losses, history, weights = train(params(1), name, method)
    tolerance = 1e-9 if name in IN_FLOAT64 else 1e-5
    assert len(losses) == 21
    for made, _ in made_by_two:
        theirs, rows, trained = made[name, method]
        assert_close(losses, theirs, tolerance)
        assert_close(weights.values(), trained.values(), tolerance)
        for row, other in zip(history, rows, strict=True):
            assert list(row) == list(other)
            assert_close(row.values(), other.values(), max(tolerance, 2e-6))  # six decimals


def test_the_weights_moved_and_are_the_same_bits_in_both_processes(made_by_two):
    (first, _), (second, _) = made_by_two
    for name, method in CASES:
        for key, start in build(name, method).state_dict().items():
            trained = first[name, method][2][key]
            assert torch.equal(trained, second[name, method][2][key])
            if start.is_floating_point() and "spare" not in key:
                assert not torch.equal(trained, start), (name, method, key)


def test_a_resumed_training_of_two_ends_with_the_same_bits(made_by_two):
    for made, _ in made_by_two:
        undisturbed, resumed = made["tiny", "nemo"][2], made["resumed"][2]
        assert all(torch.equal(v, resumed[key]) for key, v in undisturbed.items())


def test_each_process_draws_its_own_dropout(made_by_two):
    assert made_by_two[0][1] != made_by_two[1][1]


def diverge(params, folder):
    """Infinite in the third step, and in one process's images only."""
    (folder / f"{rank_and_world_size()[0]}").touch()
    seen = []

    def task(network, images, labels):
        seen.append(images)
        broken = torch.inf if len(seen) == 3 and not is_main() else 1.0
        return Task(cross_entropy)(network, images * broken, labels)

    plan = Plan(1, "sgd", 0.01, 0.9, 0.0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    fit(model, task, training_batches(), plan, device=CPU, validate=dict)


def test_infinity_in_one_process_stops_both_with_the_step_and_the_term(tmp_path):
    with pytest.raises(
        NonFiniteLossError, match=r"^epoch 1, step 3: loss, task is not finite; try"
    ):
        start(params(), diverge, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1"}
    assert not multiprocessing.active_children()


def exhaust(params):
    if not is_main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    time.sleep(200)


def test_when_one_process_runs_out_of_memory_the_other_ends():
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory"):
        start(params(), exhaust)
    assert not multiprocessing.active_children()


def die(params):
    def task(network, images, labels):
        if not is_main():
            os.kill(os.getpid(), signal.SIGKILL)
        return Task(cross_entropy)(network, images, labels)

    plan = Plan(1, "sgd", 0.01, 0.9, 0.0, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    fit(model, task, training_batches(), plan, device=CPU, validate=dict)


def test_when_one_process_is_killed_the_other_ends():
    with pytest.raises(
        ChildProcessError, match=r"^process 1 of 2 was killed \(SIGKILL\), and the o"
    ):
        start(params(), die)
    assert not multiprocessing.active_children()


def linger(params):
    os.write(1, b"here\n")  # whole, where two write at once
    time.sleep(200)


def test_when_the_process_that_started_them_is_killed_they_end():
    code = "from tests.training import test_processes as t; t.start(t.params(), t.linger)"
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert [started.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    started.kill()
    assert started.communicate(timeout=60) == ("", None), "stdout ends with its last holder"


def test_when_the_one_that_started_them_is_asked_to_stop_they_end():
    code = "import nemo.cli.main, signal; from tests.training import test_processes as t; "
    code += "signal.signal(signal.SIGTERM, signal.default_int_handler); "
    code += "t.start(t.params(), t.linger)"
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert [started.stdout.readline() for _ in range(2)] == ["here\n"] * 2
    started.terminate()
    assert started.communicate(timeout=60) == ("", None)
    assert started.returncode != 0


@pytest.mark.parametrize(
    ("world", "processes", "message"),
    [
        (3, 1, "train.batch_size: 3 processes do not share 16 evenly; accepted: multiples of 3"),
        (2, 4, "train.processes: 4, where torchrun runs 2; accepted: 1, 2"),
    ],
)
def test_torchrun_and_params_that_disagree_are_one_line(monkeypatch, world, processes, message):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ParamsError) as caught:
        start(params(processes), print)
    assert str(caught.value) == message


def test_a_variant_has_its_own_number_of_processes(tmp_path, monkeypatch):
    variants = {"nemo-four": {"method": "nemo", "train.processes": 4}}
    raw = raw_params("resnet18", variants=variants)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert CliRunner().invoke(cli, ["prepare", "--dataset", "digits"]).exit_code == 0
    command = "train --dataset digits --model resnet18 --method nemo-four"
    done = CliRunner().invoke(cli, command.split())
    assert "train.processes: 4, where torchrun runs 2; accepted: 1, 2" in done.output


def test_processes_cannot_be_recorded(monkeypatch):
    with pytest.raises(ParamsError, match=r"train.cuda_graphs: true, where several processes"):
        params(2, cuda_graphs=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParamsError, match=r"^train.cuda_graphs: true, with 2 processes; accepted"):
        start(params(1, cuda_graphs=True), print)


def test_processes_need_a_device_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ParamsError, match=r"^device: 4 processes, and 2 GPUs here; accepted: cpu$"):
        start(params(4, device="auto"), print)
    with pytest.raises(ParamsError, match=r"^device: 2 processes cannot share cuda:1; accepted:"):
        start(params(2, device="cuda:1"), print)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A module, cut from a model that torchrun's two processes trained."""
    root = tmp_path_factory.mktemp("project")
    raw = {
        **DEFAULT,
        "architecture": {"resnet18": {"width": 0.0625}},
        "models": ["resnet18"],
        "train": {**DEFAULT["train"], "epochs": 1},
        "finetune": {**DEFAULT["finetune"], "epochs": 1, "processes": 2},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    patch.setenv("PYTHONPATH", str(ROOT))
    assert CliRunner().invoke(cli, ["prepare", *CELL[:2]]).exit_code == 0
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    trained = run(*torchrun, sys.executable, *NEMO, "train", *CELL)
    for command in (["masks", *CELL], ["decompose", *CELL, "--subset", "0-4"]):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
    tuned = run(*NEMO, "finetune", *CELL, "--subset", "0-4")
    patch.undo()
    return root / "runs/digits/resnet18/nemo-0", trained, tuned


NEMO = ["-c", "from nemo.cli import main; main()"]
CELL = ["--dataset", "digits", "--model", "resnet18"]


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, check=True
    )


def test_two_processes_of_torchrun_train_and_two_of_nemo_finetune(project):
    folder, trained, tuned = project
    assert trained.stdout.count("\n") == 1
    assert trained.stdout.startswith("trained digits/resnet18/nemo-0: epochs 1, ")
    assert tuned.stdout.count("\n") == 1
    assert tuned.stdout.startswith("fine-tuned module 0-4 of digits/resnet18/nemo-0: ")
    assert tuned.stderr == ""
    assert {file.name for file in (folder / "train").iterdir()} == {
        *("cell.json", "history.csv", "metrics.json", "weights.safetensors")
    }
    assert nemo.load(folder / "finetuned/0-4").info["finetuned"]["best_epoch"] in (0, 1)

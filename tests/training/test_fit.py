import math
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from nemo.data import Augment, Batches, Split
from nemo.training.checkpoint import Checkpoint, open_checkpoint, sweep
from nemo.training.fit import Plan, fit
from nemo.training.tasks import Task, cross_entropy

CPU = torch.device("cpu")
STATISTICS = ((0.5,) * 3, (0.25,) * 3)


def split(count=40, side=8):
    """Noise whose brightness tells the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 128, (count, 3, side, side), generator=generator)
    return Split((images + 32 * labels[:, None, None, None]).to(torch.uint8), labels)


def batches(**options):
    return Batches(
        split(),
        *STATISTICS,
        16,
        shuffle=True,
        augment=Augment(flip=True, crop=1),
        seed=3,
        **options,
    )


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(216, 4),
    )  # fmt: skip


def train(network, epochs=4, task=None, **options):
    return fit(
        network,
        task or Task(cross_entropy),
        batches(),
        Plan(epochs, options.pop("optimizer", "sgd"), 0.05, 0.9, 0.0, epochs),
        device=CPU,
        validate=lambda: {"val_accuracy": 0.5},
        **options,
    )


class Memory:
    """Counts the epochs that it saw, and what it was told of."""

    def __init__(self):
        self.seen, self.epochs = [], 0

    def before_epoch(self, history):
        self.seen.append([row["epoch"] for row in history])
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def test_a_memory_follows_the_history_and_is_part_of_a_checkpoint(tmp_path):
    memory = Memory()

    def kill(epoch, row):
        if epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(model(), 3, memory=memory, checkpoint=Checkpoint(tmp_path), on_epoch=kill)
    assert memory.seen == [[], [1]]
    resumed = Memory()
    train(model(), 3, memory=resumed, checkpoint=Checkpoint(tmp_path))
    assert (resumed.seen, resumed.epochs) == ([[1, 2]], 3)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_training_ends_with_the_weights_of_an_undisturbed_one(tmp_path, optimizer):
    undisturbed = model()
    history = train(undisturbed, optimizer=optimizer)

    def kill(epoch, row):
        if epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train(model(), optimizer=optimizer, checkpoint=Checkpoint(tmp_path), on_epoch=kill)
    torch.manual_seed(99)  # whatever state the new process is in
    resumed, seen = model(), []
    rows = train(
        resumed,
        optimizer=optimizer,
        checkpoint=Checkpoint(tmp_path),
        on_epoch=lambda epoch, row: seen.append(epoch),
    )
    assert seen == [3, 4]
    assert rows == history
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_and_follows_the_cosine():
    network = model()
    history = train(network, epochs=8)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    rates = [row["lr"] for row in history]
    assert rates[0] == 0.05
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.025)


def test_a_training_of_steps_ends_amid_an_epoch_with_a_cosine_of_steps():
    data, seen = batches(), []
    each = len(data)

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    plan = replace(Plan(2, "sgd", 0.05, 0.9, 0.0, each + 1), steps=each + 1)
    object.__setattr__(plan, "make_optimizer", lambda m: Watched(m.parameters(), plan.lr))
    history = fit(model(), Task(cross_entropy), data, plan, device=CPU, validate=dict)
    assert len(history) == 2
    expected = [0.05 * (1 + math.cos(math.pi * k / (each + 1))) / 2 for k in range(each + 1)]
    assert seen == pytest.approx(expected)


def test_bfloat16_autocast_trains_on_the_cpu():
    history = train(model(), amp=True)
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_checkpoint_is_removed_on_success_and_kept_on_failure(tmp_path):
    with open_checkpoint({"a": 1}, tmp_path) as checkpoint:
        checkpoint.save({"epoch": 1})
    assert not checkpoint.folder.exists()
    with pytest.raises(KilledError):
        _killed_after_saving(tmp_path)
    with open_checkpoint({"a": 1}, tmp_path) as checkpoint:
        assert checkpoint.load(CPU) == {"epoch": 2}
    with open_checkpoint({"a": 2}, tmp_path) as other:
        assert other.load(CPU) is None, "other params, other checkpoint"


def _killed_after_saving(root):
    with open_checkpoint({"a": 1}, root) as checkpoint:
        checkpoint.save({"epoch": 2})
        raise KilledError


def hold(root, started):
    with open_checkpoint({"a": 1}, root) as checkpoint:
        started.set()
        time.sleep(1.0)
        checkpoint.save({"epoch": 3})


def test_a_second_trainer_of_the_same_cell_waits_and_takes_over_the_finished_training(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("DVC_STAGE", "train")
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=hold, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    with open_checkpoint({"a": 1}, tmp_path) as checkpoint:
        assert checkpoint.load(CPU) == {"epoch": 3}
    process.join()
    assert [p.name for p in checkpoint.folder.iterdir() if p.name == "finished"]
    with open_checkpoint({"a": 2}, tmp_path) as other:
        assert not checkpoint.folder.exists(), "DVC has recorded it by the time another one begins"
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not other.folder.exists()


def test_a_sweep_leaves_what_is_in_use_or_unfinished(tmp_path, monkeypatch):
    with pytest.raises(KilledError):
        _killed_after_saving(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "train")
    (tmp_path / "of-a-killed-process.lock").touch()
    with open_checkpoint({"a": 2}, tmp_path) as used:
        sweep(tmp_path)
        assert used.folder.exists()
    assert len(list(tmp_path.glob("*/key.json"))) == 2
    sweep(tmp_path)
    (unfinished,) = tmp_path.iterdir()
    assert (unfinished / "last.pt").exists()

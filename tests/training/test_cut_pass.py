"""The cut pass, against its formula worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo
from nemo.masking.objectives import OBJECTIVES, CutPassParams
from nemo.models import build_model
from nemo.training.cut_pass import ScheduledCutPass
from nemo.training.tasks import Task, cross_entropy
from tests.test_models import SMALL
from tests.training.test_fit import KilledError, train


class Toy(nn.Module):
    """Two convolutions, of which the second is masked after its BatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 4)

    def forward(self, x, mask=1.0):
        x = torch.relu(self.norm(self.b(torch.relu(self.a(x)))) * mask)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return nemo.modularize(Toy(), example=torch.randn(2, 3, 8, 8))


def cut_pass(modular, classes=4, seed=0, **settings):
    params = CutPassParams.model_validate({"after": 0, "last": None, **settings})
    return ScheduledCutPass(params, modular, classes, 10, seed)


def batch(count=12, classes=4):
    torch.manual_seed(1)
    return torch.randn(count, 3, 8, 8), torch.arange(count) % classes


def test_frequencies_are_running_averages_of_the_classes_that_occur(toy):
    cut = cut_pass(toy, rate=0.1)
    first, second = torch.rand(6, 5) - 0.5, torch.rand(4, 5) - 0.5
    labels = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([1, 1, 1, 1])
    expected = torch.ones(4, 5)
    for masks, own in zip((first, second), labels, strict=True):
        cut.observe({"b": masks}, own)
        for c in own.unique():
            seen = (masks[own == c] > 0).float().mean(0)
            expected[c] = 0.9 * expected[c] + 0.1 * seen
    torch.testing.assert_close(cut.frequency, expected)
    assert (expected[2] == 1).all()


def test_the_union_is_that_of_the_classes_with_a_neuron_each(toy):
    cut = cut_pass(toy)
    cut.frequency = torch.tensor(
        [[0.95, 0, 0, 0, 0], [0.2, 0.1, 0.3, 0, 0], [0, 0, 0, 0, 0.9], [0, 0.91, 0, 0, 0]]
    )
    assert cut.union(torch.tensor([0, 2]))["b"].tolist() == [True, False, False, False, True]
    assert cut.union(torch.tensor([1, 3]))["b"].tolist() == [False, True, True, False, False]


def test_the_loss_is_the_cross_entropy_of_the_subsets_images_under_its_mask(toy):
    images, labels = batch()
    cut = cut_pass(toy, sizes=[2], weight=0.5)
    cut.frequency = torch.rand(4, 5)
    toy.train()
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    seen = set()
    for _ in range(8):
        loss = cut(images, labels)
        subset = cut.draw()
        seen.add(tuple(subset.tolist()))
        mask = cut.union(subset)["b"].float()[:, None, None]
        rows = torch.isin(labels, subset)
        logits = toy.model(images[rows], mask)[:, subset]
        toy.load_state_dict(before)  # that call moved the running statistics
        targets = torch.tensor([subset.tolist().index(y) for y in labels[rows]])
        torch.testing.assert_close(loss, 0.5 * F.cross_entropy(logits, targets))
    assert len(seen) > 2
    assert {len(s) for s in seen} == {2, 4}


def test_it_leaves_running_statistics_alone_and_teaches_the_weights_only(toy):
    images, labels = batch()
    cut = cut_pass(toy)
    toy.train()
    before = {k: v.clone() for k, v in toy.named_buffers()}
    cut(images, labels).backward()
    for name, value in toy.named_buffers():
        assert torch.equal(value, before[name]), name
    assert toy.model.norm.track_running_stats
    assert toy.model.b.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in toy.generators.parameters())


def test_it_waits_for_the_task_loss_and_skips_steps(toy):
    images, labels = batch()
    cut = cut_pass(toy, after=2, every=3)
    toy.train()
    for learning, runs in ((0, []), (1, []), (2, [3, 6])):
        cut.before_epoch(5, learning)
        losses = [cut(images, labels).item() for _ in range(7)]
        assert [step for step, loss in enumerate(losses, 1) if loss] == runs


def test_it_runs_in_the_last_epochs_only(toy):
    images, labels = batch()
    toy.train()
    for last, first in ((0.3, 7), (0.01, 9), (1.0, 0), (None, 0)):
        cut = cut_pass(toy, last=last)
        ran = []
        for epoch in range(10):
            cut.before_epoch(epoch, epoch)
            ran += [epoch] * bool(cut(images, labels))
        assert ran == list(range(first, 10))


def nemo_task(network, **settings):
    objective = OBJECTIVES["nemo"]
    section = objective.params.model_validate({"alpha": 0.5, "tau": 0.2, "form": "equation"})
    return Task(
        cross_entropy, objective.make(section, "cnn"), cut_pass=cut_pass(network, **settings)
    )


def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    """Frequencies are part of a checkpoint."""
    from nemo.training.checkpoint import Checkpoint

    def network():
        torch.manual_seed(0)
        model = nemo.modularize(Toy(), example=torch.randn(2, 3, 8, 8))
        return model, nemo_task(model, rate=0.5)

    undisturbed, task = network()
    train(undisturbed, task=task, memory=task)

    def kill(epoch, row):
        if epoch == 2:
            raise KilledError

    model, task = network()
    with pytest.raises(KilledError):
        train(model, task=task, memory=task, checkpoint=Checkpoint(tmp_path), on_epoch=kill)
    model, task = network()
    train(model, task=task, memory=task, checkpoint=Checkpoint(tmp_path))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["deit_small", "resnet18"])
def test_it_takes_the_models_of_the_paper(name):
    torch.manual_seed(0)
    model = build_model(name, 4, 16, SMALL[name])
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    modular = nemo.modularize(model, example=images)
    if name == "deit_small":
        model.set_distilled_training(True)
    modular.train()
    loss = cut_pass(modular, sizes=[4])(images, labels)  # of all classes; all neurons are on yet
    own = model(images)
    logits = (own[0] + own[1]) / 2 if name == "deit_small" else own
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    loss.backward()

"""A penalty that knows the steps so far, as docs/extending.md describes it."""

import pytest
import torch
from torch import nn

import nemo
from nemo.training.checkpoint import Checkpoint
from nemo.training.tasks import Task, cross_entropy
from tests.training.test_fit import CPU, KilledError, train


class Follows:
    """Pulls masks towards their running average."""

    def begin(self, layers, classes, device):
        self.mean = {layer: torch.zeros(count, device=device) for layer, count in layers.items()}

    def state_dict(self):
        return self.mean

    def load_state_dict(self, state):
        self.mean = dict(state)

    def __call__(self, masks, labels):
        for layer, mask in masks.items():
            self.mean[layer] = 0.9 * self.mean[layer] + 0.1 * mask.detach().mean(0)
        apart = sum((mask - self.mean[layer]).square().sum() for layer, mask in masks.items())
        return apart, {"apart": apart}


def network():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3)
    layers = first, nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
    model = nemo.modularize(nn.Sequential(*layers), example=torch.randn(2, 3, 8, 8))
    penalty = Follows()
    penalty.begin(model.layers, 4, CPU)
    return model, Task(cross_entropy, penalty)


def test_a_resumed_training_ends_with_the_bytes_of_an_undisturbed_one(tmp_path):
    undisturbed, task = network()
    train(undisturbed, task=task, memory=task)

    def kill(epoch, row):
        if epoch == 2:
            raise KilledError

    model, first = network()
    with pytest.raises(KilledError):
        train(model, task=first, memory=first, checkpoint=Checkpoint(tmp_path), on_epoch=kill)
    model, resumed = network()
    train(model, task=resumed, memory=resumed, checkpoint=Checkpoint(tmp_path))
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for layer, mean in task.penalty.mean.items():
        assert torch.equal(mean, resumed.penalty.mean[layer]), layer

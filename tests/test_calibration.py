from dataclasses import replace

import torch
from torch import nn

from nemo.calibration import recalibrate_bn, training_batches
from nemo.config import load_params
from nemo.data import Batches, load, prepare
from nemo.data.prepared import Split
from tests.training.test_fit import STATISTICS, model, split


def test_recalibrated_batchnorm_has_the_statistics_of_the_images():
    network = model()
    norm = network[1]
    network.train()
    weights = [p.clone() for p in network.parameters()]
    recalibrate_bn(network, Batches(split(), *STATISTICS, 10))
    images, _ = next(iter(Batches(split(), *STATISTICS, 40)))
    features = network[0](images).detach()
    torch.testing.assert_close(norm.running_mean, features.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    # a mean of the batches' variances is a little below the variance of all images
    torch.testing.assert_close(norm.running_var, features.var((0, 2, 3)), atol=1e-2, rtol=5e-2)
    assert norm.momentum == 0.1
    assert network.training
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))


def test_images_that_lie_class_by_class_are_mixed_for_recalibration(tmp_path):
    prepare("digits", load_params("params.yaml").data["digits"], tmp_path / "digits")
    data = load(tmp_path / "digits")
    train = data.splits["train"]
    order = train.labels.argsort()
    by_class = Split(train.images[order], train.labels[order])
    data = replace(data, splits={**data.splits, "train": by_class})
    batches = [labels for _, labels in training_batches(data, 64, torch.device("cpu"), seed=0)]
    assert all(len(labels.unique()) > 5 for labels in batches)
    assert torch.equal(torch.cat(batches).sort().values, by_class.labels)


def test_a_last_batch_of_one_image_does_not_stop_recalibration():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.BatchNorm1d(3))
    recalibrate_bn(network, Batches(split(5), *STATISTICS, 4))
    assert network[2].num_batches_tracked == 1

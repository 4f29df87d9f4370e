import pytest

from nemo.calibration import recalibrate_bn, training_batches
from nemo.data import Batches, parse_subset
from nemo.device import resolve_device
from nemo.evaluation.gap import gap
from nemo.module.files import load
from nemo.predict import accuracy, predict
from nemo.trained import load_cell
from tests.small import SUBSET


def test_the_gap_lies_between_the_modular_model_and_its_module(resnet):
    params, cell, data, layout = resnet
    (row,) = gap(params, cell, data, layout)
    ways = {"binary", "binary + bn", "mean", "mean + bn"}
    assert set(row) == {"subset", "soft"} | ways | {f"{way}, low threshold" for way in ways}
    classes = parse_subset(SUBSET, data.classes)
    every = Batches(data.splits["val"], data.mean, data.std, 64)
    modular = load_cell(layout.train(cell))
    assert row["soft"] == accuracy(*predict(modular, every), classes=classes)
    module, part = load(layout.module(cell, SUBSET)), data.restrict(classes)
    assert module.report["parameters"] < 0.9 * sum(p.numel() for p in modular.model.parameters())
    images = Batches(part.splits["val"], data.mean, data.std, 64)
    assert row["binary"] == accuracy(*predict(module, images))
    recalibrate_bn(module, training_batches(part, 256, resolve_device("cpu"), cell.seed))
    found = accuracy(*predict(module, images))
    assert row["binary + bn"] == pytest.approx(found, abs=1.5 / len(part.splits["val"]))

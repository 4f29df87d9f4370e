import pytest
import torch

from nemo import class_masks
from nemo.config import check_params
from nemo.data import Batches
from nemo.evaluation.thresholds import thresholds
from nemo.files import read_json
from nemo.masking.class_masks import cohesion, coupling, retention_rate, sample_bits
from nemo.trained import load_cell
from tests.small import raw_params


def test_every_threshold_has_the_figures_of_masks_made_at_it(resnet):
    _, cell, data, layout = resnet
    asked = raw_params("resnet18", thresholds={"of": ["nemo"], "values": [0.2, 0.9]})
    rows = thresholds(check_params(asked), cell, data, layout)
    modular = load_cell(layout.train(cell))
    images = Batches(data.splits["train"], data.mean, data.std, 100)
    seen = list(sample_bits(modular, images))
    bits = {layer: torch.cat([batch[layer] for batch, _ in seen]) for layer in modular.layers}
    labels = torch.cat([label for _, label in seen])
    assert [row["threshold"] for row in rows] == [0.2, 0.9]
    for row in rows:
        masks = class_masks(modular, images, row["threshold"])
        assert row["nrr"] == retention_rate(masks)
        assert row["coupling"] == coupling(masks)
        assert row["cohesion"] == pytest.approx(cohesion(bits, labels, masks), rel=1e-6)
    stored = read_json(layout.masks(cell) / "metrics.json")  # of the profile's threshold, 0.9
    for key in ("nrr", "cohesion", "coupling"):
        assert rows[1][key] == pytest.approx(stored[key], rel=1e-5)
    assert rows[0]["nrr"] > rows[1]["nrr"]

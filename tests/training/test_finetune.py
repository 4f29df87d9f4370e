import pytest
import torch
from torch import nn

from nemo.training.finetune import _Best, reset_head
from tests.training.test_fit import model


def test_the_best_epoch_is_restored_and_loss_decides_between_equals():
    network = nn.Linear(1, 1, bias=False)
    best = _Best(network)
    rows = [(0.8, 1.0), (0.9, 0.5), (0.9, 0.4), (0.9, 0.6), (0.7, 0.1)]
    for epoch, (accuracy, loss) in enumerate(rows):
        nn.init.constant_(network.weight, float(epoch))
        best.see(epoch, {"val_accuracy": accuracy, "val_loss": loss})
    epoch, row = best.restore()
    assert epoch == 2
    assert row["val_loss"] == 0.4
    assert network.weight.item() == 2.0


def test_a_head_that_cannot_be_replaced_is_an_error():
    with pytest.raises(ValueError, match=r"finetune.head: this module's classifier cannot be"):
        reset_head(model(), [])


def test_a_new_head_is_drawn_anew_and_nothing_else():
    network = model()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    reset_head(network, ["5"])
    after = network.state_dict()
    assert not torch.equal(before["5.weight"], after["5.weight"])
    assert torch.equal(before["0.weight"], after["0.weight"])


def test_a_convolution_as_classifier_is_not_drawn_anew():
    with pytest.raises(ValueError, match=r"finetune.head: the classifier 0 is a Conv2d; accepted:"):
        reset_head(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()), ["0"])

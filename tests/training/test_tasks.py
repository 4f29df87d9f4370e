import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nemo
from nemo.masking.objectives import OBJECTIVES
from nemo.models import build_model
from nemo.training.tasks import (
    Distillation,
    Task,
    _mask_health,
    cross_entropy,
    epochs_since_chance,
    make_task,
)
from tests.test_models import SMALL


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 3, 16, 16), torch.arange(8) % 4


def nemo_penalty(alpha, tau, form="equation"):
    settings = {"alpha": alpha, "tau": tau, "form": form}
    objective = OBJECTIVES["nemo"]
    return objective.make(objective.params.model_validate(settings), "cnn")


def mwt_penalty(alpha, beta):
    objective = OBJECTIVES["mwt"]
    return objective.make(objective.params.model_validate({"alpha": alpha, "beta": beta}), "cnn")


def modular():
    torch.manual_seed(0)
    return nemo.modularize(build_model("resnet18", 4, 16, SMALL["resnet18"])).eval()


def test_nemo_adds_alpha_times_the_contrastive_loss(batch):
    model, (images, labels) = modular(), batch
    parts = Task(cross_entropy, nemo_penalty(1.5, 0.3, "released"))(model, images, labels)
    logits, masks = model(images)
    contrast = nemo.contrastive_loss(masks, labels, 0.3, "released")
    torch.testing.assert_close(parts["contrast"], contrast)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(logits, labels) + 1.5 * contrast)
    on = torch.cat(list(masks.values()), 1) > 0
    torch.testing.assert_close(parts["mask_on"], on.float().mean())
    assert parts["dead_rate"] == 0


def test_a_layer_without_a_bit_on_is_dead():
    masks = {"a": torch.tensor([[0.0, 0.0], [0.3, 0.0]]), "b": torch.tensor([[0.1], [0.2]])}
    assert _mask_health(masks) == {"mask_on": torch.tensor(0.5), "dead_rate": torch.tensor(0.25)}


def test_mwt_adds_its_two_terms(batch):
    model, (images, labels) = modular(), batch
    parts = Task(cross_entropy, mwt_penalty(0.5, 1.5))(model, images, labels)
    expected = parts["task"] + nemo.mwt_loss(model(images)[1], labels, 0.5, 1.5)
    torch.testing.assert_close(parts["loss"], expected)


def test_the_penalty_rises_once_the_task_loss_has_left_chance(batch):
    """Two classes 3 : 1 have an entropy of .5623 nats, of which .8 are .4499."""
    model, (images, labels) = modular(), batch
    settings = OBJECTIVES["nemo"].params.model_validate(
        {"alpha": 1.5, "tau": 0.3, "form": "equation", "warmup": 2}
    )
    uneven = torch.tensor([0, 0, 0, 1])
    task = make_task(OBJECTIVES["nemo"], settings, "cnn", uneven, torch.device("cpu"))
    shares = []
    for losses in ([], [0.6], [0.6, 0.45], [0.6, 0.44], [0.6, 0.44, 0.6], [0.4] * 5):
        task.before_epoch([{"task": loss} for loss in losses])
        parts = task(model, images, labels)
        shares.append(parts["penalty_share"].item())
        expected = parts["task"] + 1.5 * shares[-1] * parts["contrast"]
        torch.testing.assert_close(parts["loss"], expected)
    assert shares == [0, 0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(("classes", "left"), [(2, 0.8 * 0.6931), (10, 1.8421), (200, 4.8378)])
def test_leaving_chance_asks_for_no_more_of_many_classes_than_of_ten(classes, left):
    """A fifth of the loss of a guess, ln C nats; of more than ten classes that of ten, .4605."""
    labels = torch.arange(classes)
    settings = OBJECTIVES["nemo"].params.model_validate(
        {"alpha": 1.0, "tau": 0.3, "form": "equation", "warmup": 1}
    )
    guess = make_task(OBJECTIVES["nemo"], settings, "cnn", labels, torch.device("cpu")).guess
    rows = [{"task": left + 0.001}, {"task": left - 0.001}, {"task": left + 0.001}]
    assert [epochs_since_chance(rows[:n], guess) for n in range(4)] == [0, 0, 1, 2]


@pytest.mark.parametrize(("value", "rises"), [(None, False), ({"cnn": 3, "transformer": 5}, True)])
def test_warmup_is_a_setting_of_the_section(batch, value, rises):
    for name, section in (("nemo", {"alpha": 1, "tau": 0.2, "form": "equation"}),
                          ("mwt", {"alpha": 1, "beta": 1})):  # fmt: skip
        objective = OBJECTIVES[name]
        settings = objective.params.model_validate({**section, "warmup": value})
        task = make_task(objective, settings, "transformer", batch[1], torch.device("cpu"))
        task.before_epoch([{"task": 0.0}])
        share = task(modular(), *batch).get("penalty_share")
        assert (share.item() if rises else share) == (pytest.approx(0.2) if rises else None)


def test_a_student_that_guesses_has_not_left_chance_whatever_its_teacher_says(batch):
    """An unsure teacher's loss at a guess is lower than the labels' by half of its entropy."""
    images, labels = batch
    settings = OBJECTIVES["nemo"].params.model_validate(
        {"alpha": 1.0, "tau": 0.3, "form": "equation", "warmup": 1}
    )

    class Guess(nn.Module):
        def forward(self, x):
            zeros = torch.zeros(len(x), 4, requires_grad=True)
            return (zeros, zeros), {"a": torch.rand(len(x), 3)}

    teacher = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    teacher(images)
    nn.init.zeros_(teacher[1].weight)
    task = make_task(
        OBJECTIVES["nemo"], settings, "transformer", torch.arange(4), torch.device("cpu"), teacher
    )
    row = {name: value.item() for name, value in task(Guess(), images, labels).items()}
    assert row["task"] < 0.8 * task.guess
    assert row["label_loss"] == pytest.approx(math.log(4))
    assert epochs_since_chance([row], task.guess) == 0
    assert epochs_since_chance([{**row, "label_loss": 1.0}], task.guess) == 1


def test_distillation_is_the_stated_sum(batch):
    images, labels = batch
    teacher = build_model("resnet18", 4, 16, SMALL["resnet18"])
    student = build_model("deit_small", 4, 16, SMALL["deit_small"])
    student.set_distilled_training(True)
    cls, dist = student.train()(images)
    loss = Distillation(teacher)((cls, dist), images, labels)
    target = teacher(images).softmax(1)

    def divergence(logits):
        return (target * (target.log() - logits.log_softmax(1))).sum(1).mean()

    expected = 0.5 * F.cross_entropy(cls, labels) + 0.25 * (divergence(cls) + divergence(dist))
    torch.testing.assert_close(loss, expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_a_penalty_that_begins_and_cannot_go_on_is_refused():
    class Begins:
        def begin(self, layers, classes, device): ...

        def __call__(self, masks, labels): ...

    method = replace(OBJECTIVES["nemo"], make=lambda settings, family: Begins())
    with pytest.raises(ValueError, match=r"^nemo: its penalty has begin; accepted: with state_d"):
        make_task(method, None, "cnn", torch.arange(4), torch.device("cpu"))

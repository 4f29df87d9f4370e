"""Budget curves: what is measured at the end of how much fine-tuning, and of which models."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nemo.alternatives import ALTERNATIVES, alternative
from nemo.alternatives import budgets as stage
from nemo.alternatives.budgets import budgets
from nemo.alternatives.context import Context
from nemo.config import check_params
from nemo.cost import count_flops, count_parameters
from nemo.data import Augment, Batches
from nemo.files import rounded
from nemo.recipe import recipe
from tests.small import SUBSET, raw_params

COLUMNS = {
    "subset", "competitor", "equal", "epochs", "lr", "parameters", "flops", "accuracy",
    "val_accuracy", "make_seconds", "tune_seconds", "device",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restore(tmp_path, monkeypatch):
    """No kind outlives its test, and checkpoints are in a folder of the test's own."""
    known = dict(ALTERNATIVES)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    yield
    ALTERNATIVES.clear()
    ALTERNATIVES.update(known)


def asking(model="resnet18", **asked):
    asked = {"of": ["nemo"], "kinds": [], "epochs": [0, 0.1, 1], "equal": ["parameters"]} | asked
    return check_params(raw_params(model, budgets=asked))


def plain(classes=2):
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))


def test_each_competitor_has_a_row_at_each_size_and_budget(resnet):
    _, cell, data, layout = resnet
    rows = budgets(asking(kinds=["random"], equal=["parameters", "flops"]), cell, data, layout)
    assert all(set(row) == COLUMNS for row in rows)
    assert [(r["equal"], r["competitor"], r["epochs"]) for r in rows] == [
        (equal, name, epochs)
        for equal in ("parameters", "flops")
        for name in ("module", "random")
        for epochs in (0, 0.1, 1)
    ]
    assert len({row["lr"] for row in rows if row["competitor"] == "module"}) == 1
    context = Context(asking(), cell, SUBSET, data, layout)
    example = torch.zeros(1, 3, 16, 16)
    module = (count_parameters(context.module()), count_flops(context.module(), example))
    assert {(row["parameters"], row["flops"]) for row in rows} == {module}
    once, again = ([r for r in rows if (r["competitor"], r["equal"]) == ("module", equal)]
                   for equal in ("parameters", "flops"))  # fmt: skip
    assert [{**row, "equal": "flops"} for row in once] == again  # measured once, also its seconds


def by_hand(model, part, lr, steps, weight_decay):
    """AdamW with a cosine over exactly these steps; epochs follow one another."""
    split = part.splits["train"]
    batches = Batches(split, part.mean, part.std, 32, shuffle=True, augment=Augment(crop=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    done = 0
    for epoch in range(1, 99):
        batches.set_epoch(epoch)
        for images, labels in batches:
            if done == steps:
                return
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            done += 1


def measured(model, part, split):
    batch = Batches(part.splits[split], part.mean, part.std, 9999)
    ((images, labels),) = batch
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def test_the_end_of_a_cosine_over_the_budget_is_what_counts(resnet):
    _, cell, data, layout = resnet
    alternative("plain", label="plain", budget=False)(lambda context: plain())
    raw = raw_params("resnet18")
    raw["finetune"]["batch_size"] = 32
    raw["budgets"] = {
        "of": ["nemo"], "kinds": ["plain"], "epochs": [0, 0.3, 1, 2.5], "lr_scales": [0.1],
        "equal": ["parameters"],
    }  # fmt: skip
    asked = check_params(raw)
    rows = [r for r in budgets(asked, cell, data, layout) if r["competitor"] == "plain"]
    part = data.restrict([3, 1])
    each = math.ceil(len(part.splits["train"]) / 32)
    for row, steps in zip(rows, (0, round(0.3 * each), each, round(2.5 * each)), strict=True):
        model = plain()
        by_hand(model, part, row["lr"], steps, asked.finetune.weight_decay.cnn)
        assert row["accuracy"] == pytest.approx(measured(model, part, "test"), abs=1e-9)
        assert row["val_accuracy"] == pytest.approx(measured(model, part, "val"), abs=1e-9)
    assert rows[0]["lr"] == pytest.approx(0.1 * asked.finetune.lr.cnn)
    assert len({row["accuracy"] for row in rows}) > 1


class Norm(nn.Module):
    """Its logits are those of BatchNorm's running statistics alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(768)
        self.linear = nn.Linear(768, 2)

    def forward(self, x):
        return self.linear(self.norm(x.flatten(1)))


def test_norms_are_estimated_anew_also_where_nothing_is_trained(resnet, monkeypatch):
    _, cell, data, layout = resnet
    seen = []
    alternative("norm", label="norm", budget=False)(lambda context: Norm())
    after = stage._Bench.after

    def watched(self, model, epochs, lr):
        if isinstance(model, Norm):
            seen.append(copy.deepcopy(model))
        return after(self, model, epochs, lr)

    monkeypatch.setattr(stage._Bench, "after", watched)
    budgets(asking(kinds=["norm"], epochs=[0]), cell, data, layout)
    part = data.restrict([3, 1])
    pixels = torch.cat(
        [x.flatten(1) for x, _ in Batches(part.splits["train"], part.mean, part.std, 64)]
    )
    assert len(seen) == 1
    corr = torch.corrcoef(torch.stack([seen[0].norm.running_mean, pixels.mean(0)]))[0, 1]
    assert corr > 0.95  # images are shifted by a pixel, too


def test_the_best_of_the_rates_is_chosen_once_and_none_is_no_choice(resnet, monkeypatch):
    _, cell, data, layout = resnet
    alternative("plain", label="plain", budget=False)(lambda context: plain())
    asked = asking(
        kinds=["plain"], lr_scales=[1e-9, 5, 1e30], epochs=[0, 1, 2], equal=["parameters"]
    )
    rows = [r for r in budgets(asked, cell, data, layout) if r["competitor"] == "plain"]
    # the first trains nothing, the last does not converge
    assert {row["lr"] for row in rows} == {5 * asked.finetune.lr.cnn}


def test_what_cannot_be_so_small_has_a_note_and_no_accuracy(resnet, monkeypatch):
    _, cell, data, layout = resnet
    monkeypatch.setattr(Context, "budget", lambda self: 10)
    *_, row = budgets(asking(kinds=["dense"]), cell, data, layout)
    assert (row["competitor"], row["accuracy"], row["parameters"]) == ("dense", None, None)
    assert "no smaller resnet18 has at most the 10 parameters of the module" in row["note"]
    assert row["note"].endswith("leave this one out of budgets.kinds")


def test_one_larger_than_the_module_is_an_error(resnet):
    _, cell, data, layout = resnet
    big = nn.Sequential(nn.Flatten(), nn.Linear(768, 2000), nn.Linear(2000, 2))
    alternative("big", label="big", budget=True)(lambda context: big)
    with pytest.raises(ValueError, match=r"^budgets.kinds: big has 1542002 parameters for 3"):
        budgets(asking(kinds=["big"]), cell, data, layout)


def test_a_killed_measurement_goes_on_with_the_rate_that_it_had(resnet):
    _, cell, data, layout = resnet
    calls = []

    def make(name):
        def counted(context):
            calls.append(name)
            if name == "b" and calls.count("b") == 1:
                raise KeyboardInterrupt
            return plain()

        return counted

    for name in "ab":
        alternative(name, label=name, budget=False)(make(name))
    params = asking(kinds=["a", "b"], epochs=[0.1])
    with pytest.raises(KeyboardInterrupt):
        budgets(params, cell, data, layout)
    rows = budgets(params, cell, data, layout)
    assert calls == ["a", "b", "b"]
    again = budgets(params, cell, data, layout)
    for row in (*rows, *again):  # the times are those of another run
        del row["make_seconds"], row["tune_seconds"]
    assert rounded(rows) == rounded(again)


def test_the_stage_is_there_for_the_methods_that_ask_for_it_alone(resnet):
    _, cell, _, _ = resnet
    assert recipe(check_params(raw_params("resnet18")), cell, "budgets") is None
    assert recipe(asking(of=[]), cell, "budgets") is None
    before, after = (recipe(asking(kinds=kinds), cell, "budgets") for kinds in ([], ["taylor"]))
    assert before["settings"]["budgets"]["epochs"] == [0, 0.1, 1]
    assert before["code"] != after["code"]


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"kinds": ["dance"]}, r"budgets.kinds: unknown alternative 'dance'; accepted"),
        ({"epochs": []}, r"budgets.epochs: "),
        (
            {"equal": ["flops"], "flops_subsets": []},
            r"budgets.flops_subsets: \[\] measures nothing",
        ),
        ({"epochs": [1, 1]}, r"budgets.epochs: \[1.0, 1.0\] names something twice"),
        ({"equal": ["bytes"]}, r"budgets.equal.0: "),
        ({"subsets": ["0-4"]}, r"budgets.subsets: '0-4' is not measured here; accepted: 3\+1"),
        ({"flops_subsets": ["0-4"]}, r"budgets.flops_subsets: '0-4' is not measured here"),
    ],
)
def test_mistakes_are_one_clear_line(asked, line):
    with pytest.raises(ValueError, match=line) as caught:
        asking(**asked)
    assert "\n" not in str(caught.value)

"""The cut pass in a training loop of one's own; its formula is worked out in tests/training."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import nemo


class Texts(nn.Module):
    """Tokens and a mask of padding by name; logits under a key."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids, padding):
        x = torch.relu(self.fc2(torch.relu(self.fc1(self.embedding(ids)))))
        return {"logits": self.head((x * padding[..., None]).sum(1)), "hidden": x}


def texts(count):
    torch.manual_seed(1)
    ids = torch.randint(0, 20, (count, 6))
    return {"ids": ids, "padding": (torch.arange(6) < 4).expand(count, 6).float()}


@pytest.fixture
def modular():
    torch.manual_seed(0)
    return nemo.modularize(Texts(), texts(2), output="logits").train()


def test_the_loss_is_that_of_the_model_under_the_mask_of_a_cut(modular):
    """`under` masks another way, and the class masks are written out here."""
    inputs, labels = texts(12), torch.arange(12) % 4
    for generator in modular.generators.values():  # masks that differ from sample to sample
        for parameter in generator.parameters():
            nn.init.normal_(parameter)
    cut_pass = nemo.CutPass(modular, 4, weight=2.0, sizes=[2], rate=0.5, threshold=0.6)
    sizes, total, off = set(), 0.0, 0
    frequency = torch.ones(4, sum(modular.layers.values()))
    for _ in range(6):
        _, masks = modular(**inputs)
        loss = cut_pass(inputs, labels, masks)
        for c in range(4):
            on = torch.cat([mask[labels == c] > 0 for mask in masks.values()], 1)
            frequency[c] = (frequency[c] + on.float().mean(0)) / 2
        subset = cut_pass.draw().tolist()
        sizes.add(len(subset))
        union, start = {}, 0
        for layer, neurons in modular.layers.items():
            own = frequency[subset, start : start + neurons]
            start += neurons
            union[layer] = torch.stack([
                row >= 0.6 if (row >= 0.6).any() else row == row.max() for row in own
            ]).any(0)  # fmt: skip
            off += int((~union[layer]).sum())
        chosen = torch.tensor([label in subset for label in labels.tolist()])
        given = {name: tensor[chosen] for name, tensor in inputs.items()}
        logits = modular.under(union)(**given)["logits"][:, subset]
        targets = torch.tensor([subset.index(label) for label in labels[chosen].tolist()])
        torch.testing.assert_close(loss, 2.0 * F.cross_entropy(logits, targets))
        total += loss
    assert sizes == {2, 4}
    assert off > 10
    total.backward()
    assert modular.model.fc1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in modular.generators.parameters())


@pytest.mark.parametrize(("count", "runs"), [(0, False), (1, False), (2, True)])
def test_a_batch_without_two_samples_of_the_subset_costs_nothing(modular, count, runs):
    inputs, labels = texts(4), torch.tensor([1] * count + [0] * (4 - count))
    cut_pass = nemo.CutPass(modular, 4, sizes=[2])
    _, masks = modular(**inputs)
    cut_pass.draw = lambda: torch.tensor([1, 2])
    loss = cut_pass(inputs, labels, masks)
    loss.backward()
    assert bool(loss) is runs


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "autocast"])
def test_other_types(modular, dtype):
    """Counts stay exact under autocast, in which bfloat16 would count to 256."""
    labels = torch.arange(515) % 2
    inputs = texts(515)
    cut_pass = nemo.CutPass(modular, 4, rate=1.0)
    if dtype != "autocast":
        modular.to(dtype)
        inputs["padding"] = inputs["padding"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        _, masks = modular(**inputs)
        loss = cut_pass(inputs, labels.to(torch.uint8), masks)
    seen = torch.cat([mask > 0 for mask in masks.values()], 1)
    for c in (0, 1):
        torch.testing.assert_close(cut_pass.frequency[c], seen[labels == c].float().mean(0))
    assert 0 < loss.item() < 10


def test_running_statistics_stay_and_a_frozen_norm_uses_its_own():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)]
    for norm in norms:
        norm.running_mean.fill_(0.5)
    layers = [nn.Conv2d(3, 4, 3), norms[0], norms[2], nn.Conv2d(4, 4, 3), norms[1]]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    modular = nemo.modularize(nn.Sequential(*layers, *tail), x).train()
    norms[1].eval()
    labels = torch.arange(8) % 2
    _, masks = modular(x)
    before = {name: value.clone() for name, value in modular.named_buffers()}
    loss = nemo.CutPass(modular, 2)(x, labels, masks)
    for name, value in modular.named_buffers():
        assert torch.equal(value, before[name]), name
    torch.testing.assert_close(loss, F.cross_entropy(modular.model(x), labels))
    assert not torch.equal(norms[2].running_mean, before["model.2.running_mean"])


def test_it_goes_on_from_its_state(modular):
    inputs, labels = texts(12), torch.arange(12) % 4

    def steps(cut_pass, count):
        return [cut_pass(inputs, labels, modular(**inputs)[1]).item() for _ in range(count)]

    whole = steps(nemo.CutPass(modular, 4, seed=3), 6)
    first, then = nemo.CutPass(modular, 4, seed=3), nemo.CutPass(modular, 4, seed=3)
    begun = steps(first, 2)
    state = first.state_dict()
    then.load_state_dict(state)
    steps(first, 1)
    assert torch.equal(state["frequency"], then.frequency)
    with pytest.raises(
        ValueError, match=r"has shape \(3, \d+\); accepted: \(classes, neurons\) \(4,"
    ):
        then.load_state_dict(nemo.CutPass(modular, 3).state_dict())
    assert begun + steps(then, 4) == whole
    assert steps(nemo.CutPass(modular, 4, seed=4), 6) != whole


def test_mistakes_are_one_line(modular):
    inputs, labels = texts(4), torch.arange(4)
    _, masks = modular(**inputs)
    for wrong, line in (
        ({"classes": 1}, "classes: 1; accepted: integers from 2"),
        ({"sizes": [1]}, "sizes: 1; accepted: integers from 2"),
        ({"rate": 0.0}, "rate: 0.0; accepted: above 0, at most 1"),
        ({"threshold": 1.5}, "threshold: 1.5; accepted: above 0, at most 1"),
        ({"weight": 0.0}, "weight: 0.0; accepted: finite numbers above 0"),
        ({"weight": float("inf")}, "weight: inf; accepted: finite numbers above 0"),
        ({"seed": -1}, "seed: -1; accepted: integers from 0"),
        ({"classes": [3, 5]}, r"classes: \[3, 5\]; accepted: integers from 2"),
        ({"sizes": 3}, "sizes: 3; accepted: a list of integers from 2"),
        ({"modular": modular.model}, "the model is a Texts; accepted: what nemo.modularize"),
    ):
        with pytest.raises(ValueError, match=line):
            nemo.CutPass(**{"modular": modular, "classes": 4, **wrong})
    cut_pass = nemo.CutPass(modular, 3)
    before = cut_pass.frequency.clone()
    for given, line in (
        ((inputs, labels, masks), r"labels hold 3; accepted: 0\.\.2"),
        ((inputs, labels[:3], masks), r"masks\['fc1'\] has shape \(4, 16\): expected \(3, N_l\)"),
        ((inputs, labels.float(), masks), "labels have shape"),
        ((texts(3), labels % 3, masks), "inputs do not fit 4 labels; accepted: a tensor, or a"),
        ((inputs | {"flag": True}, labels % 3, masks), "inputs do not fit 4 labels"),
        ((inputs, labels % 3, {}), "masks lack 'fc1'; accepted: those of the model"),
        (
            (inputs, labels % 3, masks | {"fc1": masks["fc1"][:, :9]}),
            r"masks\['fc1'\] has 9 columns; accepted: 16",
        ),
        ((inputs, labels % 3, modular(**inputs)), "masks: a tuple; accepted: {layer: "),
    ):
        with pytest.raises(ValueError, match=line):
            cut_pass(*given)
        if "inputs" not in line:
            with pytest.raises(ValueError, match=line):
                cut_pass.observe(given[2], given[1])
    assert torch.equal(cut_pass.frequency, before)


def test_logits_of_no_class_are_left_out(modular):
    inputs, labels = texts(6), torch.arange(6) % 3
    loss = nemo.CutPass(modular, 3, sizes=[3])(inputs, labels, modular(**inputs)[1])
    every = {layer: torch.ones(n) for layer, n in modular.layers.items()}
    expected = F.cross_entropy(modular.under(every)(**inputs)["logits"][:, :3], labels)
    torch.testing.assert_close(loss, expected)


def test_labels_of_bytes_are_compared_with_all_classes(modular):
    _, masks = modular(**texts(4))
    cut_pass = nemo.CutPass(modular, 256)
    cut_pass.draw = lambda: torch.tensor([0, 3])
    with pytest.raises(ValueError, match=r"returns \(2, 4\); accepted: logits \(B, 256\)"):
        cut_pass(texts(4), torch.arange(4).to(torch.uint8), masks)


class TwoHeads(nn.Module):
    """A pair in training, as with an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.head, self.extra = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.fc2(torch.relu(self.fc1(x))))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_outputs_are_not_mixed():
    torch.manual_seed(0)
    x, labels = torch.randn(8, 8), torch.arange(8) % 4
    modular = nemo.modularize(TwoHeads(), x)
    _, masks = modular.train()(x)
    with pytest.raises(ValueError, match=r"the model returns tuple; accepted: logits \(B, 4\)"):
        nemo.CutPass(modular, 4, sizes=[4])(x, labels, masks)


def test_modules_of_digits_work_as_they_are_cut():
    """The README's example, with it and without. On digits, a second pass without a mask would do,
    too; docs/as-cut.md says what the mask adds."""
    digits = load_digits()
    images = torch.tensor(digits.images).float().div(16)[:, None]
    labels = torch.tensor(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    least = {}
    for cut in (False, True):
        torch.manual_seed(0)
        modular = nemo.modularize(network(), example=images[:2])
        cut_pass = nemo.CutPass(modular, classes=10)
        optimizer = torch.optim.AdamW(modular.parameters(), lr=2e-3)
        for epoch in range(12):
            for rows in train[torch.randperm(len(train))].split(64):
                logits, masks = modular(images[rows])
                loss = F.cross_entropy(logits, labels[rows])
                loss = loss + 0.5 * nemo.contrastive_loss(masks, labels[rows], tau=0.2)
                if cut and epoch >= 8:
                    loss = loss + cut_pass(images[rows], labels[rows], masks)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        class_masks = nemo.class_masks(modular, [(images[train], labels[train])])
        right = []
        for subset in ([0, 1, 2, 3, 4], list(range(10))):
            module = nemo.decompose(modular, class_masks.select(subset))
            seen = [i for i in train.tolist() if labels[i] in subset]
            nemo.recalibrate_bn(module, [(images[seen], labels[seen])])
            asked = [i for i in test.tolist() if labels[i] in subset]
            answers = module.eval()(images[asked]).argmax(1)
            right.append((answers == labels[asked]).float().mean().item())
        least[cut] = min(right)
    assert least[True] > 0.95
    assert least[True] > least[False] + 0.03


def network():
    def block(inputs, outputs, **how):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, **how)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    convolutions = [*block(1, 32), *block(32, 64, stride=2), *block(64, 64)]
    linears = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*convolutions, *linears, nn.Linear(64, 10))

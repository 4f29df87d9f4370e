"""plugins/many_classes.py, against its formulas worked out sample by sample."""

import math
from pathlib import Path

import pytest
import torch

from nemo.masking.objectives import OBJECTIVES, Remembers
from nemo.plugins import import_plugins

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")
PLUGIN = Path(__file__).parents[2] / "plugins/many_classes.py"
LAYERS, CLASSES, TAU, RATE = {"a": 5, "b": 3}, 4, 0.3, 0.25


def penalty(**settings):
    import_plugins([str(PLUGIN)])
    method = OBJECTIVES["prototypes"]
    params = method.params.model_validate({"alpha": 0.5, "tau": TAU, "rate": RATE, **settings})
    made = method.make(params, "cnn")
    assert isinstance(made, Remembers)
    made.begin(LAYERS, CLASSES, torch.device("cpu"))
    return made


def batches():
    """Two: class 3 is in neither, class 1 in the second only; two masks of layer a are zero."""
    torch.manual_seed(0)
    for labels in ([0, 2, 0, 2, 2], [1, 0, 1, 2]):
        masks = {n: (torch.rand(len(labels), k) * 1.5 - 0.5).relu() for n, k in LAYERS.items()}
        masks["a"][1] = 0
        yield masks, labels


def cosine(u, v):
    lengths = math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(x * x for x in v))
    return sum(x * y for x, y in zip(u, v, strict=True)) / lengths if lengths else 0.0


def follow(known, masks, labels):
    """The prototypes {layer: {class: list}} after a batch."""
    for layer, mask in masks.items():
        for c in set(labels):
            own = [mask[i].tolist() for i, label in enumerate(labels) if label == c]
            mean = [sum(column) / len(own) for column in zip(*own, strict=True)]
            old = known[layer].get(c, mean)
            moved = [(1 - RATE) * x + RATE * y for x, y in zip(old, mean, strict=True)]
            known[layer][c] = moved


def contrast(known, masks, labels):
    losses = []
    for layer, mask in masks.items():
        for i, label in enumerate(labels):
            sums = {
                c: math.exp(cosine(mask[i].tolist(), prototype) / TAU)
                for c, prototype in known[layer].items()
            }
            losses.append(-math.log(sums[label] / sum(sums.values())))
    return sum(losses) / len(losses)


def papers(masks, labels):
    """The paper's contrast between the samples."""
    losses = []
    for mask in masks.values():
        rows = mask.tolist()
        for i, label in enumerate(labels):
            sums = [math.exp(cosine(rows[i], row) / TAU) for row in rows]
            own = sum(s for s, other in zip(sums, labels, strict=True) if other == label)
            losses.append(-math.log(own / sum(sums)))
    return sum(losses) / len(losses)


def test_the_contrast_is_that_with_the_prototypes_of_the_classes_seen():
    made, known = penalty(), {layer: {} for layer in LAYERS}
    for masks, labels in batches():
        follow(known, masks, labels)
        loss, parts = made(masks, torch.tensor(labels))
        expected = contrast(known, masks, labels)
        assert parts["contrast"].item() == pytest.approx(expected, abs=1e-5)
        assert loss.item() == pytest.approx(0.5 * expected, abs=1e-5)


def test_classes_with_like_masks_come_into_one_group():
    made, pairs = penalty(groups=2), {0: 0, 3: 0, 1: 1, 2: 1}
    torch.manual_seed(0)
    for _ in range(30):
        labels = torch.randint(CLASSES, (16,)).tolist()
        masks = {layer: torch.rand(16, count) * 0.2 for layer, count in LAYERS.items()}
        for i, label in enumerate(labels):
            for mask in masks.values():
                mask[i, pairs[label]] += 1
        loss, parts = made(masks, torch.tensor(labels))
    expected = papers(masks, [pairs[label] for label in labels])
    assert parts["contrast"].item() == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(0.5 * expected, abs=1e-5)
    assert expected != pytest.approx(papers(masks, labels), abs=0.1)


def test_as_many_groups_as_classes_are_the_classes():
    masks, labels = next(batches())
    _, parts = penalty(groups=CLASSES)(masks, torch.tensor(labels))
    assert parts["contrast"].item() == pytest.approx(papers(masks, labels), abs=1e-5)


def test_the_multiplier_climbs_by_what_is_on_beyond_the_budget():
    made, multiplier = penalty(keep=0.25, climb=0.5), 0.0
    for masks, labels in batches():
        count = len(labels)
        on = sum(int((mask > 0).sum()) for mask in masks.values()) / (count * 8)
        multiplier = max(0.0, multiplier + 0.5 * (on - 0.25))
        share = 0.0
        for mask in masks.values():
            for row in mask.tolist():
                if any(row):
                    share += sum(row) ** 2 / sum(x * x for x in row) / count / 8
        loss, parts = made(masks, torch.tensor(labels))
        assert parts["multiplier"].item() == pytest.approx(multiplier, abs=1e-6)
        expected = 0.5 * parts["contrast"].item() + multiplier * share
        assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_masks_of_zeros_have_gradient_zero_and_all_others_a_finite_one():
    made = penalty(keep=0.1, climb=1.0)
    masks, labels = next(batches())
    leaves = {layer: mask.clone().requires_grad_() for layer, mask in masks.items()}
    made(leaves, torch.tensor(labels))[0].backward()
    assert leaves["a"].grad[1].abs().max() == 0
    for leaf in leaves.values():
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().max() > 0


def test_what_it_remembers_goes_on_elsewhere():
    made, resumed, again = penalty(keep=0.25), penalty(keep=0.25), list(batches())
    made(again[0][0], torch.tensor(again[0][1]))
    resumed.load_state_dict({name: value.clone() for name, value in made.state_dict().items()})
    for one in (made, resumed):
        loss, _ = one(again[1][0], torch.tensor(again[1][1]))
        again.append(loss)
    assert again[2] == again[3]


def test_the_papers_contrast_may_stand_beside_the_budget():
    masks, labels = next(batches())
    _, parts = penalty(keep=0.25, contrast="batch")(masks, torch.tensor(labels))
    assert parts["contrast"].item() == pytest.approx(papers(masks, labels), abs=1e-5)
    assert parts["multiplier"] > 0

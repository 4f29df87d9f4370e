import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nemo
from nemo.masking.class_masks import coupling_matrix, dead_classes, mask_frequency
from nemo.masking.observed import Observed, choose
from nemo.signature import Signature
from tests.oracles import masks as oracle


@st.composite
def samples(draw):
    """Bits (S, K) of samples with labels 0..C-1, each class at least once."""
    classes, neurons = draw(st.integers(2, 3)), draw(st.integers(1, 5))
    labels = list(range(classes)) + draw(st.lists(st.integers(0, classes - 1), max_size=5))
    bits = [[draw(st.integers(0, 1)) for _ in range(neurons)] for _ in labels]
    return bits, labels


def split(rows, dtype=torch.bool):
    """One layer, or two, of the same columns."""
    tensor = torch.tensor(rows, dtype=dtype)
    half = tensor.shape[1] // 2
    return {"a": tensor[:, :half], "b": tensor[:, half:]} if half else {"a": tensor}


def joined(masks):
    return torch.cat(list(masks.values()), 1).int().tolist()


@given(samples(), st.integers(1, 4))
def test_frequency_does_not_depend_on_the_batches(sample, batch):
    bits, labels = sample
    batches = [
        (split(bits[i : i + batch]), torch.tensor(labels[i : i + batch]))
        for i in range(0, len(bits), batch)
    ]
    fast = torch.cat(list(mask_frequency(batches).values()), 1)
    assert fast.tolist() == oracle.frequency(bits, labels)


@given(
    st.lists(st.integers(0, 40).map(lambda k: k / 40), min_size=1, max_size=30),
    st.sampled_from([0.03, 0.05, 0.1, 0.12, 0.5, 0.9, 1.0]),
)
def test_threshold_masks_is_the_literal_loop(row, limit):
    frequency = torch.tensor([row], dtype=torch.float64)
    expected = oracle.threshold(row, limit)
    assert nemo.threshold_masks(frequency, limit)[0].tolist() == expected
    assert nemo.threshold_masks({"l": frequency}, limit)["l"][0].tolist() == expected


def test_a_dead_layer_keeps_its_most_frequent_five_percent():
    frequency = torch.zeros(2, 40, dtype=torch.float64)
    frequency[0, [7, 9, 3]] = torch.tensor([0.04, 0.02, 0.02], dtype=torch.float64)
    frequency[1, 0] = 1.0
    masks = nemo.threshold_masks(frequency, 0.9)
    assert masks[0].nonzero().flatten().tolist() == [3, 7]
    assert dead_classes(frequency, 0.9) == [0]


@given(samples())
def test_metrics_are_the_literal_ones(sample):
    bits, labels = sample
    masks = nemo.threshold_masks(mask_frequency([(split(bits), torch.tensor(labels))]), 0.6)
    rows = joined(masks)
    assert nemo.retention_rate(masks) == pytest.approx(oracle.retention_rate(rows))
    assert nemo.coupling(masks) == pytest.approx(oracle.coupling(rows))
    fast = nemo.cohesion(split(bits), torch.tensor(labels), masks)
    if max(labels.count(c) for c in labels) < 2:
        assert math.isnan(fast)
    else:
        assert fast == pytest.approx(oracle.cohesion(bits, labels, rows))


def test_coupling_of_more_classes_than_a_block_holds():
    torch.manual_seed(0)
    masks = {"a": torch.rand(300, 40) < 0.3, "b": torch.rand(300, 9) < 0.1}
    masks["a"][7], masks["b"][7] = False, False  # two empty sets have similarity 0
    rows = joined(masks)
    found = coupling_matrix(masks)
    for one, two in ((0, 1), (3, 299), (299, 3), (255, 256), (7, 8)):
        sets = [{place for place, on in enumerate(rows[c]) if on} for c in (one, two)]
        assert found[one, two].item() == oracle.jaccard(*sets)
    assert found.dtype == torch.float64
    assert found.diagonal().tolist() == [float(c != 7) for c in range(300)]
    assert nemo.coupling(masks) == pytest.approx(oracle.coupling(rows), abs=1e-12)


def test_metrics_agree_with_scikit_learn():
    from sklearn.metrics import jaccard_score

    torch.manual_seed(0)
    masks = {"l": torch.rand(2, 30) > 0.5}
    expected = jaccard_score(masks["l"][0].numpy(), masks["l"][1].numpy())
    assert nemo.coupling(masks) == pytest.approx(expected)


class Echo(torch.nn.Module):
    """A 'modular model' whose masks are its images, to test the streaming alone."""

    def __init__(self):
        super().__init__()
        self.model, self.takes = torch.nn.Linear(12, 3), Signature.of_images((12,))

    def forward(self, images):
        return images, {"l": images}


def test_class_masks_streams_and_select_is_or():
    torch.manual_seed(0)
    images = torch.rand(60, 12) - 0.4
    labels = torch.arange(60) % 3
    loader = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, 60, 7)]
    masks = choose(Observed(Echo(), loader), "frequency", {"threshold": 0.6})
    expected = oracle.frequency((images > 0).int().tolist(), labels.tolist())
    assert masks["l"].tolist() == [oracle.threshold(row, 0.6) for row in expected]
    chosen = masks.select([2, 0])
    assert chosen.classes == [2, 0]
    assert torch.equal(chosen["l"], masks["l"][0] | masks["l"][2])
    assert nemo.retention_rate(chosen) == pytest.approx(chosen["l"].float().mean().item())


def test_a_class_without_samples_is_an_error():
    with pytest.raises(ValueError, match=r"no sample of class\(es\) \[0\]"):
        mask_frequency([({"l": torch.ones(2, 3, dtype=torch.bool)}, torch.tensor([1, 1]))])
    with pytest.raises(ValueError, match="no batches"):
        mask_frequency([])


@pytest.mark.parametrize("threshold", [0, 1.1, float("nan")])
def test_threshold_outside_its_range_is_an_error(threshold):
    with pytest.raises(ValueError, match="threshold must lie in"):
        nemo.threshold_masks({"l": torch.ones(1, 2)}, threshold)


def test_cohesion_names_what_does_not_fit():
    bits = {"l": torch.ones(3, 4, dtype=torch.bool)}
    masks = {"l": torch.ones(2, 4, dtype=torch.bool)}
    labels = torch.tensor([0, 1, 1])
    assert nemo.cohesion({**bits, "other": torch.ones(1)}, labels, masks) == 1
    for arguments, line in (
        (({}, labels, masks), "bits lack 'l'; accepted: those of all class masks"),
        ((bits, labels + 1, masks), r"labels hold 2; accepted: 0\.\.1"),
        ((bits, labels - 1, masks), r"labels hold -1; accepted: 0\.\.1"),
        ((bits, labels[:2], masks), "bits have 3 rows, not 2; accepted: one per label"),
        ((bits, labels.tolist(), masks), "labels have shape"),
    ):
        with pytest.raises(ValueError, match=line):
            nemo.cohesion(*arguments)

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nemo
from nemo.masking.losses import mwt_terms
from tests.oracles import losses as oracle

# floors of the released form for perfectly separated masks, and its values for collapsed ones, with
# 128 samples of 10 balanced classes: figures stated for the authors' code
SEPARATED = {0.1: 0.0005, 0.2: 0.0616, 0.3: 0.239, 0.4: 0.387, 0.5: 0.476}
COLLAPSED = {0.1: 2.302, 0.2: 2.250, 0.3: 2.059, 0.4: 1.828, 0.5: 1.633}


@st.composite
def batches(draw):
    """1-2 layers of masks with some dead rows, and labels that may lack pairs of either kind."""
    samples = draw(st.integers(1, 6))
    value = st.sampled_from([0.0, 0.0, 0.25, 0.5, 0.99])
    layers = [
        [[draw(value) for _ in range(width)] for _ in range(samples)]
        for width in draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    ]
    labels = draw(st.lists(st.integers(0, 2), min_size=samples, max_size=samples))
    return layers, labels


def as_dict(layers):
    return {f"l{i}": torch.tensor(m, dtype=torch.float64) for i, m in enumerate(layers)}


@given(batches(), st.sampled_from([0.05, 0.2, 1.0]), st.sampled_from(["equation", "released"]))
def test_contrastive_loss_is_the_literal_formula(batch, tau, form):
    layers, labels = batch
    fast = nemo.contrastive_loss(as_dict(layers), torch.tensor(labels), tau, form)
    assert fast.item() == pytest.approx(oracle.contrastive(layers, labels, tau, form), abs=1e-9)


@given(batches(), st.floats(0, 2), st.floats(0, 2))
def test_mwt_loss_is_the_literal_formula(batch, alpha, beta):
    layers, labels = batch
    cohesion, coupling = oracle.mwt(layers, labels)
    fast = nemo.mwt_loss(as_dict(layers), torch.tensor(labels), alpha, beta)
    assert fast.item() == pytest.approx(alpha * cohesion + beta * coupling, abs=1e-9)


def balanced(samples=128, classes=10):
    return torch.arange(samples) % classes


@pytest.mark.parametrize("tau", SEPARATED)
def test_released_form_has_the_stated_floor_and_collapsed_value(tau):
    labels = balanced()
    separated = {"l": torch.eye(10)[labels]}
    collapsed = {"l": torch.ones(128, 10)}
    floor = nemo.contrastive_loss(separated, labels, tau, "released")
    assert floor.item() == pytest.approx(SEPARATED[tau], abs=6e-4)
    value = nemo.contrastive_loss(collapsed, labels, tau, "released")
    assert value.item() == pytest.approx(COLLAPSED[tau], abs=6e-4)


def test_released_form_scores_a_dead_layer_ln_2_without_gradient():
    masks = torch.zeros(20, 5, requires_grad=True)
    loss = nemo.contrastive_loss({"l": masks}, balanced(20), 0.2, "released")
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert masks.grad.abs().max() == 0


@pytest.mark.parametrize("form", ["equation", "released"])
def test_gradient_is_that_of_finite_differences(form):
    torch.manual_seed(0)
    masks = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda m: nemo.contrastive_loss({"l": m}, labels, 0.2, form), masks
    )


LOSSES = {
    "equation": lambda masks, labels: nemo.contrastive_loss(masks, labels, 0.2),
    "released": lambda masks, labels: nemo.contrastive_loss(masks, labels, 0.2, "released"),
    "mwt": lambda masks, labels: nemo.mwt_loss(masks, labels, 0.5, 1.5),
}


def plain_cosines(masks):
    """Without regard to zero rows."""
    units = [torch.nn.functional.normalize(mask, dim=1) for mask in masks.values()]
    return torch.stack([unit @ unit.T for unit in units])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_zero_row_has_no_gradient_and_changes_none_of_the_others(loss, monkeypatch):
    labels = torch.tensor([0, 1, 0, 1, 2, 0])
    random = torch.Generator().manual_seed(0)
    found = []
    for dead in (True, False):
        mask = torch.rand(6, 9, generator=random.manual_seed(0))
        mask[[1, 4]] *= 0 if dead else 1
        mask.requires_grad_()
        value = LOSSES[loss]({"l": mask}, labels)
        (mine,) = torch.autograd.grad(value, mask)
        with monkeypatch.context() as patch:
            patch.setattr("nemo.masking.losses._cosines", plain_cosines)
            before = LOSSES[loss]({"l": mask}, labels)
        (plain,) = torch.autograd.grad(before, mask)
        assert torch.equal(value, before)
        found.append((mine, plain))
    (mine, plain), (whole, alike) = found
    assert torch.equal(whole, alike)  # to the bit: committed results depend on it
    assert plain[[1, 4]].abs().min(1).values.max() > 1e9  # what it is without
    assert mine[[1, 4]].tolist() == [[0.0] * 9] * 2
    assert torch.equal(mine[[0, 2, 3, 5]], plain[[0, 2, 3, 5]])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_that_is_not_a_number_makes_the_loss_none(loss):
    masks = torch.rand(4, 3)
    masks[1, 2] = torch.nan
    assert LOSSES[loss]({"l": masks}, torch.tensor([0, 0, 1, 1])).isnan()


def test_small_tau_stays_finite_in_float32():
    masks = {"l": torch.rand(16, 8, requires_grad=True)}
    loss = nemo.contrastive_loss(masks, balanced(16), 0.005)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(masks["l"].grad).all()


def test_mwt_drops_the_term_without_pairs():
    masks = {"l": torch.rand(3, 4)}
    cohesion, coupling = mwt_terms(masks, torch.tensor([0, 1, 2]))
    assert cohesion == 0
    assert coupling > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, torch.tensor([0]), 0.2), "masks is empty"),
        (({"l": torch.ones(2, 3)}, torch.tensor([0]), 0.2), r"expected \(1, N_l\)"),
        (({"l": torch.ones(1, 3)}, torch.tensor([0]), 0.0), "tau must be above 0"),
        (({"l": torch.ones(1, 3)}, torch.tensor([0]), 0.2, "paper"), "form must be"),
    ],
)
def test_contrastive_loss_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        nemo.contrastive_loss(*arguments)


def test_autocast_does_not_make_the_cosines_coarse():
    masks, labels = {"a": torch.rand(16, 40)}, torch.arange(16) % 3
    expected = nemo.contrastive_loss(masks, labels, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nemo.contrastive_loss(masks, labels, 0.2), expected)

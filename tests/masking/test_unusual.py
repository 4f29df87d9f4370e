"""Layers that are left out or have their own activation, heads of training, and odd inputs.

What is right is computed by hand, with the masks written into the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo
from tests.cut.helpers import randomise

IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 1])


class Net(nn.Module):
    """Two convolutions and a classifier; `after` is applied to the second one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def after(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.after(self.conv(torch.relu(self.stem(x)))).mean((2, 3)))


def step(modular: nemo.masking.generators.Modular, *inputs: Tensor) -> Tensor:
    """The logits of one training step."""
    logits, masks = modular.train()(*inputs)
    (F.cross_entropy(logits, LABELS) + nemo.contrastive_loss(masks, LABELS, 0.2)).backward()
    return logits


def made(net: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(net, seed).eval()


MASK = torch.tensor([True, False, True, True, False, False, True, True])


class Skipping(Net):
    """Which leaves a layer out, where `skip` says so."""

    skip = False

    def after(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((x if self.skip else x + self.conv(x)).mean((2, 3)))


def test_a_layer_that_is_left_out_of_a_step_has_no_neuron_on():
    net = made(Skipping())
    modular = nemo.modularize(net, IMAGES)
    net.skip = True
    logits, masks = modular.train()(IMAGES)
    assert torch.equal(masks["conv"], torch.zeros(4, 8))
    assert torch.equal(logits, net.fc(torch.relu(net.stem(IMAGES)).mean((2, 3))))
    step(modular, IMAGES)
    assert net.fc.weight.grad.any()
    assert net.conv.weight.grad is None


class Fused(nn.BatchNorm2d):
    """A norm that has an activation, and does not call it as a module."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_norm_whose_activation_is_not_called_is_masked_too():
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Fused(8)

        def after(self, x: Tensor) -> Tensor:
            return self.norm(x)

    net = made(Normed())
    modular = nemo.modularize(net, IMAGES)
    x = net.norm(net.conv(torch.relu(net.stem(IMAGES)))) * MASK.view(-1, 1, 1)
    expected = net.fc(x.mean((2, 3)))
    module = nemo.decompose(modular, {"conv": MASK})
    for one in (modular.under({"conv": MASK}), module):
        torch.testing.assert_close(one(IMAGES), expected)
    assert module.report["rows_left"]["conv"] == int(MASK.sum())


class Auxiliary(Net):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "auxiliary": 2 * logits} if self.training else logits


def test_one_of_the_outputs_of_train_mode_may_be_named():
    net = made(Auxiliary())
    modular = nemo.modularize(net, IMAGES, output="logits")
    torch.testing.assert_close(modular.eval()(IMAGES)[0], step(modular, IMAGES))
    assert modular.takes.plain, "its module is that of a model that returns a tensor"
    with pytest.raises(ValueError, match=r"'x': the model returns no such .*: 'logits', 'aux"):
        nemo.modularize(net, IMAGES, output="x")
    with pytest.raises(ValueError, match="output='logits': the model returns one tensor; leave it"):
        nemo.modularize(made(Net()), IMAGES, output="logits")


def test_slopes_of_a_prelu_stay_trainable(tmp_path: Path):
    class Sloped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.PReLU(8)

        def after(self, x: Tensor) -> Tensor:
            return self.act(x)

    net = made(Sloped())
    net.act.weight.data.uniform_(-1, 1)
    module = nemo.decompose(net, {"conv": MASK}, example=IMAGES)
    masked = net.conv(torch.relu(net.stem(IMAGES))) * MASK.view(-1, 1, 1)
    expected = net.fc(F.prelu(masked, net.act.weight).mean((2, 3)))
    nemo.save(module, tmp_path)
    loaded = nemo.load(tmp_path)
    torch.testing.assert_close(loaded(IMAGES), expected)
    loaded(IMAGES).square().sum().backward()
    slopes = [p for p in loaded.parameters() if p.shape == (int(MASK.sum()), 1, 1)]
    assert len(slopes) == 1
    assert bool(slopes[0].grad.all())


class Bags(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(20, 8, **settings), nn.Linear(8, 4)
        self.first, self.hidden = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, *bags: Tensor) -> Tensor:
        x = self.bag(bags[0], per_sample_weights=bags[1] if len(bags) > 1 else None)
        return self.fc(torch.tanh(self.hidden(torch.tanh(self.first(x)))))


@pytest.mark.parametrize(("mode", "padding"), [
    ("sum", None), ("mean", None), ("max", None), ("weighted", None),
    ("sum", 3), ("mean", 3), ("weighted", 3),
])  # fmt: skip
def test_bags_of_embeddings(mode: str, padding: int | None, tmp_path: Path):
    kind = "sum" if mode == "weighted" else mode
    net = made(Bags(mode=kind, padding_idx=padding))
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 6, (4, 5), generator=random)
    ids[0] = 3  # nothing but padding
    weights = torch.rand(4, 5, generator=random) if mode == "weighted" else torch.ones(4, 5)
    inputs = (ids, weights) if mode == "weighted" else (ids,)
    module = nemo.decompose(net, {"first": MASK}, example=tuple(x[:2] for x in inputs))
    nemo.save(module, tmp_path)
    rows = []
    for one, own in zip(ids.tolist(), weights.tolist(), strict=True):
        kept = [net.bag.weight[i] * w for i, w in zip(one, own, strict=True) if i != padding]
        bag = torch.stack(kept or [torch.zeros(8)])
        rows.append({"sum": bag.sum(0), "mean": bag.mean(0), "max": bag.amax(0)}[kind])
    hidden = torch.tanh(net.first(torch.stack(rows)) * MASK)
    expected = net.fc(torch.tanh(net.hidden(hidden)))
    for one in (module, nemo.load(tmp_path)):
        torch.testing.assert_close(one(*inputs), expected)


def test_an_id_for_each_sample_is_told_apart_though_few_are_drawn():
    class Looked(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.e, self.a = nn.Embedding(count, 8), nn.Linear(8, 8)
            self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.b(torch.tanh(self.a(self.e(ids))))))

    for count in (2, 3, 5, 20):
        assert list(nemo.modularize(Looked(count), torch.arange(4) % count).layers) == ["b"]


def test_inputs_of_any_number(tmp_path: Path):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, *parts: Tensor) -> Tensor:
            return self.fc(torch.tanh(self.b(torch.tanh(self.a(torch.cat(parts, 1))))))

    net, parts = made(Joined()), (torch.randn(4, 3), torch.randn(4, 5))
    modular = nemo.modularize(net, parts)
    step(modular, *parts)
    nemo.save(nemo.decompose(modular, {"b": MASK}), tmp_path)
    expected = net.fc(torch.tanh(net.b(torch.tanh(net.a(torch.cat(parts, 1)))) * MASK))
    torch.testing.assert_close(nemo.load(tmp_path)(*parts), expected)


def _item(x: Tensor) -> Tensor:
    return x * x.sum().item()


def _branch(x: Tensor) -> Tensor:
    return x if x.mean() > 0 else -x


def _numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy())


def _each(x: Tensor) -> Tensor:
    return torch.stack([one * 2 for one in x])


def _eye(x: Tensor) -> Tensor:
    return (torch.eye(x.shape[0], dtype=x.dtype) @ x.flatten(1)).view_as(x)


def _batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def _running_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, x.new_zeros(8), x.new_ones(8), training=True)


def _sized(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 2 else x + x


@pytest.mark.parametrize(("after", "message"), [
    (_item, r"it takes a number out of a tensor, .* \(test_unusual.py:\d+\); accepted: the tensor"),
    (_branch, r"it decides by the values .* \(test_unusual.py:\d+\); accepted: .* torch.where in"),
    (_numpy, r"traced: it computes with numpy \(test_unusual.py:\d+\); accepted: "),
    (len, r"'int' object has no attribute 'mean'"),
    (_each, "it takes the batch size for a number, as .* a loop over samples do; accepted: "),
    (_eye, r"traced: torch.eye of the batch size \(test_unusual.py:\d+\); accepted: what is"),
    (_sized, "it takes the batch size for a number, as len"),
    (_batch_norm, r"training=True\) \(test_unusual.py:\d+\): by the statistics of .*; accepted: "),
    (_running_norm, r"training=True\) \(test_unusual.py:\d+\): by the statistics of .*; accepted"),
])  # fmt: skip
def test_what_no_graph_can_say_is_one_line_in_modularize(
    after: Callable[[Tensor], Tensor], message: str, capfd: pytest.CaptureFixture[str]
):
    net = made(Net())
    net.after = after
    with pytest.raises(ValueError, match=message) as caught:
        nemo.modularize(net, IMAGES)
    assert "\n" not in str(caught.value)
    assert "def forward" not in capfd.readouterr().err


def test_weights_that_are_standardised_by_a_batch_norm_are_cut():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            rows = self.weight.flatten(1)[None]
            weight = F.batch_norm(rows, None, None, training=True).view_as(self.weight)
            return F.conv2d(x, weight, self.bias, padding=1)

    net = Net()
    net.conv = Standardised(8, 8, 3)
    module = nemo.decompose(nemo.modularize(made(net), IMAGES), {"conv": MASK})
    masked = net.conv(torch.relu(net.stem(IMAGES))) * MASK.view(-1, 1, 1)
    torch.testing.assert_close(module(IMAGES), net.fc(net.after(masked).mean((2, 3))))


class Strict(Net):
    """Which takes batches of at least so many."""

    least: int
    error: Exception

    def forward(self, x: Tensor) -> Any:
        if len(x) < self.least:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(("least", "error", "message"), [
    (5, AssertionError("Input height 9 doesn't match 224"), "the example: Input height 9 doesn't"),
    (5, AssertionError(), "the example: AssertionError$"),
    (4, KeyError("mask"), "a batch of 1: KeyError 'mask'$"),
    (4, TypeError("four at once"), "a batch of 1: four at once$"),
])  # fmt: skip
def test_what_a_model_raises_at_an_example_is_one_line(least: int, error: Exception, message: str):
    net = made(Strict())
    net.least, net.error = least, error
    with pytest.raises(ValueError, match=f"^the model does not run on {message}"):
        nemo.modularize(net, IMAGES)


@pytest.mark.parametrize(("change", "example", "message"), [
    (lambda net: net, (IMAGES, IMAGES), "does not run on the example: .*positional argument"),
    (lambda net: net, IMAGES[:, :2], "does not run on the example: .*to have 3 channels"),
    (lambda net: net, IMAGES[:0], "example: no samples; accepted: one or more"),
    (lambda net: net, {"class": IMAGES}, "example: 'class' cannot be the name of an argument"),
    (torch.jit.script, IMAGES, "the model is scripted; accepted: as before torch.jit"),
    (lambda net: net.to("meta"), IMAGES, "weights are on the meta device; accepted: loaded"),
])  # fmt: skip
def test_a_model_or_an_example_of_another_kind_is_one_line(
    change: Callable[[nn.Module], nn.Module], example: Any, message: str
):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    with pytest.raises(ValueError, match=message) as caught:
        nemo.modularize(change(net), example)
    assert "\n" not in str(caught.value)


def test_a_compiled_model_is_the_model_itself():
    net = made(Net())
    modular = nemo.modularize(torch.compile(net, backend="eager"), IMAGES)
    assert modular.model is net


def test_a_model_that_reads_the_length_of_what_is_fixed_is_traced():
    net = made(Net())
    net.after = lambda x: x * len(net.fc.weight)
    module = nemo.decompose(nemo.modularize(net, IMAGES), {"conv": MASK})
    masked = net.conv(torch.relu(net.stem(IMAGES))) * MASK.view(-1, 1, 1)
    torch.testing.assert_close(module(IMAGES), net.fc((4 * masked).mean((2, 3))))


@pytest.mark.parametrize("inputs", [(), (IMAGES[:0],)])
def test_a_batch_without_samples_is_one_line(inputs: tuple[Tensor, ...]):
    modular = nemo.modularize(made(Net()), IMAGES)
    with pytest.raises(ValueError, match="the modular model got no samples; accepted: one or"):
        modular(*inputs)


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.float(), F.one_hot(LABELS), [0, 1, 2]])
def test_labels_that_would_broadcast_are_refused(labels: Tensor):
    masks = {"conv": torch.rand(4, 8)}
    with pytest.raises(
        ValueError, match=r"labels have shape .* and type .*; accepted: a tensor \(B,\)"
    ):
        nemo.contrastive_loss(masks, labels, 0.2)
    modular = nemo.modularize(made(Net()), IMAGES)
    with pytest.raises(
        ValueError, match=r"labels have shape .* and type .*; accepted: a tensor \(B,\)"
    ):
        nemo.class_masks(modular, [(IMAGES, labels)], 0.9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_integers_of_any_type(dtype: torch.dtype):
    modular = nemo.modularize(made(Net()), IMAGES)
    one = nemo.class_masks(modular, [(IMAGES, LABELS.to(dtype))], 0.9)
    other = nemo.class_masks(modular, [(IMAGES, LABELS)], 0.9)
    assert all(torch.equal(one[layer], other[layer]) for layer in other)


@pytest.mark.parametrize(("labels", "message"), [
    (LABELS[:3], r"has shape \(4, 8\): expected \(3, N_l\), one row per label"),
    (LABELS - 1, "labels hold -1; accepted: 0 and above"),
])  # fmt: skip
def test_labels_of_class_masks_are_checked(labels: Tensor, message: str):
    modular = nemo.modularize(made(Net()), IMAGES)
    with pytest.raises(ValueError, match=message):
        nemo.class_masks(modular, [(IMAGES, labels)], 0.9)


def test_a_compiled_model_masks_linears_that_are_called_as_functions_once() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(6, 2)
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.first(x))
            return self.head(torch.relu(nn.functional.linear(x, self.weight)))

    torch.manual_seed(0)
    net, x = Called(), torch.randn(3, 7, 4)
    modular = nemo.modularize(net, x)
    for parameter in modular.generators.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        logits, masks = torch.compile(modular, backend="eager")(x)
        first = torch.relu(net.first(x)) * masks["first"][:, None]  # relu(y m) is relu(y) m
        second = torch.relu(nn.functional.linear(first, net.weight)) * masks["weight"][:, None]
    expected = net.head(second)
    torch.testing.assert_close(logits, expected)

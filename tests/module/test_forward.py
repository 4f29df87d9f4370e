"""The written forward computes the steps one after another, and holds nothing of their text."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import testing

import nemo
from nemo.module.forward import write
from nemo.module.ops import OPS
from nemo.module.program import Ref, Step
from tests.cut.helpers import random_masks
from tests.cut.test_models import SHAPES, small

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", SHAPES)
def test_it_computes_the_steps_one_after_another(name: str) -> None:
    model = small(name)
    module = nemo.decompose(model, random_masks(model, 0.6), [3, 0]).optimize_for_inference()
    values = {module.takes.inputs[0].name: IMAGES}
    with torch.no_grad():
        for step in module.steps:
            module.advance(step, values)
        assert torch.equal(module(IMAGES), values[module.output])
    assert module._overwriting
    with torch.inference_mode():  # intermediate values are overwritten
        assert torch.equal(module(IMAGES), values[module.output])


def test_copies_compute_the_same() -> None:
    model = small("resnet18")
    module = nemo.decompose(model, random_masks(model, 0.6))
    with torch.no_grad():
        expected = module(IMAGES)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(other(IMAGES), expected)
            next(other.parameters()).add_(1)
            assert not torch.equal(other(IMAGES), expected)
        assert torch.equal(module(IMAGES), expected)


def test_copies_share_a_compiled_graph() -> None:
    module = nemo.decompose(small("resnet18"), {})
    graphs = testing.CompileCounter()
    torch.compiler.reset()
    with torch.no_grad():
        for _ in range(10):  # torch refuses to compile one function more than 8 times
            torch.compile(copy.deepcopy(module), backend=graphs, fullgraph=True)(IMAGES)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("other", ["alike", "wide", "double", "number"])
def test_a_sum_is_written_over_its_first_term_if_they_are_alike(other: str) -> None:
    steps = [Step("y", "aten.add.Tensor", False, (Ref("x"), Ref("other")))]
    forward = write(steps, ["x", "other"], "y", OPS, ["y"])
    given: dict[str, object] = {
        "alike": torch.ones(2, 3), "wide": torch.ones(5, 2, 3), "number": 3,
        "double": torch.ones(2, 3, dtype=torch.float64),
    }  # fmt: skip
    x = torch.ones(2, 3)
    y = forward({}, {"x": x, "other": given[other]})
    assert torch.equal(y, torch.ones(2, 3) + given[other])
    assert (y is x) == (other == "alike")


def test_a_sum_of_very_many_terms_can_be_written() -> None:
    steps = [Step("y", "aten.add.Tensor", False, tuple(Ref("x") for _ in range(1000)))]
    with pytest.raises((RuntimeError, TypeError)):
        write(steps, ["x"], "y", OPS, ["y"])({}, {"x": torch.ones(2)})


def test_a_replaced_layer_is_called() -> None:
    model = small("resnet18")
    module = nemo.decompose(model, {})
    head = next(name for name, (kind, _) in module.kinds.items() if kind == "Linear")
    setattr(module, head, torch.nn.Identity())
    with torch.inference_mode():
        assert module(IMAGES).shape[1] > 10


def test_names_and_strings_of_a_file_stay_data() -> None:
    evil = "x); raise SystemExit(', "
    steps = (
        Step(
            evil, "op", False, ([Ref(evil + "in"), (Ref("é"), 2)], evil), {"if": Ref("é"), "a": [7]}
        ),
        Step("out", evil, True, (Ref(evil),)),
    )
    calls: list[object] = []

    def op(*args: object, **kwargs: object) -> str:
        calls.append((args, kwargs))
        return "made"

    forward = write(steps, [evil + "in", "é"], "out", {"op": op})
    assert forward({evil: lambda x: (x, "called")}, {evil + "in": 1, "é": 3}) == ("made", "called")
    assert calls == [(([1, [3, 2]], evil), {"if": 3, "a": [7]})]


def test_values_are_forgotten_after_their_last_use() -> None:
    alive: list[int] = []

    class Value:
        count = 0

        def __init__(self) -> None:
            Value.count += 1

        def __del__(self) -> None:
            Value.count -= 1

    def op(*_: object) -> Value:
        alive.append(Value.count)
        return Value()

    names = "abcde"
    steps = [Step("a", "op", False)]
    steps += [Step(b, "op", False, (Ref(a),)) for a, b in pairwise(names)]
    write(steps, [], "e", {"op": op})({}, {})
    assert alive == [0, 1, 1, 1, 1]


class Masked(nn.Module):
    """A mask that the caller may pass as numbers of whatever type."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.fc(mask.to(self.fc.weight.dtype) + self.embed(ids))
        return logits


def test_an_input_of_the_right_type_already_is_not_overwritten() -> None:
    ids = torch.tensor([0, 9])
    module = nemo.decompose(Masked().eval(), {}, example=(ids, torch.randint(0, 2, (2, 6))))
    mask = torch.ones(2, 6)
    with torch.inference_mode():
        assert torch.equal(module(ids, mask), module(ids, mask))
    assert torch.equal(mask, torch.ones(2, 6))


@pytest.mark.parametrize("name", ["vit_small", "resnet18"])
def test_it_runs_under_autocast_as_its_parent_does(name: str) -> None:
    model = small(name)
    for module in (whole := nemo.decompose(model, {}), whole.optimize_for_inference()):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), torch.autocast("cpu", torch.bfloat16):
                logits, expected = module(IMAGES), model(IMAGES)
            assert logits.dtype == expected.dtype
            assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
    masks = random_masks(model, 0.6)
    module = nemo.decompose(model, masks).train()
    with torch.autocast("cpu", torch.bfloat16):
        module(IMAGES).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("replaced", ["kept", "gone"])
def test_values_of_a_forward_of_ones_own_are_not_overwritten(replaced: str) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    module = nemo.decompose(net, {}, example=torch.randn(2, 6))
    assert module._overwriting
    first, kept = next(module.children()), []
    compute = first.forward

    def forward(x: Tensor) -> Tensor:
        y = x if replaced == "gone" else compute(x)
        kept.append((y, y.clone()))
        return y

    first.forward = forward  # type: ignore[method-assign]
    with torch.inference_mode():
        module(torch.randn(2, 6))
    assert all(torch.equal(*pair) for pair in kept)

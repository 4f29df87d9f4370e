"""How models and modules are called: in training, in files, in exports, and when it is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import nemo
from nemo.calibration import recalibrate_bn
from nemo.cut import DecomposedModule
from nemo.masking.inspection import signature
from nemo.module.export import export
from nemo.module.files import ArtefactError
from nemo.predict import predict
from nemo.signature import Input, Signature
from tests.cut.helpers import randomise
from tests.cut.test_any_input import LENGTH, VOCABULARY, Both, Text, by_hand, inputs_of, run
from tests.module.test_files import forge


def cut(name: str, seed: int = 0, classes: tuple[int, ...] = (3, 0)) -> tuple[nn.Module, Any, Any]:
    """A model, random masks, and the module of two classes."""
    torch.manual_seed(seed)
    model = randomise({"text": Text, "both": Both}[name](), seed)
    output = "logits" if name == "both" else None
    modular = nemo.modularize(model, inputs_of(name, 2, 0), output=output)
    random = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(w, generator=random) < 0.6 for n, w in modular.layers.items()}
    return model, masks, nemo.decompose(modular, masks, classes)


def logits(returned: Any) -> Tensor:
    return returned["logits"] if isinstance(returned, dict) else returned


@pytest.mark.parametrize(("name", "names"), [
    ("text", ["ids", "mask"]), ("both", ["image", "row", "kind", "flag"]),
])  # fmt: skip
@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_exports_keep_the_names_of_inputs(
    name: str, names: list[str], to: str, tmp_path: Path
) -> None:
    model, masks, module = cut(name)
    nemo.save(module, tmp_path)
    path = export(tmp_path, to).path
    for count in (1, 5):
        inputs = inputs_of(name, count, 4)
        expected = logits(by_hand(model, masks, inputs))[:, [3, 0]]
        given = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
        if to == "onnx":
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            assert [item.name for item in session.get_inputs()] == names
            values = session.run(["logits"], {key: x.numpy() for key, x in given.items()})
            actual = torch.from_numpy(values[0])
        else:
            program = torch.export.load(path).module()
            actual = program(**given) if isinstance(inputs, dict) else program(*given.values())
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_merged_module_is_called_as_its_parts_are(tmp_path: Path) -> None:
    (one, of_one, a), (other, of_other, b) = cut("text", 0, (3, 0)), cut("text", 1, (2, 4))
    labels = torch.arange(24) % 4
    merged = nemo.merge(a, b, [(inputs_of("text", 24, 5), labels)])
    nemo.save(merged, tmp_path)
    inputs = inputs_of("text", 3, 6)
    sides = [by_hand(one, of_one, inputs)[:, [3, 0]], by_hand(other, of_other, inputs)[:, [2, 4]]]
    scaled = [x * p["scale"] + p["bias"] for x, p in zip(sides, merged.info["merged"], strict=True)]
    expected = torch.cat(scaled, 1)
    actual = run(nemo.load(tmp_path), inputs)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_modules_that_are_called_differently_are_not_merged() -> None:
    a, b = cut("text", 0, (3, 0))[2], cut("both", 1, (2, 4))[2]
    with pytest.raises(ValueError, match=r"take ids: int64 \(B, 7\) in 0\.\.39; .* -> logits; acc"):
        nemo.merge(a, b, [])


def test_loaders_may_give_dicts() -> None:
    torch.manual_seed(0)
    model = randomise(Both())
    modular = nemo.modularize(model, inputs_of("both", 2, 0), output="logits")
    with torch.no_grad():  # masks that differ between samples
        for generator in modular.generators.values():
            generator.excite.bias.fill_(-0.2)
    loader = [(inputs_of("both", 6, seed), torch.arange(6) % 3) for seed in range(3)]
    on = {layer: torch.zeros(3, width) for layer, width in modular.layers.items()}
    seen = []
    for inputs, labels in loader:
        with torch.no_grad():
            said, masks = modular(**inputs)
        seen.append(said)
        for layer, mask in masks.items():
            assert mask.shape == (6, modular.layers[layer])
            on[layer].index_add_(0, labels, (mask > 0).float())
    expected = {layer: counts / 6 >= 0.7 for layer, counts in on.items()}
    chosen = nemo.class_masks(modular, loader, 0.7)
    assert any(not mask.all() for mask in expected.values())
    for layer, mask in expected.items():
        rows = mask.any(1)  # a class whose neurons are all off keeps its most frequent ones
        assert torch.equal(chosen[layer][rows], mask[rows])
    assert torch.equal(predict(modular, loader)[0], torch.cat(seen))


def test_a_training_step_reaches_all_that_is_trained() -> None:
    modular = nemo.modularize(Both(), inputs_of("both", 2, 0), output="logits")
    said, masks = modular(**inputs_of("both", 4, 1))
    (said.square().sum() + sum(mask.sum() for mask in masks.values())).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in modular.model.parameters())


def test_statistics_are_estimated_on_tuples() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.norm(x + y)

    net, random = Net().eval(), torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=random), torch.randn(8, 3, generator=random)
    recalibrate_bn(net, [((x, y), torch.zeros(8))])
    torch.testing.assert_close(net.norm.running_mean, (x + y).mean(0))


def test_the_proof_draws_what_the_model_can_take() -> None:
    takes = signature(Text(), (torch.ones(2, LENGTH).long(), torch.ones(2, LENGTH).long()))
    assert takes.inputs == (
        Input("ids", (LENGTH,), "int64", 0, VOCABULARY - 1),
        Input("mask", (LENGTH,), "int64", 0, 1),
    )
    ids, mask = takes.draw(200, 0)
    assert set(ids.unique().tolist()) == set(range(VOCABULARY))
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask.any(1).all()
    whole = {**inputs_of("both", 5, 0), "kind": torch.tensor([1, 4, 2, 2, 1])}
    takes = signature(Both(), whole, "logits")
    assert takes.inputs[2] == Input("kind", (), "int64", 0, 5)
    assert [x.dtype for x in takes.draw(1, 0)] == [
        torch.float64, torch.float64, torch.int64, torch.bool,
    ]  # fmt: skip


class Returns(nn.Module):
    """A convolutional net that returns what a function makes of its logits."""

    def __init__(self, make: Callable[[Tensor], Any], *extra: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), *extra, nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )  # fmt: skip
        self.fc, self.make = nn.Linear(8, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.fc(self.net(x).flatten(1)))


class Floats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


IMAGES = torch.randn(2, 3, 9, 9)
WRONG: dict[str, tuple[nn.Module, Any, Any, str]] = {
    "several": (Returns(lambda y: {"a": y, "b": y}), IMAGES, None,
                "several tensors; name one: output='a', 'b'"),
    "unknown": (Returns(lambda y: {"a": y, "b": [y]}), IMAGES, "b",
                "output='b': the model returns no such tensor; accepted: 'a'"),
    "index": (Returns(lambda y: (y, y)), IMAGES, 2, "no such tensor; accepted: 0, 1"),
    "named": (Returns(lambda y: y), IMAGES, "logits", "returns one tensor; leave it out"),
    "none": (Returns(lambda y: [[y]]), IMAGES, None, "returns no tensor, but list"),
    "classes": (Returns(lambda y: y.argmax(1)), IMAGES, None, "accepted: logits, which are floats"),
    "squeeze": (Returns(torch.squeeze), IMAGES, None, r"\(4,\) for one sample and \(3, 4\) for"),
    "sum": (Returns(torch.sum), IMAGES, None, r"\(\) for one sample and \(\) for three"),
    "norm": (Returns(lambda y: y, nn.BatchNorm2d(8, track_running_stats=False)), IMAGES, None,
             r"net\.3: a BatchNorm without running statistics"),
    "float32": (nn.Sequential(Floats(), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)), IMAGES, None,
                r"float64, .* accepted: x\.to\(weight\.dtype\) instead of x\.float\(\)"),
    "number": (Returns(lambda y: y), (IMAGES, 3), None, "example: Tensor, int; accepted: a tensor"),
    "batches": (Text(), (torch.ones(2, LENGTH).long(), torch.ones(1, LENGTH).long()), None,
                r"shapes \(2, 7\), \(1, 7\); accepted: a tensor, .* as many in each"),
    "complex": (Returns(lambda y: y), IMAGES + 0j, None, "accepted: a tensor"),
    "name": (Returns(lambda y: y), {"x.y": IMAGES}, None, "cannot be the name of an argument"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_cut_is_one_line_in_modularize(case: str) -> None:
    model, example, output, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        nemo.modularize(model, example, output=output)
    assert "\n" not in str(caught.value)


def test_a_model_that_was_trained_elsewhere_is_cut_alike(tmp_path: Path) -> None:
    model, masks, module = cut("both")
    example = inputs_of("both", 2, 0)
    other = nemo.decompose(model, masks, (3, 0), example=example, output="logits")
    assert other.takes == module.takes
    inputs = inputs_of("both", 3, 1)
    assert torch.equal(run(other, inputs), run(module, inputs))


def test_models_are_taken_out_of_data_parallel() -> None:
    torch.manual_seed(0)
    model = randomise(Returns(lambda y: y))
    modular = nemo.modularize(nn.DataParallel(model), IMAGES)
    assert modular.model is model
    masks = {"net.2": torch.arange(8) % 2 == 0}
    for parent in (modular, nn.DataParallel(model)):
        module = nemo.decompose(parent, masks, example=IMAGES)
        assert (run(module, IMAGES) - by_hand(model, masks, IMAGES)).abs().max() < 1e-6


@pytest.fixture(scope="module")
def text() -> DecomposedModule:
    return cut("text")[2]


def test_a_wrong_call_of_a_module_names_what_it_takes(text: DecomposedModule) -> None:
    ids, mask = inputs_of("text", 3, 0)
    expected = run(text, (ids, mask))
    assert torch.equal(text(ids, mask=mask), expected)  # as its parent may be called
    for wrong in (lambda: text(ids), lambda: text(ids, mask, mask), lambda: text(ids, ids=mask)):
        with pytest.raises(TypeError, match="the module takes ids, mask; got a tensor"):
            wrong()
    with pytest.raises(ValueError, match=r"ids of \(5,\), and this module was cut for \(7,\)"):
        text(ids[:, :5], mask[:, :5])


def test_a_copy_for_inference_computes_the_same(text: DecomposedModule) -> None:
    inputs = inputs_of("text", 3, 0)
    fast = text.optimize_for_inference()
    torch.testing.assert_close(run(fast, inputs), run(text, inputs))
    half = copy.deepcopy(text).to(torch.bfloat16)
    assert run(half, inputs).dtype == torch.bfloat16


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no inputs": lambda s: s.update(inputs=[]),
    "one name twice": lambda s: s["inputs"][1].update(name="ids"),
    "code as a name": lambda s: s["inputs"][0].update(name="ids; import os"),
    "unknown type": lambda s: s["inputs"][0].update(dtype="object"),
    "range backwards": lambda s: s["inputs"][0].update(low=3, high=2),
    "huge size": lambda s: s["inputs"][0].update(shape=[2**20, 2**20]),
    "ids beyond the embedding": lambda s: s["inputs"][0].update(low=VOCABULARY, high=VOCABULARY),
    "output is a list": lambda s: s.update(output=["logits"]),
    "named is a number": lambda s: s.update(named=1),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_signatures_are_refused(text: DecomposedModule, tmp_path: Path, name: str) -> None:
    nemo.save(text, tmp_path)
    forge(tmp_path, lambda body: FORGERIES[name](body["signature"]))
    with pytest.raises(ArtefactError) as caught:
        nemo.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_loaded_module_knows_how_it_is_called(text: DecomposedModule, tmp_path: Path) -> None:
    nemo.save(text, tmp_path)
    assert nemo.load(tmp_path).takes == text.takes
    assert Signature.of_images((3, 4, 4)).plain
    assert not text.takes.plain

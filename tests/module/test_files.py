"""Saved modules come back the same, and nothing else is accepted."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import nemo.module.files as artefact
from nemo.cut import DecomposedModule, decompose
from nemo.models import build_model
from nemo.models.shapes import CnnShape, VitShape
from nemo.module.files import ArtefactError, load, save
from tests.cut.helpers import random_masks, randomise

SHAPES = {
    "resnet18": CnnShape(width=0.125),
    "deit_small": VitShape(dim=32, depth=2, heads=2, patch=8),
}


SAVED = Path(__file__).parent / "saved-by-0.1"
LOGITS = [-0.4703656, -0.3664836]  # of that release, for the images of the test


def make(name: str) -> DecomposedModule:
    torch.manual_seed(0)
    model = randomise(build_model(name, 5, 32, SHAPES[name]))
    return decompose(model, random_masks(model, 0.5), [4, 0])


@pytest.fixture(scope="module")
def module() -> DecomposedModule:
    return make("resnet18")


@pytest.mark.parametrize("name", SHAPES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    module = make(name)
    save(module, tmp_path / "a", {"class_names": ["cat", "dog"]})
    loaded = load(tmp_path / "a")
    images = torch.randn(3, 3, 32, 32)
    assert torch.equal(loaded(images), module(images))
    assert (loaded.classes, loaded.report, loaded.certificate) == (
        module.classes, module.report, module.certificate)  # fmt: skip
    assert loaded.info == {"class_names": ["cat", "dog"]}
    assert not loaded.training
    save(loaded, tmp_path / "b")
    for file in ("module.json", "module.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "module.json",
        "module.safetensors",
    ]


def test_training_goes_on_after_loading(module: DecomposedModule, tmp_path: Path) -> None:
    save(module, tmp_path)
    loaded = load(tmp_path).train()
    images = torch.randn(4, 3, 32, 32)
    loss = loaded(images).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loaded.parameters())
    assert not torch.equal(loaded.state_dict()["stem_bn.running_mean"] if "stem_bn" in dict(
        loaded.named_children()) else next(b for n, b in loaded.named_buffers() if "mean" in n),
        next(b for n, b in module.named_buffers() if "mean" in n))  # fmt: skip


@pytest.mark.parametrize("file", ["module.json", "module.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "foreign"])
def test_damaged_files_are_one_clear_error(
    module: DecomposedModule, tmp_path: Path, file: str, damage: str
) -> None:
    save(module, tmp_path)
    path = tmp_path / file
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {
        "empty": b"",
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "foreign": b'{"format": "something else"}',
    }
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(ArtefactError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


EDITS: dict[str, Any] = {
    "pruned": lambda m: prune.l1_unstructured(m._modules["2"], "weight", 0.5),
    "parametrised": lambda m: weight_norm(m._modules["2"]),
    "replaced": lambda m: setattr(m, "2", nn.Conv2d(4, 2, 3, padding=1)),
    "of another kind": lambda m: setattr(m, "2", nn.Identity()),
    "removed": lambda m: delattr(m, "2"),
    "padded": lambda m: setattr(m._modules["2"], "padding", (1, 1)),
    "hooked": lambda m: m._modules["2"].register_forward_hook(lambda *_: None),
    "of a subclass": lambda m: setattr(m, "2", type("Conv2d", (nn.Conv2d,), {})(4, 2, 3)),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_module_is_refused_and_the_folder_stays(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    example = torch.randn(2, 3, 8, 8)
    module = decompose(model.append(nn.Linear(64, 2)), {"2": torch.arange(4) < 2}, example=example)
    save(module, tmp_path)
    expected = module(example)
    EDITS[name](module)
    with pytest.raises(ValueError, match=r"^cannot save: layer '2' .*; accepted: .*$"):
        save(module, tmp_path)
    assert torch.equal(load(tmp_path)(example), expected)


def test_other_values_and_widths_of_layers_are_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    module = decompose(model, {"0": torch.arange(4) < 2}, example=torch.randn(2, 3))
    module.add_module("2", nn.Linear(2, 7, bias=False))  # a new head
    save(module, tmp_path)
    inputs = torch.randn(4, 3)
    assert load(tmp_path)(inputs).shape == (4, 7)
    assert torch.equal(load(tmp_path)(inputs), module(inputs))


def forge(folder: Path, change: Any) -> None:
    """Edit the description and sign it anew, as somebody hostile would."""
    path = folder / "module.json"
    body = json.loads(path.read_text())
    change(body)
    body["sha256"] = artefact._digest(body)
    path.write_text(json.dumps(body))


FORGERIES = {
    "unknown op": lambda b: b["steps"][2].update(target="os.system"),
    "op that is not listed": lambda b: b["steps"][2].update(target="aten.from_file.default"),
    "unknown layer": lambda b: b["layers"].update(x={"kind": "Bilinear", "config": {}}),
    "code as a name": lambda b: b["steps"][2].update(name="a; import os"),
    "reference forwards": lambda b: b["steps"][0].update(args=[{"ref": b["steps"][5]["name"]}]),
    "object as argument": lambda b: b["steps"][2].update(args=[{"py/object": "os"}]),
    "huge size": lambda b: b["steps"].append(
        {"name": "z", "target": "aten.expand.default", "layer": False,
         "args": [{"ref": "input"}, [2**30, 3, 32, 32]], "kwargs": {}}),
    "wrong stride type": lambda b: next(
        s for s in b["layers"].values() if s["kind"] == "Conv2d")["config"].update(stride="1"),
    "no steps": lambda b: b.update(steps=[]),
    "layers is a list": lambda b: b.update(layers=[]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_descriptions_are_refused(
    module: DecomposedModule, tmp_path: Path, name: str
) -> None:
    save(module, tmp_path)
    forge(tmp_path, FORGERIES[name])
    with pytest.raises(ArtefactError):
        load(tmp_path)


def step(name: str, target: str, *args: Any) -> dict[str, Any]:
    return {"name": name, "target": target, "layer": False, "args": list(args), "kwargs": {}}


X, N = {"ref": "input"}, {"ref": "n0"}
MORE_STEPS = {
    "a number that grows without end": (
        "step 'n5' is too large",
        [step("n0", "aten.sym_size.int", X, 0)]
        + [step(f"n{i}", "mul", {"ref": f"n{i - 1}"}, {"ref": f"n{i - 1}"}) for i in range(1, 40)],
    ),
    "a list that is repeated": (
        "bad arguments of step 'z'",
        [step("n0", "aten.split.Tensor", X, 1), step("z", "mul", N, 2**26)],
    ),
    "two large values": (
        "step 'z' is too large",
        [step("z", "aten.adaptive_max_pool2d.default", X, [20000, 20000])],
    ),
    "statistics that are learned": (
        "step 'z' would overwrite running statistics",
        [step("z", "aten.batch_norm.default", X, None, None, X, X, True, 0.5, 1e-5, False)],
    ),
}


@pytest.mark.parametrize("name", MORE_STEPS)
def test_steps_that_would_cost_or_change_too_much_are_refused(
    module: DecomposedModule, tmp_path: Path, name: str
) -> None:
    message, steps = MORE_STEPS[name]
    save(module, tmp_path)
    forge(tmp_path, lambda body: body["steps"].extend(steps))
    with pytest.raises(ArtefactError, match=message):
        load(tmp_path)


def test_a_layer_with_the_name_of_an_attribute_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))
    save(decompose(model, {}, [0, 1], example=torch.zeros(2, 3, 8, 8)), tmp_path)
    weights = tmp_path / "module.safetensors"
    tensors = {key.replace("2.", "classes."): t for key, t in load_file(weights).items()}
    save_file(tensors, weights)

    def rename(body: dict[str, Any]) -> None:
        body["layers"]["classes"] = body["layers"].pop("2")
        for one in body["steps"]:
            one["target"] = one["target"].replace("2", "classes") if one["layer"] else one["target"]
        body["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()

    forge(tmp_path, rename)
    with pytest.raises(ArtefactError, match="bad layer name 'classes'"):
        load(tmp_path)


def test_a_module_of_version_0_1_loads_and_computes_the_same() -> None:
    module = load(SAVED)
    images = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    torch.testing.assert_close(module(images), torch.tensor([LOGITS]))
    assert module.classes == [2, 0]


@pytest.mark.parametrize("version", [0, 3, 99, "1", None])
def test_other_versions_are_refused_in_one_line(tmp_path: Path, version: object) -> None:
    shutil.copytree(SAVED, tmp_path, dirs_exist_ok=True)
    forge(tmp_path, lambda body: body.update(version=version))
    with pytest.raises(ArtefactError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: version {version!r}, this nemo reads versions 1 and 2"


def test_loading_and_running_imports_nothing_that_cuts_or_trains() -> None:
    code = (
        "import sys, torch, nemo\n"
        f"module = nemo.load({str(SAVED)!r})\n"
        "module.optimize_for_inference()(torch.zeros(2, 3, 16, 16))\n"
        "heavy = {'timm', 'torchvision', 'pandas', 'mlflow', 'dvc'}\n"
        "light = ('nemo', 'nemo.module', 'nemo.cost', 'nemo.files', 'nemo.signature')\n"
        "bad = heavy & set(sys.modules)\n"
        "bad |= {n for n in sys.modules if n.startswith('nemo.') and not n.startswith(light[1:])}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_layers_of_a_sequential_keep_their_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    model.append(nn.Linear(4 * 28 * 28, 3))
    module = decompose(model, {"2": torch.tensor([True, False, True, False])})
    save(module, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load(tmp_path)(images), module(images))

"""Thousands of damaged and forged artefacts: one kind of error, or a module that runs.

NEMO_FUZZ sets how many of each kind are tried (default 150; 2000 takes some minutes).
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo.cut import decompose
from nemo.models import build_model
from nemo.models.shapes import CnnShape, VitShape
from nemo.module.files import ArtefactError, load, save
from tests.cut.helpers import random_masks, randomise
from tests.module.test_files import forge
from tests.module.test_signature import cut

CASES = int(os.environ.get("NEMO_FUZZ", "150"))
ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -1e308, "", "input", "x" * 300, "os.system",
    "__class__", "aten.relu.default", "Linear", [], [[]], [[[[1]]]], {}, {"ref": "input"},
    {"ref": "nobody"}, {"float": "nan"}, {"dtype": "torch.int64"}, {"dtype": "os"}, [1] * 5000,
]  # fmt: skip


@pytest.fixture(scope="module", params=["resnet18", "vit_small", "text"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {
        "resnet18": CnnShape(width=0.0625),
        "vit_small": VitShape(dim=16, depth=2, heads=2, patch=16),
    }
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "text":
        module = cut("text")[2]
    else:
        model = randomise(build_model(request.param, 4, 32, shapes[request.param]))
        module = decompose(model, random_masks(model, 0.5), [1, 0])
    save(module, folder, {"names": ["a", "b"]})
    return folder


def attempt(folder: Path) -> None:
    """Load; what loads must run."""
    try:
        module = load(folder)
    except ArtefactError as error:
        if "\n" in str(error):
            pytest.fail(f"more than one line: {error}")
        return
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    module.run(module.takes.lowest(1, torch.zeros((), dtype=dtype)))


def copy_of(artefact: Path, tmp_path: Path) -> Path:
    for file in artefact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("file", ["module.json", "module.safetensors"])
def test_flipped_bytes_never_load(artefact: Path, tmp_path: Path, file: str) -> None:
    folder = copy_of(artefact, tmp_path)
    content = (artefact / file).read_bytes()
    generator = random.Random(0)
    for _ in range(CASES):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 1, 4, 64])):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        if bytes(changed) == content:
            continue
        (folder / file).write_bytes(changed)
        if file == "module.json" and json_equal(bytes(changed), content):
            continue  # a space for a newline
        with pytest.raises(ArtefactError):
            load(folder)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_forged_values_are_refused_or_run(artefact: Path, tmp_path: Path) -> None:
    """Any value of the description replaced by an odd one, and the description signed again."""
    folder = copy_of(artefact, tmp_path)
    generator = random.Random(1)
    original = (artefact / "module.json").read_text()
    for _ in range(CASES):
        (folder / "module.json").write_text(original)

        def change(body: dict[str, Any]) -> None:
            for _ in range(generator.choice([1, 1, 2, 5])):
                mutate(body, generator)

        forge(folder, change)
        attempt(folder)


def test_forged_weights_are_refused_or_run(artefact: Path, tmp_path: Path) -> None:
    """Tensors dropped, renamed, resized and retyped, with checksums that fit."""
    from hashlib import sha256

    from safetensors.torch import load as read
    from safetensors.torch import save as write

    folder = copy_of(artefact, tmp_path)
    generator = random.Random(2)
    for _ in range(CASES // 3):
        tensors = read((artefact / "module.safetensors").read_bytes())
        name = generator.choice(sorted(tensors))
        old = tensors.pop(name)
        choice = generator.randrange(6)
        if choice == 1:
            tensors[name + "x"] = old
        elif choice == 2:
            tensors[name] = torch.zeros(3, 5)
        elif choice == 3:
            tensors[name] = old.to(torch.int64)
        elif choice == 4:
            tensors[name] = old.double() if old.is_floating_point() else old + 10**6
        elif choice == 5:
            tensors[name] = torch.zeros(0)
        packed = write(tensors)
        (folder / "module.safetensors").write_bytes(packed)
        digest = sha256(packed).hexdigest()
        (folder / "module.json").write_text((artefact / "module.json").read_text())
        forge(folder, lambda body, digest=digest: body.update(weights_sha256=digest))
        attempt(folder)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


def mutate(body: dict[str, Any], generator: random.Random) -> None:
    inputs = "signature" if "signature" in body else "input_size"
    part = generator.choice(["layers", "steps", "steps", inputs, "output", "classes", None])
    spots = list(places(body[part])) if isinstance(body.get(part), (dict, list)) else []
    container, key = generator.choice(spots) if spots else (body, part or "version")
    others = [c[k] for c, k in spots] or [None]
    kind = generator.randrange(4)
    if kind == 0 and isinstance(container, dict):
        container.pop(key, None)  # an earlier change may have taken it
    elif kind == 1 and isinstance(container, list):
        container.insert(
            generator.randrange(len(container) + 1), copy.deepcopy(generator.choice(ODD))
        )
    elif kind == 2:
        container[key] = copy.deepcopy(generator.choice(others))
    else:
        container[key] = copy.deepcopy(generator.choice(ODD))

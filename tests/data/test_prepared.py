from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nemo.data import DataError, Prepared, load, prepare, read_meta
from nemo.data.sources import load_source
from nemo.sections import DataSource

DIGITS = DataSource(source="digits", crop=2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare("digits", DIGITS, out)
    return out


def test_what_is_written(digits: Path) -> None:
    assert sorted(path.name for path in digits.iterdir()) == ["arrays.safetensors", "meta.json"]
    assert list(digits.parent.iterdir()) == [digits]
    meta, data = read_meta(digits), load(digits)
    assert (meta["name"], meta["title"]) == ("digits", "digits (scikit-learn)")
    assert (meta["flip"], meta["crop"], meta["size"]) == (False, 2, [16, 16])
    assert meta["counts"] == {"train": 1293, "val": 145, "test": 359}
    assert (data.name, data.classes, data.size) == ("digits", tuple("0123456789"), (16, 16))
    assert (data.flip, data.crop, data.sha256) == (False, 2, meta["sha256"])
    for name, split in data.splits.items():
        assert len(split) == meta["counts"][name]
        assert split.images.shape == (len(split), 3, 16, 16)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)


def test_the_same_bytes_twice_and_on_top(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "again"
    prepare("digits", DIGITS.model_copy(update={"seed": 7}), out)
    assert read_meta(out)["sha256"] != read_meta(digits)["sha256"]
    prepare("digits", DIGITS, out)
    for name in ("arrays.safetensors", "meta.json"):
        assert (out / name).read_bytes() == (digits / name).read_bytes()


def test_the_splits_are_a_stratified_partition(digits: Path, tmp_path: Path) -> None:
    raw = load_source("digits", None, tmp_path).splits["train"]
    splits = load(digits).splits
    images = np.concatenate([split.images.numpy() for split in splits.values()])
    assert sorted(image.tobytes() for image in images) == sorted(i.tobytes() for i in raw.images)
    whole = np.bincount(raw.labels)
    assert (abs(splits["test"].labels.bincount().numpy() - whole * 0.2) <= 1).all()
    assert (abs(splits["val"].labels.bincount().numpy() - whole * 0.08) <= 1).all()


def test_statistics_are_of_the_training_images(digits: Path) -> None:
    data = load(digits)
    pixels = data.splits["train"].images.double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_a_constant_channel_has_std_1(make_images: Callable[..., Path], tmp_path: Path) -> None:
    from PIL import Image

    root = make_images("red", {"a": 5, "b": 5})
    for path in root.rglob("*.png"):
        red = Image.open(path).getchannel("R")
        Image.merge("RGB", [red, Image.new("L", red.size), red]).save(path)
    prepare("red", DataSource(source=f"folder:{root}"), tmp_path / "out")
    meta = read_meta(tmp_path / "out")
    assert (meta["mean"][1], meta["std"][1]) == (0, 1)
    assert meta["std"][0] < 1


def test_a_source_keeps_its_own_splits(make_images: Callable[..., Path], tmp_path: Path) -> None:
    counts = {"train/a": 9, "train/b": 4, "test/a": 1, "test/b": 2, "val/a": 3, "val/b": 1}
    root = make_images("pets", counts)
    prepare("pets", DataSource(source=f"folder:{root}", title="Pets!"), tmp_path / "out")
    meta = read_meta(tmp_path / "out")
    assert (meta["title"], meta["classes"]) == ("Pets!", ["a", "b"])
    assert meta["counts"] == {"train": 13, "val": 4, "test": 3}


def test_a_part_of_the_classes_in_the_order_given(
    make_images: Callable[..., Path], tmp_path: Path
) -> None:
    counts = {f"{split}/{name}": 4 for split in ("train", "test") for name in "abcd"}
    root = make_images("pets", counts)
    (root / "train/a/0000.png").write_bytes(b"damaged")  # of a class that is left out
    prepare("pets", DataSource(source=f"folder:{root}", classes="d+1-2"), tmp_path / "out")
    data = load(tmp_path / "out")
    assert data.classes == ("d", "b", "c")
    for label, name in enumerate("dbc"):
        images = data.splits["test"].images[data.splits["test"].labels == label]
        files = [Image.open(root / f"test/{name}/{index:04}.png") for index in range(4)]
        stacked = np.stack([np.asarray(file).transpose(2, 0, 1) for file in files])
        assert np.array_equal(images.numpy(), stacked)
    assert read_meta(tmp_path / "out")["counts"] == {"train": 9, "val": 3, "test": 12}


def test_a_limit_is_of_training_images(digits: Path, tmp_path: Path) -> None:
    prepare("digits", DIGITS.model_copy(update={"limit": 500}), tmp_path / "out")
    whole, part = load(digits), load(tmp_path / "out")
    assert read_meta(tmp_path / "out")["counts"] == {"train": 450, "val": 50, "test": 359}
    assert torch.equal(part.splits["test"].images, whole.splits["test"].images)
    before = {i.numpy().tobytes() for s in ("train", "val") for i in whole.splits[s].images}
    kept = [i.numpy().tobytes() for s in ("train", "val") for i in part.splits[s].images]
    assert set(kept) <= before
    assert len(set(kept)) == 500
    prepare("digits", DIGITS.model_copy(update={"limit": 10**6}), tmp_path / "out")
    assert read_meta(tmp_path / "out") == read_meta(digits)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"classes": "3"}, r"^data\.digits\.classes: '3' is one class; accepted: two or more$"),
        (
            {"classes": "cat+3"},
            r"^data\.digits\.classes: subset 'cat\+3': 'cat' is no class; accepted",
        ),
        (
            {"limit": 15},
            r"^data\.digits\.limit: 15 images leave a class fewer than 2; accepted: 21 or",
        ),
    ],
)
def test_a_part_that_is_not_there(part: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepare("digits", DIGITS.model_copy(update=part), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_names_no_path(make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images("pets", {"a": 9, "b": 4})
    prepare("pets", DataSource(source=f"folder:{root}"), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert path.stat().st_mode & 0o777 == (tmp_path / "out/meta.json").stat().st_mode & 0o777


def test_restrict(digits: Path) -> None:
    data = load(digits)
    few = data.restrict([7, 2])
    assert few.classes == ("7", "2")
    assert (few.mean, few.sha256) == (data.mean, data.sha256)
    for name, split in few.splits.items():
        labels = data.splits[name].labels
        keep = (labels == 7) | (labels == 2)
        assert torch.equal(split.images, data.splits[name].images[keep])
        assert torch.equal(split.labels == 0, labels[keep] == 7)
        assert set(split.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("classes", [[], [1, 1], [10], [-1]])
def test_restrict_refuses(digits: Path, classes: list[int]) -> None:
    with pytest.raises(DataError, match=r"classes \[.*\]: accepted: some of 0 to 9, each once"):
        load(digits).restrict(classes)


def test_a_failure_leaves_what_was_there(
    digits: Path, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    root = make_images("pets", {"a": 5, "b": 5})
    prepare("pets", DataSource(source=f"folder:{root}"), out)
    before = (out / "meta.json").read_bytes()
    (root / "a/0003.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a/0003\.png"):
        prepare("pets", DataSource(source=f"folder:{root}"), out)
    assert (out / "meta.json").read_bytes() == before
    with pytest.raises(DataError, match=r"a/0003\.png"):
        prepare("pets", DataSource(source=f"folder:{root}"), tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pets"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nemo.data.prepared.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        prepare("digits", DIGITS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_someone_elses_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(DataError, match="exists and is no prepared folder"):
            prepare("digits", DIGITS, out)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_cannot_be_loaded(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json: No such file .*; `nemo prepare` writes"):
        load(tmp_path / "missing")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(DataError, match=r"meta\.json: not JSON; `nemo prepare` writes"):
        load(tmp_path)
    for foreign in ("[]", '{"name": "pets"}'):
        (tmp_path / "meta.json").write_text(foreign)
        with pytest.raises(DataError, match="not written by this version of `nemo prepare`"):
            load(tmp_path)
    (tmp_path / "meta.json").write_bytes((digits / "meta.json").read_bytes())
    with pytest.raises(DataError, match=r"arrays\.safetensors: cannot be read .*`nemo prepare`"):
        load(tmp_path)
    (tmp_path / "arrays.safetensors").write_bytes(b"changed")
    with pytest.raises(DataError, match=r"not the arrays that meta\.json describes"):
        load(tmp_path)


def test_metadata_and_subsets_need_no_torch(digits: Path) -> None:
    """With a stand-in for the package `nemo`, whose own imports are not at issue here."""
    package = Path(__file__).parents[2] / "nemo"
    script = f"""
import sys, types
nemo = sys.modules["nemo"] = types.ModuleType("nemo")
nemo.__path__ = [{str(package)!r}]
from nemo.data import parse_subset, prepare, read_meta
assert parse_subset("0-2", read_meta({str(digits)!r})["classes"]) == [0, 1, 2]
assert not set(sys.modules) & {{"torch", "torchvision", "sklearn", "PIL", "scipy"}}
from nemo.data import Batches
assert "torch" in sys.modules and "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_meta_is_readable_and_sorted(digits: Path) -> None:
    text = (digits / "meta.json").read_text()
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    assert isinstance(load(digits), Prepared)

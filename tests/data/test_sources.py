from __future__ import annotations

import hashlib
import http.client
import pickle
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits

from nemo.data import DataError
from nemo.data.sources import DOWNLOADS, load_source


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_digits(tmp_path: Path) -> None:
    raw = load_source("digits", None, tmp_path)
    train = raw.splits["train"]
    assert list(raw.splits) == ["train"]
    assert raw.title == "digits (scikit-learn)"
    assert raw.classes == list("0123456789")
    assert train.images.shape == (1797, 3, 16, 16)
    assert (train.images == train.images[:, :1]).all()
    assert np.array_equal(train.labels, load_digits().target)


def test_digits_at_their_own_size_are_scaled_only(tmp_path: Path) -> None:
    images = load_source("digits", 8, tmp_path).splits["train"].images
    assert images.min() == 0
    assert images.max() == 255
    assert np.abs(images[:, 0] - load_digits().images * 255 / 16).max() <= 0.5


def fake_cifar(source: str, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The files of CIFAR in their own format, four images each, with the checksums of these."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if source == "cifar10" else datasets.CIFAR100
    folder, random = downloads / kind.base_folder, np.random.default_rng(0)
    folder.mkdir()
    label_key = "labels" if source == "cifar10" else "fine_labels"
    made: dict[str, Any] = {"names": [f"name {i}" for i in range(4)]}
    for attribute in ("train_list", "test_list"):
        rows = []
        for name, _ in getattr(kind, attribute):
            data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
            content = pickle.dumps({"data": data, label_key: [3, 1, 0, 2]})
            (folder / name).write_bytes(content)
            rows.append([name, hashlib.md5(content).hexdigest()])
            made.setdefault(attribute, []).append(data.reshape(4, 3, 32, 32))
        monkeypatch.setattr(kind, attribute, rows)
    content = pickle.dumps({kind.meta["key"]: made["names"]})
    (folder / kind.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(content).hexdigest()})
    return made


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_cifar_without_network(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fake_cifar(source, tmp_path, monkeypatch)
    raw = load_source(source, None, tmp_path)
    assert (raw.title, raw.classes) == (DOWNLOADS[source][0], made["names"])
    for split in ("train", "test"):
        assert np.array_equal(raw.splits[split].images, np.concatenate(made[f"{split}_list"]))
        assert raw.splits[split].labels.dtype == np.int64
        assert raw.splits[split].labels[:4].tolist() == [3, 1, 0, 2]


@pytest.mark.usefixtures("offline")
def test_a_damaged_download_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cifar("cifar10", tmp_path, monkeypatch)
    batch = tmp_path / "cifar-10-batches-py/data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="CIFAR-10 cannot be downloaded or read"):
        load_source("cifar10", None, tmp_path)


def fake_svhn(downloads: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """SVHN's files in their own format, five images each: pixels last, and a 10 for the digit 0."""
    from torchvision import datasets

    random, rows, made = np.random.default_rng(0), {}, {}
    for split in ("train", "test"):
        url, name, _ = datasets.SVHN.split_list[split]
        made[split] = random.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
        labels = np.array([[10], [1], [9], [2], [10]], dtype=np.uint8)
        scipy.io.savemat(downloads / name, {"X": made[split], "y": labels})
        rows[split] = [url, name, hashlib.md5((downloads / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", rows)
    return made


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("size", [None, 16])
def test_svhn_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    made = fake_svhn(tmp_path, monkeypatch)
    raw = load_source("svhn", size, tmp_path)
    assert (raw.title, raw.classes) == ("SVHN", list("0123456789"))
    for split in ("train", "test"):
        assert raw.splits[split].labels.tolist() == [0, 1, 9, 2, 0]
        images = [Image.fromarray(made[split][..., i]) for i in range(5)]
        if size is not None:
            images = [image.resize((16, 16), Image.Resampling.BILINEAR) for image in images]
        expected = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
        assert np.array_equal(raw.splits[split].images, expected)


@pytest.mark.parametrize("source", DOWNLOADS)
@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route to host"),
        TimeoutError("timed out"),
        http.client.IncompleteRead(b"half"),
    ],
)
def test_a_failed_download_says_what_to_do(
    source: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        assert socket.getdefaulttimeout() is not None
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    with pytest.raises(DataError) as caught:
        load_source(source, None, tmp_path / "downloads")
    title, files = DOWNLOADS[source]
    message = str(caught.value)
    assert message.startswith(f"{title} cannot be downloaded or read (")
    assert f"offline, put {files} into {tmp_path}/downloads/, or set the source to fol" in message
    assert "\n" not in message
    assert socket.getdefaulttimeout() is None


def test_folder_and_unknown(make_images: Callable[..., Path], tmp_path: Path) -> None:
    root = make_images("pets", {"cat": 2, "dog": 2})
    assert load_source(f"folder:{root}", None, tmp_path).classes == ["cat", "dog"]
    with pytest.raises(DataError, match="unknown source 'mnist'; accepted: digits, cifar10"):
        load_source("mnist", None, tmp_path)

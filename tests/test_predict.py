"""`nemo predict` says what the module's logits say, computed by hand from the pixels."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import nemo
from nemo.cli.main import cli


def made(folder: Path, channels: int, size: tuple[int, int], info: dict) -> nn.Module:
    """A module with two outputs that depend on where an image is bright."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    )
    net.append(nn.Linear(net(torch.zeros(1, channels, *size)).shape[1], 2))
    modular = nemo.modularize(net, example=torch.randn(2, channels, *size))
    masks = {layer: torch.arange(n) % 2 == 0 for layer, n in modular.layers.items()}
    module = nemo.decompose(modular, masks)
    how = {"mean": [0.4] * channels, "std": [0.25] * channels, "size": list(size)}
    nemo.save(module, folder, {"preprocessing": how, **info})
    return module


def said(folder: Path, file: Path) -> tuple[str, float]:
    done = CliRunner().invoke(cli, ["predict", str(folder), str(file)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    name, label, probability = done.output.rstrip("\n").split("\t")
    assert name == str(file)
    return label, float(probability)


@pytest.mark.parametrize(
    ("channels", "size", "info", "names"),
    [
        (3, (12, 48), {"class_names": ["a b", "Кошка"]}, ["a b", "Кошка"]),
        (3, (48, 12), {"class_names": ["a", "b"]}, ["a", "b"]),
        (1, (28, 28), {"class_names": ["a", "b"]}, ["a", "b"]),
        (3, (24, 24), {}, ["0", "1"]),
    ],
)
def test_it_sees_the_whole_image(tmp_path, channels, size, info, names):
    module = made(tmp_path / "my module", channels, size, info)
    pixels = np.random.default_rng(1).integers(0, 256, (*size, channels), dtype=np.uint8)
    file = tmp_path / "an image.png"
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(file)
    values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
    with torch.no_grad():
        expected = module((values / 255 - 0.4) / 0.25)[0].softmax(0).tolist()
    label, probability = said(tmp_path / "my module", file)
    assert label == names[int(np.argmax(expected))]
    assert probability == pytest.approx(max(expected), abs=1e-4)


def test_a_larger_image_is_resized_in_proportion(tmp_path):
    module = made(tmp_path / "wide", 3, (12, 48), {"class_names": ["a", "b"]})
    blocks = np.random.default_rng(2).integers(0, 256, (12, 48, 3), dtype=np.uint8)
    large = np.zeros((60, 192, 3), dtype=np.uint8)
    large[6:54] = np.kron(blocks, np.ones((4, 4, 1), dtype=np.uint8))
    Image.fromarray(large).save(tmp_path / "a.png")
    box = (0, 6, 192, 54)
    small = Image.fromarray(large).resize((48, 12), Image.Resampling.BILINEAR, box)
    values = torch.from_numpy(np.asarray(small).transpose(2, 0, 1).astype(np.float32))[None]
    with torch.no_grad():
        expected = module((values / 255 - 0.4) / 0.25)[0].softmax(0)
    label, probability = said(tmp_path / "wide", tmp_path / "a.png")
    assert label == "ab"[int(expected.argmax())]
    assert probability == pytest.approx(float(expected.max()), abs=1e-4)


def test_classes_without_names_are_the_parents_numbers(tmp_path):
    module = made(tmp_path / "m", 3, (24, 24), {})
    module.classes = [7, 4]
    nemo.save(module, tmp_path / "m", {"preprocessing": {"mean": [0.4] * 3, "std": [0.25] * 3,
                                                         "size": [24, 24]}})  # fmt: skip
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    with torch.no_grad():
        best = int(module(torch.full((1, 3, 24, 24), -0.4 / 0.25)).argmax())
    assert said(tmp_path / "m", tmp_path / "a.png")[0] == ["7", "4"][best]


WRONG = [
    ({"class_names": ["a"]}, "class_names has 1 names, and the module returns 2 logits"),
    ({"class_names": 3}, "class_names is 3; accepted: a list of strings"),
    ({"class_names": [1, 2]}, "class_names is [1, 2]; accepted: a list of strings"),
    ({"preprocessing": {"mean": [0.4] * 3}}, "accepted: mean and std of 3 channels or"),
    ({"preprocessing": 3}, "preprocessing is 3; accepted: mean and std of 3 channels or"),
    ({"preprocessing": {"mean": [0] * 4, "std": [1] * 4, "size": [24, 24]}}, "of 3 channels"),
    (
        {"preprocessing": {"mean": [0] * 3, "std": [0] * 3, "size": [24, 24]}},
        "of pixels from 0 to 1",
    ),
    ({"preprocessing": {"mean": [0] * 3, "std": [1] * 3, "size": [24]}}, "size [height, width]"),
    ({"preprocessing": {"mean": [99] * 3, "std": [1] * 3, "size": [24, 24]}}, "from 0 to 1"),
    ({"preprocessing": {"mean": [1] * 3, "std": [60] * 3, "size": [24, 24]}}, "from 0 to 1"),
    (
        {"preprocessing": {"mean": [0], "std": [1], "size": [24, 24]}},
        "has 1 channels, and the module takes images of 3",
    ),
]


@pytest.mark.parametrize(
    ("info", "line"), [*WRONG, ({"mine": torch.ones(2)}, "type Tensor is not JSON serializable")]
)
def test_what_does_not_fit_is_not_saved(tmp_path, info, line):
    module = made(tmp_path / "good", 3, (24, 24), {})
    module.classes = [7, 4]
    with pytest.raises(ValueError, match=f"^info: .*{re.escape(line)}") as caught:
        nemo.save(module, tmp_path / "m", info)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(("info", "line"), WRONG)
def test_a_module_that_says_what_does_not_fit_is_one_line(tmp_path, monkeypatch, info, line):
    """As an earlier version saved it, which did not look."""
    monkeypatch.setattr("nemo.module.files.check_info", lambda module, info: None)
    made(tmp_path / "m", 3, (24, 24), info)
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "m"), str(tmp_path / "a.png")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert line in done.output


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x, y):
        return self.head((self.conv(x) + self.conv(y)).mean((2, 3)))


class Volume(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv3d(1, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "shape"), [(Pair(), (3, 8, 8)), (Volume(), (1, 8, 8, 8))], ids=["pair", "volume"]
)
def test_a_module_of_something_else_than_an_image_is_one_line(tmp_path, model, shape):
    example = torch.zeros(2, *shape)
    module = nemo.decompose(model, {}, example=(example,) * (2 if isinstance(model, Pair) else 1))
    how = {"mean": [0.5] * shape[0], "std": [0.5] * shape[0], "size": [8, 8]}
    nemo.save(module, tmp_path / "m", {"preprocessing": how})
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "m"), str(tmp_path / "a.png")])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert f"the module takes {module.takes}; accepted: one image" in done.output


def test_unreadable_images_are_named_after_the_others(tmp_path):
    made(tmp_path / "m", 3, (24, 24), {"class_names": ["a", "b"]})
    good = [tmp_path / name for name in ("1.png", "3.png")]
    for file, colour in zip(good, ("white", "black"), strict=True):
        Image.new("RGB", (24, 24), colour).save(file)
    alone = [said(tmp_path / "m", file)[0] for file in good]
    (tmp_path / "2.png").write_bytes(b"no image")
    files = [good[0], tmp_path / "2.png", good[1], tmp_path / "4.png"]
    done = CliRunner().invoke(cli, ["predict", str(tmp_path / "m"), *map(str, files)])
    assert done.exit_code == 1
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(row[0], row[1]) for row in rows] == list(zip(map(str, good), alone, strict=True))
    damaged, missing = done.stderr.splitlines()
    assert damaged == f"nemo: {files[1]}: damaged, or in no image format that Pillow reads"
    assert missing == f"nemo: {files[3]}: No such file or directory"


def test_a_module_of_half_the_bits_sees_images_too(tmp_path):
    made(tmp_path / "whole", 3, (24, 24), {"class_names": ["a", "b"]})
    nemo.save(nemo.load(tmp_path / "whole").bfloat16(), tmp_path / "half")
    Image.new("RGB", (24, 24), "red").save(tmp_path / "a.png")
    label, probability = said(tmp_path / "half", tmp_path / "a.png")
    whole = said(tmp_path / "whole", tmp_path / "a.png")
    assert (label, probability) == (whole[0], pytest.approx(whole[1], abs=0.02))


@pytest.mark.parametrize(
    ("finetuned", "shown"),
    [(True, "yes"), ({"epochs": 3}, "yes"), ({"val_accuracy": 0.5}, "validation accuracy 0.500")],
)
def test_a_card_of_what_the_user_wrote(tmp_path, finetuned, shown):
    made(tmp_path / "m", 3, (24, 24), {"finetuned": finetuned})
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "m")], catch_exceptions=False)
    assert f"{shown}\n" in done.output


def merged(tmp_path, channels):
    """What `nemo merge` does with two modules of half precision."""
    for folder, names in (("a", ["a", "b"]), ("b", ["c", "d"])):
        made(tmp_path / folder, channels, (24, 24), {"class_names": names})
        half = nemo.load(tmp_path / folder)
        nemo.save(half.bfloat16(), tmp_path / folder, half.info)
        for name in names:
            (tmp_path / "images" / name).mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (24, 24), (i, 40 * ord(name) % 256, 0)).save(
                    tmp_path / "images" / name / f"{i}.png"
                )
    folders = [str(tmp_path / name) for name in "ab"]
    command = ["merge", *folders, "--data", str(tmp_path / "images"), "--out"]
    return CliRunner().invoke(cli, [*command, str(tmp_path / "new")])


def test_modules_of_half_the_bits_are_merged(tmp_path):
    done = merged(tmp_path, 3)
    assert done.exit_code == 0, done.output
    assert nemo.load(tmp_path / "new")(torch.zeros(1, 3, 24, 24)).shape == (1, 4)


def test_grey_modules_are_refused_by_the_command(tmp_path):
    done = merged(tmp_path, 1)
    assert done.exit_code == 1
    assert "a module of grey images; accepted: of colour ones, or nemo.merge" in done.output

"""A small finished project to make mistakes in, and the mistakes that spoil it."""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import nemo
from nemo.cli.main import cli
from nemo.models import build_model
from nemo.models.shapes import CnnShape
from tests.test_config import DEFAULT

ROOT = Path(__file__).parents[2]
SECONDS = 5.0  # of CPU time, beyond what a machine needs to start Python and import torch
Spoil = Callable[[Path], object]
PARAMS = {
    **DEFAULT,
    "profile": "tiny",
    "datasets": ["pets"],
    "models": ["resnet18"],
    "methods": ["standard", "nemo"],
    "subsets": ["cat+dog", "owl+pig"],
    "data": {
        "pets": {"source": "folder:pets"},
        "other": {"source": "folder:other"},
        "packed": {"source": "folder:packed.tar"},
    },
    "architecture": {
        "resnet18": {"width": 0.0625},
        "vit_small": {"dim": 16, "depth": 2, "heads": 2, "patch": 8},
    },
    "train": {**DEFAULT["train"], "epochs": 1, "batch_size": 8, "at_chance": "keep"},
    "finetune": {**DEFAULT["finetune"], "epochs": 1, "batch_size": 8},
}
CELL = "--dataset pets --model resnet18"
RUN = "runs/pets/resnet18/nemo-0"
MODULE = f"{RUN}/finetuned/cat+dog"
RESULT = "results/tiny/pets/resnet18/nemo-0.json"
OTHER = f"{RUN}/finetuned/owl+pig"
OWN = "modularize --model resnet18 --data pets --shape width=0.0625"
BOTH = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 2}
REMOVE = object()


def make_project(root: Path) -> None:
    """A finished project of four classes, evaluated and reported on by nobody yet."""
    images("pets", dict.fromkeys(["cat", "dog", "owl", "pig"], 10))(root)
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    cuts = [
        f"{c} {CELL} --subset {s}" for s in PARAMS["subsets"] for c in ("decompose", "finetune")
    ]
    for command in (
        "prepare --dataset pets",
        f"train {CELL} --method standard",
        f"train {CELL}",
        f"masks {CELL}",
        *cuts,
    ):
        result = CliRunner().invoke(cli, command.split(), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    nemo.save(nemo.decompose(tiny(), {}, [2, 3]), root / "foreign")
    nemo.save(nemo.decompose(tiny(), {}, [0, 1]), root / "stranger")
    patch.undo()


def tiny(seed: int = 0, size: int = 16) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet18", 4, size, CnnShape(width=0.0625)).eval()


def files(root: Path) -> dict[str, str]:
    """Every file, with a digest of what it holds."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# What is spoilt, and how: each makes a function of the project's folder.


def nothing(root: Path) -> None:
    """The command itself is wrong."""


def params(key: str | tuple[str, ...], value: object) -> Spoil:
    """Set a dotted key of params.yaml, or remove it."""

    def spoil(root: Path) -> None:
        file = root / "params.yaml"
        content = place = yaml.safe_load(file.read_text())
        *path, last = key if isinstance(key, tuple) else key.split(".")
        for part in path:
            place = place.setdefault(part, {})
        place.pop(last, None) if value is REMOVE else place.update({last: value})
        file.write_text(yaml.safe_dump(content))

    return spoil


def write(name: str, content: bytes = b"") -> Spoil:
    def spoil(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return spoil


def remove(name: str) -> Spoil:
    def spoil(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def cut(name: str, keep: float = 0.5) -> Spoil:
    """The file's first part."""

    def spoil(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(keep * len(content))])

    return spoil


def edit(name: str, **values: object) -> Spoil:
    """Other values in a JSON file."""

    def spoil(root: Path) -> None:
        content = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**content, **values}))

    return spoil


def other_statistics(root: Path) -> None:
    """Of one draw, and a weight, which would be taken over without a word."""
    edit(f"{RUN}/masks/metrics.json", masks={"batch_norm": True})(root)
    weights = load_file(root / f"{RUN}/train/weights.safetensors")
    of_model = {n.removeprefix("model."): v for n, v in weights.items() if n.startswith("model.")}
    chosen = {n: v[None].clone() for n, v in of_model.items() if "running" in n or n == "fc.weight"}
    chosen["drawn"] = torch.ones(1, 10).bool()
    save_file(chosen, root / f"{RUN}/masks/batch_norm.safetensors")


def images(name: str, counts: dict[str, int], size: tuple[int, int] = (16, 16)) -> Spoil:
    """PNGs of noise that is brighter from class to class."""

    def spoil(root: Path) -> None:
        random = np.random.default_rng(0)
        for number, (folder, count) in enumerate(counts.items()):
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 60, (size[1], size[0], 3)) + 40 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / folder / f"{i}.png")

    return spoil


def picture(name: str, mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> Spoil:
    return lambda root: Image.new(mode, size).save(root / name)


def packed(mode: str = "w", keep: float = 1.0, link: bool = False) -> Spoil:
    """packed.tar of a good folder, compressed, cut short or with a link in it."""

    def spoil(root: Path) -> None:
        with tarfile.open(root / "packed.tar", mode) as tar:
            tar.add(root / "pets", "pets")
            if link:
                member = tarfile.TarInfo("pets/cat/passwd.png")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
        cut("packed.tar", keep)(root)

    return spoil


def evaluated(root: Path) -> None:
    result = CliRunner().invoke(cli, ["evaluate", *CELL.split()])
    assert result.exit_code == 0, result.output


def linked(name: str, target: str) -> Spoil:
    return lambda root: (root / name).symlink_to(root / target)


def all_of(*spoils: Spoil) -> Spoil:
    return lambda root: [spoil(root) for spoil in spoils]

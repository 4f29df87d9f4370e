"""Exported files run in other runtimes, say what they are, and are right or not there."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import nemo.module.export as exporting
from nemo.cli.main import cli
from nemo.cut import DecomposedModule, decompose
from nemo.models import build_model
from nemo.models.shapes import CnnShape, VitShape
from nemo.module.export import FORMATS, ExportError, export
from nemo.module.files import ArtefactError, load, save
from tests.cut.helpers import random_masks, randomise

SHAPES = {
    "resnet18": CnnShape(width=0.125),
    "vit_small": VitShape(dim=32, depth=2, heads=2, patch=8),
}
INFO = {
    "class_names": ["truck", "plane"],
    "preprocessing": {"mean": [0.5, 0.25, 0.5], "std": [0.2, 0.2, 0.3], "size": [32, 32]},
    "cell": "not for the file",
}
CARD = {
    "classes": [4, 0],
    "class_names": INFO["class_names"],
    "input_size": [3, 32, 32],
    "preprocessing": INFO["preprocessing"],
}


def save_module(name: str, path: Path) -> Path:
    """An artefact whose layers have odd widths."""
    torch.manual_seed(0)
    model = randomise(build_model(name, 5, 32, SHAPES[name]))
    module = decompose(model, random_masks(model, 0.5), [4, 0])
    widths = {p.shape[0] for p in module.parameters() if p.ndim > 1}
    assert any(width % 2 for width in widths)
    save(module, path, INFO)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_module("resnet18", tmp_path_factory.mktemp("module"))


@pytest.fixture(
    scope="module", params=[(name, to) for name in SHAPES for to in FORMATS], ids="-".join
)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, DecomposedModule, exporting.Exported]:
    name, to = request.param
    folder = save_module(name, tmp_path_factory.mktemp(name))
    return folder, load(folder), export(folder, to, tmp_path_factory.mktemp("out") / f"a.{to}")


def run(path: Path, images: torch.Tensor) -> torch.Tensor:
    """The exported file, by its runtime's own means."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    result: torch.Tensor = torch.export.load(path).module()(images)
    return result


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_file_computes_the_modules_logits_at_any_batch(exported, count):
    _, module, done = exported
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    with torch.no_grad():
        expected, actual = module(images), run(done.path, images)
    assert actual.shape == (count, 2)
    assert expected.std() > 1e-3
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


def test_what_is_said_of_the_file_is_true(exported):
    *_, done = exported
    assert done.bytes == done.path.stat().st_size
    assert 0 <= done.difference <= exporting.TOLERANCE
    assert 0 < done.latency < 1
    assert 0 < done.module_latency < 1
    assert [file.name for file in done.path.parent.iterdir()] == [done.path.name]


def test_the_file_describes_itself(exported):
    *_, done = exported
    if done.path.suffix == ".onnx":
        model = onnx.load(done.path)
        onnx.checker.check_model(model, full_check=True)
        card = {item.key: json.loads(item.value) for item in model.metadata_props}
        (batch, *size) = model.graph.input[0].type.tensor_type.shape.dim
        assert (batch.dim_param, [d.dim_value for d in size]) == ("batch", [3, 32, 32])
    else:
        extra = {"nemo.json": ""}
        torch.export.load(done.path, extra_files=extra)
        card = json.loads(extra["nemo.json"])
    assert card == CARD


def test_the_file_holds_no_pickle_and_no_path(exported, tmp_path):
    _, module, done = exported
    contents = [done.path.read_bytes()]
    if done.path.suffix == ".pt2":
        assert exporting._pickles(done.path) == []
        with zipfile.ZipFile(done.path) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
        plain = torch.export.export(module, (torch.zeros(2, 3, 32, 32),))
        torch.export.save(plain, tmp_path / "plain.pt2")
        (part,) = exporting._pickles(tmp_path / "plain.pt2")  # torch pickles the example
        assert part == "plain/data/sample_inputs/model.pt"
    paths = [Path(exporting.__file__).parents[2], Path(torch.__file__).parents[1], Path(sys.prefix)]
    for path in paths:
        assert not any(str(path).encode() in content for content in contents), path


def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    folder, _, done = exported
    again = export(folder, done.path.suffix[1:], tmp_path / done.path.name)
    assert again.path.read_bytes() == done.path.read_bytes()


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_that_computes_something_else_is_not_kept(folder, tmp_path, monkeypatch, to):
    kept = tmp_path / f"a.{to}"
    kept.write_text("of yesterday")
    trace = exporting._trace

    def wrong(module: DecomposedModule) -> torch.export.ExportedProgram:
        other = copy.deepcopy(module)
        next(other.parameters()).mul_(1.01)
        return trace(other)

    monkeypatch.setattr(exporting, "_trace", wrong)
    with pytest.raises(ExportError, match=r"differs from the module by .* \(tolerance 0\.001\)"):
        export(folder, to, kept)
    assert kept.read_text() == "of yesterday"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_graph_that_cannot_be_traced_is_one_line(folder, tmp_path, monkeypatch):
    def refuse(module: DecomposedModule) -> None:
        raise RuntimeError("no\nway")

    monkeypatch.setattr(exporting, "_trace", refuse)
    with pytest.raises(ExportError, match=r"cannot be exported to onnx: no$"):
        export(folder, "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_module_beyond_protobufs_limit_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "LARGEST_ONNX", 1000)
    with pytest.raises(ExportError, match="too large for one ONNX file"):
        export(folder, "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", FORMATS)
def test_a_tampered_folder_is_refused(folder, tmp_path, to):
    for name in ("module.json", "module.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = tmp_path / "module.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"module\.safetensors is not the file"):
        export(tmp_path, to)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_command_writes_beside_the_artefact(folder):
    result = CliRunner().invoke(cli, ["export", str(folder), "--to", "pt2"])
    assert result.exit_code == 0, result.output
    size = (folder / "module.pt2").stat().st_size
    lines = result.output.splitlines()
    assert lines[0] == f"wrote        {folder}/module.pt2, {size:,} bytes"
    assert lines[1].endswith("of the logits' standard deviation (tolerance 1e-03)")
    assert "ms by the module" in lines[2]
    load(folder)
    (folder / "module.pt2").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", "--to", "pt2"], "nope: cannot read"),
        (["nope", "--to", "tflite"], "--to: unknown format 'tflite'; accepted: onnx, pt2"),
        (["nope", "--to", "onnx", "--out", "module.json"], "--out: module.json does not end in"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["export", *arguments])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"nemo: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_the_file_that_is_not_there_is_named(folder):
    result = CliRunner().invoke(cli, ["export", str(folder), "--to", "pt2", "--out", "no/a.pt2"])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line == "nemo: --out: no is not a folder"


def test_without_the_extra_onnx_names_it_and_pt2_works(folder, tmp_path):
    """In a process of its own, where none of the three packages can be found."""
    code = (
        "import sys, importlib.util\n"
        "found = importlib.util.find_spec\n"
        "gone = ('onnx', 'onnxruntime', 'onnxscript')\n"
        "importlib.util.find_spec = lambda name, *p: None if name in gone else found(name, *p)\n"
        "sys.modules.update(dict.fromkeys(gone))\n"
        "from nemo.cli.main import main\n"
        "for to in ('onnx', 'pt2'):\n"
        "    try:\n"
        "        main(['export', sys.argv[1], '--to', to, '--out', f'a.{to}'])\n"
        "    except SystemExit as end:\n"
        "        print(to, end.code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(exporting.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        cwd=tmp_path, capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert line.endswith("not found: pip install 'nemo-modular[onnx]'")
    first, *_, last = done.stdout.splitlines()
    assert (first, last) == ("onnx 1", "pt2 0")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]

"""Modules for other runtimes: ONNX, and torch's own .pt2 (ours).

An export is not an artefact: nemo does not read it back. It takes what the module takes, float32
images `(B, *input_size)` of any B that were normalised already, and returns the logits. It says
itself which classes those are and how pixels become its input: as metadata of the ONNX model, as
`nemo.json` inside the .pt2 file. Neither holds a pickle, a path or a time.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from nemo.files import write_bytes
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import load

Run = Callable[[Tensor], Tensor]
FORMATS = ("onnx", "pt2")
NEEDED = ("onnx", "onnxruntime", "onnxscript")
LARGEST_ONNX = 2**31  # bytes that fit into one file, a limit of protobuf
# Largest difference in float32, relative to the logits' standard deviation. Rounding alone is some
# 5e-6, and 4e-4 in the worst network that was tried, where torch itself is 1e-4 away from float64.
TOLERANCE = 1e-3
BATCHES = (1, 3)
ROUNDS = 50  # of the timing, after a tenth as many that do not count
SEED = 20250805


class ExportError(ValueError):
    """A module that cannot be written in that format, or does not compute the same there."""


@dataclass(frozen=True)
class Exported:
    """A written file: its difference from the module (relative), and medians in seconds."""

    path: Path
    bytes: int
    difference: float
    latency: float
    module_latency: float


def export(
    folder: str | os.PathLike[str], to: str, out: str | os.PathLike[str] | None = None
) -> Exported:
    """Write the module in `folder` as one file, run that file, and keep it if it is right.

    Args:
        to: `onnx` or `pt2`.
        out: the file, by default `module.onnx` or `module.pt2` in `folder`.

    Raises:
        ArtefactError: `folder` holds no module.
        ExportError: the format, the file name, the extra or the module does not allow it, or the
            file computes something else. Nothing is written then.
    """
    path = Path(folder) / f"module.{to}" if out is None else Path(out)
    _check(path, to)
    module = load(folder).float()
    if to == "onnx" and sum(t.nbytes for t in module.state_dict().values()) >= LARGEST_ONNX:
        raise ExportError(f"{folder}: too large for one ONNX file, which holds 2 GiB")
    if not path.parent.is_dir():
        raise ExportError(f"--out: {path.parent} is not a folder")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as scratch:
        partial = Path(scratch) / path.name
        try:
            with torch.no_grad():
                done = _export(module, to, partial)
        except OSError:
            raise
        except Exception as error:  # those of torch, onnxscript and onnxruntime share no base
            reason = str(error).strip().split("\n")[0]
            raise ExportError(f"{folder}: cannot be exported to {to}: {reason}") from error
        partial.replace(path)
    return replace(done, path=path)


def _export(module: DecomposedModule, to: str, path: Path) -> Exported:
    """Write the file, run it, compare it, time it."""
    write, read = (_write_onnx, _read_onnx) if to == "onnx" else (_write_pt2, _read_pt2)
    write(_trace(module), _card(module), path)
    run = read(path)
    difference = _difference(module, run)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the file differs from the module by {difference:.3g} of the logits' standard "
            f"deviation (tolerance {TOLERANCE:g})"
        )
    module_latency, latency = _medians([module, run], torch.zeros(1, *module.input_size))
    return Exported(path, path.stat().st_size, difference, latency, module_latency)


def _check(path: Path, to: str) -> None:
    """What can be wrong before the module is even read."""
    if to not in FORMATS:
        raise ExportError(f"--to: unknown format {to!r}; accepted: {', '.join(FORMATS)}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if to == "onnx" and missing:
        raise ExportError(f"{', '.join(missing)} not found: pip install 'nemo-modular[onnx]'")
    if path.suffix != f".{to}":  # so that an artefact's own file is not overwritten either
        raise ExportError(f"--out: {path} does not end in .{to}")
    if path.is_dir():
        raise ExportError(f"--out: {path} is a folder")


def _trace(module: DecomposedModule) -> ExportedProgram:
    """The module as a graph for any batch size."""
    example = torch.zeros(2, *module.input_size)  # batch 1 would be taken for a constant
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (example,), dynamic_shapes=batch, strict=False)
    program.example_inputs = None  # would be pickled into the .pt2 file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _card(module: DecomposedModule) -> dict[str, Any]:
    """What a user of the exported file has to know of it."""
    known = {"classes": module.classes, "input_size": list(module.input_size)}
    named = {key: module.info[key] for key in ("class_names", "parent_sha256", "preprocessing")
             if key in module.info}  # fmt: skip
    return known | named


def _write_onnx(program: ExportedProgram, card: dict[str, Any], path: Path) -> None:
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert onnx is not None
    model = onnx.model
    # How torch came to it: as long as the graph itself, and full of paths of this machine.
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.update({key: json.dumps(value) for key, value in card.items()})
    onnx.save(path, external_data=False)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its idle threads take turns with those of the module it is timed against
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_pt2(program: ExportedProgram, card: dict[str, Any], path: Path) -> None:
    content = io.BytesIO()  # on a full disk, torch's own writer may end the process
    torch.export.save(program, content, extra_files={"nemo.json": json.dumps(card)})
    write_bytes(path, content.getbuffer())
    if held := _pickles(path):
        raise ExportError(f"torch {torch.__version__} pickles {held[0]} into .pt2 files: update it")


def _pickles(path: Path) -> list[str]:
    """The parts of a .pt2 file that are pickled."""
    with zipfile.ZipFile(path) as archive:
        return [
            part.filename
            for part in archive.infolist()
            if (part.filename.endswith(".pt") and part.file_size)
            or (part.filename.endswith(".json") and b'"use_pickle": true' in archive.read(part))
        ]


def _read_pt2(path: Path) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _difference(module: DecomposedModule, run: Run) -> float:
    """Largest difference of the logits, relative to their standard deviation."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(sum(BATCHES), *module.input_size, generator=generator)
    batches = torch.split(images, list(BATCHES))
    expected = torch.cat([module(batch) for batch in batches])
    actual = torch.cat([run(batch) for batch in batches])
    if actual.shape != expected.shape:
        return float("inf")
    largest = (expected - actual).abs().max()
    return float(largest / expected.std()) if largest else 0.0


def _medians(functions: list[Run], images: Tensor) -> list[float]:
    """The median time of each, in seconds; they take turns, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(ROUNDS + ROUNDS // 10):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function(images)
            if turn >= ROUNDS // 10:
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]

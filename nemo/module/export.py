"""Modules for other runtimes: ONNX, and torch's own .pt2 (ours).

An export is not an artefact: nemo does not read it back. It takes what the module takes, float32
images `(B, *input_size)` of any B that were normalised already, or what else its parent took, by
the same names, and returns the logits. It says itself which classes those are and how pixels become
its input: as metadata of the ONNX model, as `nemo.json` inside the .pt2 file. Neither holds a
pickle, a path or a time.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from nemo.files import write_bytes
from nemo.module.check import SEED, batches
from nemo.module.codec import encode_signature
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import load
from nemo.signature import Signature

Run = Callable[[Sequence[Tensor]], Tensor]
FORMATS = ("onnx", "pt2")
NEEDED = ("onnx", "onnxruntime", "onnxscript")
LARGEST_ONNX = 2**31  # bytes that fit into one file, a limit of protobuf
# Largest difference in float32, relative to the logits' standard deviation. Rounding alone is some
# 5e-6, and 4e-4 in the worst network that was tried, where torch itself is 1e-4 away from float64.
TOLERANCE = 1e-3
ROUNDS = 50  # of the timing, after a tenth as many that do not count


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
    write(_trace(module), module, path)
    run = read(path, module)
    difference = _difference(module, run)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the file differs from the module by {difference:.3g} of the logits' standard "
            f"deviation (tolerance {TOLERANCE:g})"
        )
    module_latency, latency = _medians([module.run, run], module.takes.draw(1, SEED, torch.float32))
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
    takes = module.takes
    example = takes.batch(takes.lowest(2, torch.zeros(())))  # 1 would be taken for a constant
    args, named = ((), example) if takes.named else (example, {})
    batch = _dynamic(takes, {0: torch.export.Dim("batch")})
    program = torch.export.export(module, args, named, dynamic_shapes=batch, strict=False)
    program.example_inputs = None  # would be pickled into the .pt2 file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _card(module: DecomposedModule) -> dict[str, Any]:
    """What a user of the exported file has to know of it."""
    known = {"classes": module.classes, **encode_signature(module.takes)}
    named = {key: module.info[key] for key in ("class_names", "parent_sha256", "preprocessing")
             if key in module.info}  # fmt: skip
    return known | named


def _dynamic(takes: Signature, size: dict[int, Any]) -> Any:
    """The sizes of the arguments of `DecomposedModule.forward`, of which the first one is free."""
    if takes.named:
        return {"named": dict.fromkeys(takes.names, size)}
    others = (size,) * (len(takes.inputs) - 1)
    return {"x": size} | ({"others": others} if others else {})


def _names(takes: Signature) -> tuple[list[str], str]:
    """What inputs and the output are called in an ONNX model."""
    images = takes.plain and len(takes.inputs[0].shape) == 3
    output = takes.output if isinstance(takes.output, str) else "logits"
    return (["images"] if images else takes.names), output


def _write_onnx(program: ExportedProgram, module: DecomposedModule, path: Path) -> None:
    names, output = _names(module.takes)
    onnx = torch.onnx.export(
        program,
        dynamo=True,
        input_names=names,
        output_names=[output],
        dynamic_shapes=_dynamic(module.takes, {0: "batch"}),
        verbose=False,
    )
    assert onnx is not None
    model = onnx.model
    # How torch came to it: as long as the graph itself, and full of paths of this machine.
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    model.metadata_props.update({k: json.dumps(value) for k, value in _card(module).items()})
    onnx.save(path, external_data=False)


def _read_onnx(path: Path, module: DecomposedModule) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # else its idle threads take turns with those of the module it is timed against
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    names, output = _names(module.takes)

    def run(inputs: Sequence[Tensor]) -> Tensor:
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run([output], given)[0])

    return run


def _write_pt2(program: ExportedProgram, module: DecomposedModule, path: Path) -> None:
    content = io.BytesIO()  # on a full disk, torch's own writer may end the process
    torch.export.save(program, content, extra_files={"nemo.json": json.dumps(_card(module))})
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


def _read_pt2(path: Path, module: DecomposedModule) -> Run:
    return partial(module.takes.run, torch.export.load(path).module())


def _difference(module: DecomposedModule, run: Run) -> float:
    """Largest difference of the logits, relative to their standard deviation."""
    inputs = batches(module.takes, torch.float32)
    expected, actual = (torch.cat([r(batch) for batch in inputs]) for r in (module.run, run))
    if actual.shape != expected.shape:
        return float("inf")
    largest = (expected - actual).abs().max()
    return float(largest / expected.std()) if largest else 0.0


def _medians(functions: list[Run], inputs: list[Tensor]) -> list[float]:
    """The median time of each, in seconds; they take turns, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(ROUNDS + ROUNDS // 10):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function(inputs)
            if turn >= ROUNDS // 10:
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]

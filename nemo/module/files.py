"""Modules as files: `module.safetensors` holds the tensors, `module.json` all else (ours).

Loading builds layers and ops from an allow-list, with checked arguments: nothing in a file is run
or unpickled. Both files carry a SHA-256, and a loaded module has been run once.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor

from nemo.files import write_bytes
from nemo.module.codec import RefusedError, decode, encode, rehearsed
from nemo.module.decomposed import DecomposedModule
from nemo.module.info import check_info

WEIGHTS, DESCRIPTION = "module.safetensors", "module.json"
FORMAT = "nemo-module"
VERSIONS = {1: "input_size", 2: "signature"}  # and what says what a module takes
KEYS = {
    "format", "version", "torch", "classes", "certificate", "report", "info", "output", "layers",
    "steps", "weights_sha256", "sha256",
}  # fmt: skip
LARGEST_FILE = 2**26  # bytes of JSON


class ArtefactError(ValueError):
    """A file that is not, or no longer, a module that `save` wrote."""


def save(
    module: DecomposedModule, folder: str | os.PathLike[str], info: dict[str, Any] | None = None
) -> None:
    """Write `module` to `folder`, the same bytes for the same module.

    Args:
        info: what else belongs to it (class names, preprocessing, metrics, the parent's hash), as
            JSON values; added to `module.info`.

    Raises:
        ValueError: it is no module, or runs an op that is not in the op table, so that it could
            not be loaded; a layer was replaced, changed other than in its values, or given a hook;
            `info` is no JSON, or has class names or a preprocessing that do not fit; a file is
            where the folder should be. Nothing is written then.
    """
    if not isinstance(module, DecomposedModule):
        kind = type(module).__name__
        raise ValueError(f"a {kind} cannot be saved here; accepted: what nemo.decompose returns")
    about = {**module.info, **(info or {})}
    check_info(module, about)
    target = Path(folder)
    if taken := [path for path in (target, *target.parents) if path.is_file()]:
        raise ValueError(f"{taken[0]} is a file; accepted: a folder, which may be new")
    module.check_layers("save")
    tensors = {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}
    weights = write_tensors(tensors)
    body = {
        "format": FORMAT,
        "version": 1 if module.takes.plain else 2,  # what 0.1 can read, it may read
        "torch": torch.__version__.split("+")[0],
        "classes": module.classes,
        "certificate": module.certificate,
        "report": module.report,
        "info": about,
        **encode(module),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    body["sha256"] = _digest(body)
    text = json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        rehearsed(json.loads(text), tensors)
    except RefusedError as error:
        raise ValueError(f"cannot save what could not be loaded: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    for name, content in ((WEIGHTS, weights), (DESCRIPTION, text.encode())):
        write_bytes(target / name, content)


def load(folder: str | os.PathLike[str]) -> DecomposedModule:
    """The module in `folder`, on the CPU and in eval mode.

    Raises:
        ArtefactError: a file is missing, damaged, of another kind or version, or not allowed.
    """
    try:
        body, tensors = _read(Path(folder))
        module = decode(body, tensors)
    except (ArtefactError, RefusedError) as error:
        raise ArtefactError(f"{folder}: {error}") from None
    module.classes, module.certificate = body["classes"], body["certificate"]
    module.report, module.info = body["report"], body["info"]
    return module


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, with their checksums compared."""
    try:
        text, packed = (folder / DESCRIPTION).read_bytes(), (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {error.filename}: {error.strerror}") from None
    if len(text) > LARGEST_FILE:
        raise ArtefactError(f"{DESCRIPTION} is too large")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise ArtefactError(f"{DESCRIPTION} is not JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ArtefactError(f"{DESCRIPTION} does not describe a module")
    version = body.get("version")
    if type(version) is not int or version not in VERSIONS:
        raise ArtefactError(f"version {version!r}, this nemo reads versions 1 and 2")
    if set(body) != {*KEYS, VERSIONS[version]} or body["sha256"] != _digest(body):
        raise ArtefactError(f"{DESCRIPTION} has been changed since it was written")
    _check_notes(body)
    if hashlib.sha256(packed).hexdigest() != body["weights_sha256"]:
        raise ArtefactError(f"{WEIGHTS} is not the file that {DESCRIPTION} was written with")
    try:
        return body, read_tensors(packed)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtefactError(f"{WEIGHTS} is damaged: {error}") from None


def _digest(body: dict[str, Any]) -> str:
    """SHA-256 of everything but the digest itself."""
    rest = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_notes(body: dict[str, Any]) -> None:
    """The types of what is stored beside the module."""
    for key in ("certificate", "report", "info"):
        if not isinstance(body[key], dict):
            raise ArtefactError(f"{key} must be an object")
    classes = body["classes"]
    listed = isinstance(classes, list) and all(type(c) is int for c in classes)
    if classes is not None and not listed:
        raise ArtefactError("classes must be a list of numbers")

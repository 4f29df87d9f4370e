"""A trained cell as files: its weights, and what is needed to build the model again (ours)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from nemo.files import read_json, writing
from nemo.masking.generators import attach, takes_of
from nemo.models import build_model
from nemo.models.registry import MODELS, TIMM, Shape
from nemo.models.shapes import TimmShape

WEIGHTS, ABOUT = "weights.safetensors", "cell.json"


def load_cell(folder: Path) -> nn.Module:
    """The trained model (a `Modular` for modular methods), on the CPU, in eval mode.

    Raises:
        FileNotFoundError: `folder` holds no trained cell.
        ValueError: it is damaged, or of other code.
    """
    try:
        about = read_json(folder / ABOUT)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no trained cell here; run `nemo train` first") from None
    try:
        model: nn.Module = build_model(
            about["model"], about["classes"], about["image_size"], _shape(about)
        )
        if about["modular"]:
            model = attach(model, takes_of(model))
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: damaged, or of other code ({why}); train it again") from None
    return model.eval()


def weights_sha256(folder: Path) -> str:
    """What tells one training of a cell from another."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def save_weights(model: nn.Module, file: Path) -> None:
    with writing(file):
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, file)


def _shape(about: dict[str, Any]) -> Shape:
    """The shape a cell was built with, except that its weights are its own."""
    if about["model"].startswith(TIMM):
        return TimmShape.model_validate({**about["shape"], "pretrained": False})
    return MODELS.named(about["model"]).shape.model_validate(about["shape"])

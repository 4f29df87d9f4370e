"""What the `info` of a module may say, for those who read it: the card, `nemo predict` (ours)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemo.module.decomposed import DecomposedModule
from nemo.signature import FLOAT

# (mean, std, size): per channel on a 0..1 scale, and (H, W)
Preparation = tuple[list[float], list[float], tuple[int, int]]
LARGEST = 2.0  # mean or std: those of pixels from 0 to 255 are above


def check_info(module: DecomposedModule, info: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: class names or a preprocessing that nobody could use, or what JSON cannot hold.
    """
    try:
        json.dumps(info, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"info: {error}; accepted: JSON's strings, numbers, lists, dicts"
        ) from None
    if info.get("class_names") is not None:
        class_names(info, None if module.classes is None else len(module.classes))
    if info.get("preprocessing") is not None:
        preparation(module, info)


def class_names(info: Mapping[str, Any], count: int | None) -> list[str]:
    """The names of the classes, of which there are `count`, if that is known.

    Raises:
        ValueError: they are no names, or not as many.
    """
    names = info["class_names"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"info: class_names is {names!r}; accepted: a list of strings")
    if count not in (None, len(names)):
        raise ValueError(
            f"info: class_names has {len(names)} names, and the module returns {count} logits"
        )
    return list(names)


def takes_an_image(module: DecomposedModule) -> bool:
    """Whether its one input is of floats (C, H, W)."""
    first, *others = module.takes.inputs
    return not others and first.dtype == FLOAT and len(first.shape) == 3


def preparation(module: DecomposedModule, info: Mapping[str, Any]) -> Preparation:
    """How images are prepared: (pixels / 255 - mean) / std, of the size (H, W).

    Raises:
        ValueError: it does not say so, or not for the channels that the module takes.
    """
    how = info["preprocessing"]
    try:
        mean, std = ([float(number) for number in how[key]] for key in ("mean", "std"))
        height, width = (int(side) for side in how["size"])
    except (KeyError, TypeError, ValueError):
        mean, std, height, width = [], [], 0, 0
    usable = all(abs(n) <= LARGEST for n in mean) and all(0 < n <= LARGEST for n in std)
    if len(mean) not in (1, 3) or len(mean) != len(std) or not usable or min(height, width) < 1:
        raise ValueError(
            f"info: preprocessing is {how}; accepted: mean and std of 3 channels or of 1 (grey), "
            "of pixels from 0 to 1, and size [height, width]"
        )
    if takes_an_image(module) and module.input_size[0] != len(mean):
        raise ValueError(
            f"info: preprocessing has {len(mean)} channels, and the module takes images of "
            f"{module.input_size[0]}; accepted: as many as it takes, 3 or 1"
        )
    return mean, std, (height, width)

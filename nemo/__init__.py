"""NeMo: modular training of neural networks, and exact modules for a few of their classes.

The method is that of arXiv 2508.11348; the README shows these names at work. They are imported when
first asked for, so that commands which only read results do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo.cut import decompose
    from nemo.masking.class_masks import (
        ClassMasks,
        class_masks,
        cohesion,
        coupling,
        retention_rate,
        threshold_masks,
    )
    from nemo.masking.generators import Modular, modularize
    from nemo.masking.losses import contrastive_loss, mwt_loss
    from nemo.module.files import load, save
    from nemo.module.union import merge

# Where they live; the first that has a name is its home.
_HOMES = ("masking.class_masks", "masking.generators", "masking.losses", "module.files",
          "module.union", "cut")  # fmt: skip
__all__ = [
    "ClassMasks",
    "Modular",
    "class_masks",
    "cohesion",
    "contrastive_loss",
    "coupling",
    "decompose",
    "load",
    "merge",
    "modularize",
    "mwt_loss",
    "retention_rate",
    "save",
    "threshold_masks",
]


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"nemo.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module 'nemo' has no attribute {name!r}")

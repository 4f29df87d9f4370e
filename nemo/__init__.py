"""NeMo: modular training of neural networks, and exact modules for a few of their classes.

The method is that of arXiv 2508.11348; the README shows these names at work. They are imported when
first asked for, so that commands which only read results do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# not lazily: the import system would put the package of that name in the function's place
from nemo.decompose import decompose

if TYPE_CHECKING:
    from nemo.artefact import load, save
    from nemo.identifier import Modular, modularize
    from nemo.losses import contrastive_loss, mwt_loss
    from nemo.masks import (
        ClassMasks,
        class_masks,
        cohesion,
        coupling,
        retention_rate,
        threshold_masks,
    )
    from nemo.merging import merge

_HOME = {
    "ClassMasks": "masks",
    "Modular": "identifier",
    "class_masks": "masks",
    "cohesion": "masks",
    "contrastive_loss": "losses",
    "coupling": "masks",
    "load": "artefact",
    "merge": "merging",
    "modularize": "identifier",
    "mwt_loss": "losses",
    "retention_rate": "masks",
    "save": "artefact",
    "threshold_masks": "masks",
}
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
    if name not in _HOME:
        raise AttributeError(f"module 'nemo' has no attribute {name!r}")
    return getattr(import_module(f"nemo.{_HOME[name]}"), name)

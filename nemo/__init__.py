"""NeMo: modular training of neural networks, and exact modules for a few of their classes.

The method is that of arXiv 2508.11348; the README shows these names at work. They are imported when
first asked for, so that commands which only read results do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo.calibration import recalibrate_bn
    from nemo.cut import decompose, shrink
    from nemo.for_cuts import BatchNormForCuts, bn_for_cuts
    from nemo.masking.class_masks import (
        ClassMasks,
        cohesion,
        coupling,
        retention_rate,
        threshold_masks,
    )
    from nemo.masking.cut_pass import CutPass
    from nemo.masking.generators import Modular, modularize
    from nemo.masking.losses import contrastive_loss, mwt_loss
    from nemo.masking.observed import class_masks
    from nemo.module.files import load, save
    from nemo.module.union import merge

_HOME = {
    "BatchNormForCuts": "for_cuts",
    "ClassMasks": "masking.class_masks",
    "CutPass": "masking.cut_pass",
    "Modular": "masking.generators",
    "bn_for_cuts": "for_cuts",
    "class_masks": "masking.observed",
    "cohesion": "masking.class_masks",
    "contrastive_loss": "masking.losses",
    "coupling": "masking.class_masks",
    "decompose": "cut",
    "load": "module.files",
    "merge": "module.union",
    "modularize": "masking.generators",
    "mwt_loss": "masking.losses",
    "recalibrate_bn": "calibration",
    "retention_rate": "masking.class_masks",
    "save": "module.files",
    "shrink": "cut",
    "threshold_masks": "masking.class_masks",
}
__all__ = [
    "BatchNormForCuts",
    "ClassMasks",
    "CutPass",
    "Modular",
    "bn_for_cuts",
    "class_masks",
    "cohesion",
    "contrastive_loss",
    "coupling",
    "decompose",
    "load",
    "merge",
    "modularize",
    "mwt_loss",
    "recalibrate_bn",
    "retention_rate",
    "save",
    "shrink",
    "threshold_masks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nemo' has no attribute {name!r}")
    return getattr(import_module(f"nemo.{_HOME[name]}"), name)

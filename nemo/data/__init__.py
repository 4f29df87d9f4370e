"""Images in, batches out: sources, prepared folders, in-memory batches and subsets of classes.

`Batches` and `Augment` need torch and are imported when first asked for; the rest is light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo.data.errors import DataError
from nemo.data.prepared import Prepared, Split, load, prepare, read_meta
from nemo.data.subsets import check_subsets, parse_subset

if TYPE_CHECKING:
    from nemo.data.batches import Augment, Batches

__all__ = [
    "Augment",
    "Batches",
    "DataError",
    "Prepared",
    "Split",
    "check_subsets",
    "load",
    "parse_subset",
    "prepare",
    "read_meta",
]


def __getattr__(name: str) -> Any:
    if name in ("Augment", "Batches"):
        from nemo.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

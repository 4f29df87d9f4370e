"""Stage prepare: decode a data set once."""

from __future__ import annotations

from typing import Any

from nemo.cells import Layout
from nemo.config import Params
from nemo.data import prepare, read_meta
from nemo.pipeline.inputs import check_before_training


def run(params: Params, dataset: str, layout: Layout) -> dict[str, Any]:
    """Write images, labels, statistics and splits; returns the folder's meta.json.

    A mistake in the subsets, or the sizes of cut passes, is found here, before a training.
    """
    out = layout.data(dataset)
    source = params.data[dataset]
    prepare(dataset, source, out, check=lambda names: check_before_training(params, names))
    return read_meta(out)

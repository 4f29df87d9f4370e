"""Parts of a split: stratified, seeded, with every class in each of them (ours)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo.data.errors import DataError

Indices = npt.NDArray[np.int64]


def hold_out(
    labels: npt.NDArray[np.int64], classes: Sequence[str], fraction: float, seed: int, what: str
) -> tuple[Indices, Indices]:
    """Split positions 0..N-1 into (kept, held out), each ascending.

    Args:
        labels: (N,) positions in `classes`.
        fraction: of each class's images, rounded to the nearest count; at least one image of each
            class is held out and at least one kept.
        what: what the held-out images are for, in the error message.

    Raises:
        DataError: a class has fewer than two images.
    """
    # RandomState and not default_rng: only its stream is promised to stay the same between numpys.
    random = np.random.RandomState(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise DataError(
                f"class {name!r} has too few images to hold some out for {what}: "
                f"{len(members)}; accepted: 2 or more"
            )
        count = min(max(int(len(members) * fraction + 0.5), 1), len(members) - 1)
        held[random.permutation(members)[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def limit_to(labels: npt.NDArray[np.int64], count: int, seed: int) -> Indices:
    """`count` of the positions 0..N-1, ascending; all of them if there are no more.

    Each class gives its share, rounded down or up to the next image, so that the sum is `count`.

    Args:
        labels: (N,) of classes 0..C-1, each of which occurs.

    Raises:
        DataError: a class would have fewer than two images left.
    """
    members = np.bincount(labels)
    if count >= len(labels):
        return np.arange(len(labels))
    if count * members.min() < 2 * len(labels):
        least = -(-2 * len(labels) // members.min())
        raise DataError(f"{count} images leave a class fewer than 2; accepted: {least} or more")
    shares, rest = np.divmod(members * count, len(labels))
    shares[np.argsort(-rest, kind="stable")[: count - shares.sum()]] += 1
    random = np.random.RandomState(seed)
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in enumerate(shares)
    ]
    return np.sort(np.concatenate(chosen))

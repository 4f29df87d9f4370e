"""What a mask generator sees of its layer's input (ours; the paper's is the mean over all)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nemo.masking.autograd import Pool
from nemo.masking.sites import Site

PoolInput = slice | Callable[[str, Tensor], Tensor]
EVERYWHERE = slice(None)


def check_pool(pool: PoolInput, sites: Sequence[Site]) -> None:
    """Raise ValueError for what cannot be one, or not of these sites."""
    steps = isinstance(pool, slice) and (pool.step is None or pool.step > 0)
    if not steps and not callable(pool):
        raise ValueError(f"pool: {pool!r}; accepted: a slice with a step above 0, or a function")
    folded = next((site.layer for site in sites if site.fold), None)
    if folded is not None and isinstance(pool, slice) and pool != EVERYWHERE:
        raise ValueError(
            f"pool: {pool}, and {folded} reads windows of a sample, each of which this would cut; "
            "accepted: a function"
        )


def mean_over(
    part: slice, x: Tensor, site: Site, channels: int, count: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    """x, and its mean (count, F) over `part` of its positions, whose gradient x takes up."""
    over = tuple(d for d in range(x.ndim) if d not in (site.batch, channels))
    if over and not len(range(x.shape[over[0]])[part]):
        raise ValueError(
            f"pool {part} holds none of the {x.shape[over[0]]} positions of {site.layer}; "
            "accepted: a slice that holds one"
        )
    x, pooled = Pool.apply(x, over, part, in_place)
    if site.fold == "outer":
        pooled = pooled.view(count, len(pooled) // count, -1).mean(1)
    elif site.fold == "inner":
        pooled = pooled.view(len(pooled) // count, count, -1).mean(0)
    return x, pooled


def by_sample(x: Tensor, site: Site, channels: int, count: int) -> Tensor:
    """A layer's input with the samples first and the features last, windows of a sample apart."""
    assert site.batch is not None
    x = x.movedim((site.batch, channels), (0, -1))
    if site.fold == "outer":
        x = x.view(count, -1, *x.shape[1:])
    elif site.fold == "inner":
        x = x.view(-1, count, *x.shape[1:]).movedim(1, 0)
    return x


def shown_by(pool: Callable[[str, Tensor], Tensor], x: Tensor, site: Site) -> Tensor:
    """What a function of the user's makes of x, if a mask can be made of it."""
    pooled = pool(site.layer, x)
    accepted: list[tuple[int, ...]] = [(len(x), x.shape[-1])]
    if not site.fold:
        accepted.append(tuple(x.shape))
    if not isinstance(pooled, Tensor) or tuple(pooled.shape) not in accepted:
        got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(
            f"pool({site.layer!r}, x) gave {got}; accepted: {' or '.join(map(str, accepted))}"
        )
    return pooled

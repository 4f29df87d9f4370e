"""What a mask generator sees of its layer's input (ours; the paper's is the mean over all)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo.masking.autograd import Pool
from nemo.masking.sites import Site

PoolInput = slice | Callable[[str, Tensor], Tensor]
EVERYWHERE = slice(None)


def check_pool(pool: PoolInput) -> None:
    """Raise ValueError for what cannot be one."""
    try:
        known = pool.indices(1) is not None if isinstance(pool, slice) else callable(pool)
    except (TypeError, ValueError):
        known = False
    if not known or (isinstance(pool, slice) and (pool.step or 1) < 1):
        raise ValueError(f"pool: {pool!r}; accepted: a slice with a step above 0, or a function")


def mean_over(
    part: slice, x: Tensor, site: Site, channels: int, count: int, in_place: bool
) -> tuple[Tensor, Tensor]:
    """x, and its mean (count, F) over `part` of its positions, whose gradient x takes up."""
    if site.fold and part != EVERYWHERE:
        shown = by_sample(x, site, channels, count)
        if shown.ndim > 3:
            raise ValueError(
                f"pool: {part}, and {site.layer} reads windows of a sample, each of which this "
                "would cut; accepted: a function"
            )
        return x, _part(part, shown, 1, site).mean(1)
    over = tuple(d for d in range(x.ndim) if d not in (site.batch, channels))
    if over:
        _part(part, x, over[0], site)
    x, pooled = Pool.apply(x, over, part, in_place)
    if site.fold == "outer":
        pooled = pooled.view(count, len(pooled) // count, -1).mean(1)
    elif site.fold == "inner":
        pooled = pooled.view(len(pooled) // count, count, -1).mean(0)
    return x, pooled


def _part(part: slice, x: Tensor, dim: int, site: Site) -> Tensor:
    if not len(range(x.shape[dim])[part]):
        raise ValueError(
            f"pool {part} holds none of the {x.shape[dim]} positions of {site.layer}; "
            "accepted: a slice that holds one"
        )
    return x[(slice(None),) * dim + (part,)]


def by_sample(x: Tensor, site: Site, channels: int, count: int) -> Tensor:
    """A layer's input with the samples first and the features last; the tokens or windows that are
    rows of their own come second."""
    assert site.batch is not None
    x = x.movedim((site.batch, channels), (0, -1))
    if site.fold == "outer":
        x = x.view(count, -1, *x.shape[1:])
    elif site.fold == "inner":
        x = x.view(-1, count, *x.shape[1:]).movedim(1, 0)
    return x


def by_row(mask: Tensor, fold: str) -> Tensor:
    """A mask for each position of such an input, as the rows are."""
    if not fold:
        return mask
    return (mask if fold == "outer" else mask.movedim(0, 1)).flatten(0, 1)


def shown_by(pool: Callable[[str, Tensor], Tensor], x: Tensor, site: Site) -> Tensor:
    """What a function of the user's makes of x, if a mask can be made of it."""
    pooled, accepted = pool(site.layer, x), [(len(x), x.shape[-1]), tuple(x.shape)]
    if not isinstance(pooled, Tensor) or tuple(pooled.shape) not in accepted:
        got = tuple(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
        raise ValueError(
            f"pool({site.layer!r}, x) gave {got}; accepted: {' or '.join(map(str, accepted))}"
        )
    return pooled

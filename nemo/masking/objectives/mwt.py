"""MwT's objective: alpha times cohesion loss plus beta times coupling loss (arXiv 2306.09376)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.fields import Family, NonNegative, PerFamily
from nemo.masking.objectives.registry import ObjectiveParams, Parts, Penalty, objective

if TYPE_CHECKING:
    from torch import Tensor

    from nemo.masking.generators import Masks


class MwtParams(ObjectiveParams):
    alpha: PerFamily[NonNegative]
    beta: PerFamily[NonNegative]


@objective(
    "mwt",
    label="MwT",
    section="mwt",
    params=MwtParams,
    remedy=" or smaller mwt.alpha and mwt.beta",
    pull="mwt.alpha and mwt.beta",
    colour="#D55E00",
)
def cohesion_and_coupling(params: MwtParams, family: Family) -> Penalty:
    from nemo.masking.losses import mwt_terms

    alpha, beta = params.alpha.of(family), params.beta.of(family)

    def penalty(masks: Masks, labels: Tensor) -> tuple[Tensor, Parts]:
        cohesion, coupling = mwt_terms(masks, labels)
        parts = {"cohesion_loss": cohesion, "coupling_loss": coupling}
        return alpha * cohesion + beta * coupling, parts

    return penalty  # type: ignore[return-value]

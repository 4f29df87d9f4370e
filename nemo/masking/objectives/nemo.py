"""NeMo's objective: alpha times the contrastive loss on masks (paper section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nemo.fields import Family, NonNegative, PerFamily, Positive
from nemo.masking.objectives.registry import ObjectiveParams, Parts, Penalty, objective

if TYPE_CHECKING:
    from torch import Tensor

    from nemo.masking.generators import Masks


class LossParams(ObjectiveParams):
    alpha: PerFamily[NonNegative]
    tau: Positive
    form: Literal["equation", "released"]


@objective(
    "nemo",
    label="NeMo",
    section="loss",
    params=LossParams,
    remedy=", a smaller loss.alpha or a larger loss.tau",
    pull="loss.alpha",
    colour="#0072B2",
)
def contrastive(params: LossParams, family: Family) -> Penalty:
    from nemo.masking.losses import contrastive_loss

    alpha = params.alpha.of(family)

    def penalty(masks: Masks, labels: Tensor) -> tuple[Tensor, Parts]:
        contrast = contrastive_loss(masks, labels, params.tau, params.form)
        return alpha * contrast, {"contrast": contrast}

    return penalty  # type: ignore[return-value]

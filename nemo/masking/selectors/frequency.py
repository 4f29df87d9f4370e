"""The paper's rule: a class uses the neurons that most of its images switch on (section 4.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo.fields import Share, Strict
from nemo.masking.selectors.registry import selector

if TYPE_CHECKING:
    from nemo.masking.class_masks import ClassMasks
    from nemo.masking.observed import Observed


class FrequencyParams(Strict):
    threshold: Share  # fraction of a class's images that must switch a neuron on


@selector("frequency", params=FrequencyParams)
def frequency(observed: Observed, params: FrequencyParams) -> ClassMasks:
    from nemo.masking.class_masks import mask_frequency, masks_from_frequency

    return masks_from_frequency(mask_frequency(observed.bits()), params.threshold)

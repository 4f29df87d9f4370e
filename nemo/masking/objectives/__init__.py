"""What a training adds to its task loss: the methods that params.yaml names (paper section 4.2).

An objective is one function behind one decorator. `params.yaml` lists it under `methods` by its
name and has its settings in a section of its own; docs/extending.md writes one. Importing this
package costs pydantic only: an objective imports torch when it is called.
"""

from nemo.masking.objectives import mwt, nemo  # they register themselves
from nemo.masking.objectives.registry import (
    OBJECTIVES,
    CutPassParams,
    Maker,
    Objective,
    ObjectiveParams,
    Parts,
    Penalty,
    Remembers,
    objective,
)

__all__ = [
    "OBJECTIVES",
    "CutPassParams",
    "Maker",
    "Objective",
    "ObjectiveParams",
    "Parts",
    "Penalty",
    "Remembers",
    "mwt",
    "nemo",
    "objective",
]

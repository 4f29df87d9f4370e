"""From what a modular model does on images to the neurons that each class uses: class masks.

A selector is one function behind one decorator, named by `masks.selector` in params.yaml; its
settings are the other keys of `masks`. The paper's rule, how often a neuron is on, is `frequency`
(its section 4.3). Importing this package costs pydantic only.
"""

from nemo.masking.selectors import frequency, importance  # they register themselves
from nemo.masking.selectors.registry import SELECTORS, Choose, Selector, selector

__all__ = ["SELECTORS", "Choose", "Selector", "frequency", "importance", "selector"]

"""What else has the size of a module: the obvious alternatives, with the same fine-tuning (ours).

An alternative is one function behind one decorator, named by `alternatives.kinds` in params.yaml.
Importing this package costs pydantic only: an alternative imports torch when it is made.
"""

from nemo.alternatives import kinds  # they register themselves
from nemo.alternatives.registry import ALTERNATIVES, Alternative, Make, alternative

__all__ = ["ALTERNATIVES", "Alternative", "Make", "alternative", "kinds"]

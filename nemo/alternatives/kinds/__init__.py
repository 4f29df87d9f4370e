"""The alternatives that come with the package, a file each; tables list them in this order."""

from nemo.alternatives.kinds import random, pruned, dense, mean_masks, standard_tuned  # noqa: F401, I001  # fmt: skip

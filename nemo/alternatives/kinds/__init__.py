"""The alternatives that come with the package, a file each; tables list them in this order."""

from nemo.alternatives.kinds import (  # noqa: F401, I001
    random, pruned, pruned_global, taylor, tuned_pruned, dense, mean_masks, standard_tuned,
)  # fmt: skip

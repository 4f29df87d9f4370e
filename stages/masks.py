"""Stage masks: find the class masks of a modular cell.

Arguments: DATASET MODEL METHOD SEED.
"""

import sys

from nemo.cells import Layout
from stages.common import cell, leave_out, run

if __name__ == "__main__":
    this, options = cell(*sys.argv[1:])
    leave_out(this, "masks", Layout().masks(this))
    run("masks", *options)

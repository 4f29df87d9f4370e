"""Stage decompose: cut the module of a class subset out of a cell.

Arguments: DATASET MODEL METHOD SEED SUBSET.
"""

import sys

from nemo.cells import Layout
from stages.common import cell, leave_out, run

if __name__ == "__main__":
    *names, subset = sys.argv[1:]
    this, options = cell(*names)
    leave_out(this, "decompose", Layout().module(this, subset))
    run("decompose", *options, "--subset", subset)

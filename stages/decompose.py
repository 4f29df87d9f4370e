"""Stage decompose: cut the module of a class subset out of a cell.

Arguments: DATASET MODEL METHOD SEED SUBSET.
"""

import sys

from nemo.cells import Layout
from stages.common import run_modular

if __name__ == "__main__":
    run_modular("decompose", Layout().module, sys.argv[1:])

"""Stage evaluate: measure a cell and its modules.

Arguments: DATASET MODEL METHOD SEED.
"""

import sys

from stages.common import cell, run

if __name__ == "__main__":
    run("evaluate", *cell(*sys.argv[1:])[1])

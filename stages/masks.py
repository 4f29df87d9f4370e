"""Stage masks: find the class masks of a modular cell.

Arguments: DATASET MODEL METHOD SEED.
"""

import sys

from nemo.cells import Layout
from stages.common import run_modular

if __name__ == "__main__":
    run_modular("masks", Layout().masks, sys.argv[1:])

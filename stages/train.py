"""Stage train: train one cell, logging its curves to MLflow.

Arguments: DATASET MODEL METHOD SEED.
"""

import sys

from stages.common import cell, run

if __name__ == "__main__":
    run("train", *cell(*sys.argv[1:])[1], "--track")

"""Stage evaluate: measure the cells and modules of a model.

Arguments: DATASET MODEL.
"""

import sys

from stages.common import run

if __name__ == "__main__":
    dataset, model = sys.argv[1:]
    run("evaluate", "--dataset", dataset, "--model", model)

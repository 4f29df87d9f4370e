"""Stage train: train one cell, logging its curves to MLflow.

Arguments: DATASET MODEL METHOD SEED.
"""

import sys

from nemo.cells import Layout
from stages.common import cell, leave_out, run

if __name__ == "__main__":
    this, options = cell(*sys.argv[1:])
    leave_out(this.method, Layout().train(this))
    run("train", *options, "--track")

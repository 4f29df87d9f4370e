"""Stage finetune: fine-tune a module on its classes.

Arguments: DATASET MODEL METHOD SEED SUBSET.
"""

import sys

from nemo.cells import Layout
from stages.common import cell, leave_out, run

if __name__ == "__main__":
    *names, subset = sys.argv[1:]
    this, options = cell(*names)
    leave_out(this, "finetune", Layout().finetuned(this, subset))
    run("finetune", *options, "--subset", subset)

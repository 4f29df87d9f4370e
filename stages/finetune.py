"""Stage finetune: fine-tune a module on its classes.

Arguments: DATASET MODEL METHOD SEED SUBSET.
"""

import sys

from nemo.cells import Layout
from stages.common import run_modular

if __name__ == "__main__":
    run_modular("finetune", Layout().finetuned, sys.argv[1:])

"""Stage prepare: decode a data set once.

Arguments: DATASET.
"""

import sys

from stages.common import run

if __name__ == "__main__":
    run("prepare", "--dataset", *sys.argv[1:])

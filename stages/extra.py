"""Stages alternatives, budgets, gap, granularity, thresholds: what more tables show of a cell.

Arguments: NAME DATASET MODEL METHOD SEED.
"""

import sys

from stages.common import cell, run

if __name__ == "__main__":
    name, *names = sys.argv[1:]
    run(name, *cell(*names)[1])

"""The paper's tables on real CIFAR-10: which trainings they need, how each is run, what it says.

    python -m benchmarks.study list          # the units, and which are done
    python -m benchmarks.study run NAME...   # computes units; all that are missing without a name

A unit is everything that one seed of one model is asked for, in one go: training by each method,
class masks, modules, fine-tuning, evaluation, baselines. When it ends it leaves one JSON file in
reports/cifar10-cpu/cells/, from which the tables are made; what it works with stays in study/,
which may be deleted.
"""

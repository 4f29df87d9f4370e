"""The tables of the paper (T1 to T7) and more, and metrics.json for DVC."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nemo.report import rows
from nemo.report.collect import Results
from nemo.report.published import PUBLISHED
from nemo.report.table import Table

T1 = Table(
    "T1-models",
    "T1. Modular models",
    "Accuracy is top-1 on the test images, after the last epoch. Loss: points lost against the "
    "standard model of the same seed. Best test: the best epoch on the test images, which is the "
    "paper's protocol; it serves to compare with published figures only. NRR: the share of neurons "
    "that a class keeps, mean over classes. Cohesion and coupling: mean Jaccard similarity of "
    "masks within a class and between classes. Dead layers: masked layers that are dead for at "
    "least one class. Parameters and FLOPs (of one image) are those before decomposing. CPU time: "
    "a training step over the standard one's (T6).",
    ("model", "method"),
    ("cell",),
    rows.models,
    beside=True,
)
T2 = Table(
    "T2-modules",
    "T2. Modules, and what else has their size, per class subset",
    "Accuracy % on the test images of the subset's classes: of the standard model restricted to "
    "them, of the modular model with soft masks restricted to them, of the module as cut (step 0), "
    "with its BatchNorms' statistics estimated anew, and as fine-tuned. Step 0 needs no image: "
    "BatchNorms have the statistics for all cuts where params ask for them (masks.batch_norm), "
    "else those of the training. In brackets: % of the standard model for the same classes. NRR: "
    "the share of neurons that the module keeps. Certificate: the largest float64 difference "
    "between the module as cut and the masked model it was cut from, relative to the output's "
    "standard deviation. Alternatives get the fine-tuning of the module beside them. random, "
    "pruned and dense have at most its parameters. random and dense begin untrained: random has "
    "the module's architecture and the initial weights of torch's layers, dense is a narrower "
    "model. pruned is the standard model cut by magnitude, at one ratio for all layers. mean-masks "
    "is the module with mean masks in its weights. standard-tuned is the whole standard model. CPU "
    "times are of the first seed's modules.",
    ("model", "subset", "method", "alternative"),
    ("module",),
    rows.modules,
    beside=True,
)
T3 = Table(
    "T3-objectives",
    "T3. What is minimised",
    "The loss on the masks that is added to cross-entropy; a weight of 0 takes a part of it away. "
    "Modules: fine-tuned, mean over the class subsets that all of these methods have.",
    ("model", "method"),
    ("cell", "objectives"),
    rows.objectives,
    ("changes", "device"),
    trained=True,
)
T4 = Table(
    "T4-sensitivity",
    "T4. One knob at a time",
    "Everything else is as for the method that a row names. Weights joined by `and` change by one "
    "factor; the value is that of the first. Validation loss: points of validation accuracy lost "
    "against the standard model. Published: accuracy in the authors' sweep of a CNN that they do "
    "not name, 200 epochs, tau at alpha 1.4; its trend is what compares. Their figures of masks "
    "are of training batches and do not stand here.",
    ("model", "knob", "method", "value"),
    ("cell", "sensitivity"),
    rows.sensitivity,
    trained=True,
)
T5 = Table(
    "T5-granularity",
    "T5. Neurons against whole attention heads and MLP blocks",
    "Class masks at several thresholds. heads has at most the parameters of neurons, and the same "
    "fine-tuning. In brackets: % of the standard model for the same classes.",
    ("model", "method", "subset", "threshold", "granularity"),
    ("module",),
    rows.granularity,
)
T6 = Table(
    "T6-costs",
    "T6. What it costs",
    "On a quiet machine's CPU, batch 128. Training steps: medians of steps that took turns; ratio: "
    "over the standard one's; of a method with a cut pass, a step that has it. Other operations: "
    "one call in a process of its own, fine-tuning steps the mean of 9. Peak: growth of the "
    "resident set, over two training steps with the optimizer's state, or over the call; of "
    "fine-tuning, over its first step.",
    ("model", "what", "subset"),
    ("costs",),
    rows.costs,
)
T7 = Table(
    "T7-headline",
    "T7. Modules against MwT's",
    "Mean over class subsets. Gain: points of module accuracy over MwT's (published for NeMo, mean "
    f"of models at full scale: {PUBLISHED['gain_points']:g}). Size reduction: of MwT's parameters "
    f"(published: {100 * PUBLISHED['size_reduction']:g} %). Loss: points that the whole modular "
    "model lost against the standard one. A stronger loss on the masks makes smaller and less "
    "accurate modules, and the two methods' need not be equally strong.",
    ("model", "method"),
    ("headline",),
    rows.headline,
    ("against", "device"),
    beside=True,
)
T8 = Table(
    "T8-budgets",
    "T8. What on-demand costs",
    "Test accuracy % after so many epochs of fine-tuning, at their end, mean over class subsets. "
    "All have BatchNorm's statistics estimated anew on the subset's training images, "
    "also before any training, and the best of the same learning rates. module is the method's. "
    "The others are at most as large, in parameters or FLOPs; whole standard models are not. "
    "pruned: the same share of each layer, by magnitude. pruned-global: one ranking of all "
    "layers, by magnitude. taylor: one ranking, by |weight x gradient| on the subset's images. "
    "tuned-pruned: fine-tuned on the subset in full, which Making counts and Epochs does not, then "
    "pruned. Ahead: of the competitor, and in the module's own rows of the best one of its size, "
    "seed by seed. Making: pruning or cutting to size, with BatchNorm. Seconds are medians over "
    "subsets and seeds; the CSV names the device.",
    ("model", "method", "equal", "competitor", "subset", "epochs"),
    ("budgets",),
    rows.budgets,
    over="subset",
)
ALTERNATIVES = Table(
    "alternatives",
    "Modules against alternatives",
    "Points of test accuracy by which a fine-tuned module is ahead of the alternative: mean over "
    "class subsets, the worst and the best of them, and in how many it is ahead. FLOPs are the "
    "alternative's over the module's. T2 says what each is; standard is the whole standard model "
    "with its logits restricted, as it is, and standard-tuned is fine-tuned besides.",
    ("model", "method", "alternative"),
    ("alternatives",),
    rows.alternatives,
)
GAP = Table(
    "gap",
    "The mask gap, before fine-tuning",
    "Validation accuracy %. Soft: masks of each sample. Binary: one mask for all, as in the "
    "module. Mean: kept neurons scaled by their mean mask. BN: BatchNorm re-estimated. Low: "
    "threshold .5 instead of masks.threshold.",
    ("model", "method", "subset"),
    ("gap",),
    rows.gap,
)
TABLES = (T1, T2, T3, T4, T5, T6, T7, T8, ALTERNATIVES, GAP)


def frames(results: Results) -> dict[str, pd.DataFrame]:
    """The data frame of each table that has rows, by the table's name."""
    made = {table.name: table.frame(results) for table in TABLES}
    return {name: frame for name, frame in made.items() if len(frame)}


def history_frame(results: Results) -> pd.DataFrame:
    """Every cell's training curves in one tidy table."""
    shared = ["epoch", "loss", "train_accuracy", "val_accuracy", "mask_on"]
    curves = [
        {"cell": result.cell.name} | {name: epoch.get(name) for name in shared}
        for result in results.cells
        for epoch in result.history
    ]
    frame = pd.DataFrame(curves, columns=["cell", *shared])
    frame["epoch"] = frame["epoch"].astype("Int64")
    return frame


def summary(tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Five numbers per data set, model and method, for `dvc metrics show` and `dvc exp show`."""
    keys = ["dataset", "model", "method"]
    wanted = {
        T1.name: {"accuracy": "accuracy", "nrr": "nrr", "coupling": "coupling"},
        T2.name: {"accuracy": "module_accuracy", "parameters_ratio": "module_size"},
    }
    nested: dict[str, Any] = {}
    for name, columns in wanted.items():
        frame = tables.get(name, pd.DataFrame(columns=keys))
        if name == T2.name and len(frame):
            frame = frame[(frame["alternative"] == "") & frame["method"].ne(rows.WHOLE)]
        for key, own in frame.groupby(keys, sort=False):
            dataset, model, method = map(str, key)
            place = nested.setdefault(dataset, {}).setdefault(model, {}).setdefault(method, {})
            for column, shown in columns.items():
                value = float(own[column].mean()) if column in own else math.nan
                if not math.isnan(value):
                    place[shown] = round(value, 4)
    return nested

"""The tables T1 to T7, from the units' files alone.

Accuracies are test accuracies in percent, at the last epoch (modules: at the epoch that validation
chose). `best test %` is the paper's protocol, the best test epoch or the evaluation where that is
higher (on a GPU another batch size rounds otherwise), and serves only to compare with
published figures. Over seeds: mean +- standard deviation (n-1), differences paired by seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from benchmarks.study import rows
from benchmarks.study.plan import PAIRS
from benchmarks.study.rows import PUBLISHED, Facts, plain_units
from nemo.config import Params
from nemo.files import read_json
from nemo.report.words import shape_of

KNOB = ("model", "knob", "method", "value")  # what names a row of T4


@dataclass(frozen=True)
class Table:
    """A table of the report; `keys` are the columns that name a row."""

    name: str
    title: str
    how: str
    keys: tuple[str, ...]
    frame: pd.DataFrame  # a row per seed


def read_units(folder: Path) -> dict[str, Facts]:
    """{unit: its facts}, of every file that is there."""
    return {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}


def setting(units: dict[str, Facts], times: dict[str, Facts]) -> str:
    """Data set, scale and class of machine of the units and timings, in a few sentences.

    Raises:
        ValueError: units of different images.
    """
    if len({facts["data_sha256"] for facts in units.values()}) > 1:
        raise ValueError("these units were computed on different images")
    facts = next(iter(plain_units(units)), next(iter(units.values())))
    about, params = facts["evaluation"]["dataset"], facts["params"]
    counts = ", ".join(f"{count:,} {split}" for split, count in about["counts"].items())
    machines = sorted({f["provenance"]["machine"] for f in units.values()})
    timed = sorted(
        f"{t['provenance']['machine']}, {t['provenance']['threads']} threads"
        for t in times.values()
    )
    clock = f" Times, where there are any: {'; '.join(dict.fromkeys(timed))}." if timed else ""
    shapes = dict.fromkeys(
        shape_of(Params.model_validate(f["params"]), f["evaluation"]["model"])
        for f in units.values()
    )
    return (
        f"{about['title']}: {counts} images. Models: {'; '.join(shapes)}. "
        f"Recipe: profiles/{params['profile'].removesuffix('-repro')}.yaml, "
        f"{params['train']['epochs']['cnn']} epochs for CNNs, "
        f"{params['train']['epochs']['transformer']} for Transformers, modules fine-tuned for "
        f"{params['finetune']['epochs']['cnn']}. Computed on: {'; '.join(machines)}.{clock}"
    )


def tables(units: dict[str, Facts], times: dict[str, Facts]) -> list[Table]:
    """Every table that the units and timings at hand have rows for."""
    made = [
        Table(
            "T1-models",
            "T1. Modular models",
            "Loss: points lost against the standard model of the same seed (paired). CPU time: of "
            "a training step over the standard one's, from T6 (one machine, one seed's model).",
            ("model", "method"),
            pd.DataFrame(rows.models(units, times)),
        ),
        Table(
            "T2-modules",
            "T2. Modules and what else has their size, per class subset",
            "random, pruned and dense have at most the parameters of NeMo's module and the epochs "
            "of its fine-tuning; nemo, mwt and pruned were trained on all classes before, random "
            "and dense begin with it. random's weights are drawn as torch's layers draw them, "
            "dense's as the model does (vgg16's classifier: N(0, .01), which learns slowly at "
            "first); pruned has one ratio for all layers. `nemo, mean` is NeMo's module with mean "
            "masks in its weights; standard is the whole standard model with its logits "
            "restricted to the subset, and tuned is fine-tuned as modules are. best test: of the "
            "fine-tuned epochs. CPU times are of the first seed's modules.",
            ("model", "subset", "kind"),
            pd.DataFrame(rows.modules(units, times)),
        ),
        Table(
            "T3-objectives",
            "T3. What is minimised, on vgg16",
            "The loss on the masks that is added to cross-entropy. Pairs: fine-tuned modules of "
            f"{' and '.join(PAIRS)}, mean.",
            ("objective",),
            pd.DataFrame(rows.objectives(units)),
        ),
        Table(
            "T4-sensitivity",
            "T4. One knob at a time",
            "Everything else as in the profile, which is to have the alpha, and the factor of "
            "MwT's published weights, that keep the fewest neurons among those that lose at most "
            "3 points of validation accuracy. Published: accuracy in the authors' sweep of a CNN "
            "that they do not name, 200 epochs, tau at alpha 1.4; its trend is what compares. "
            "Their figures of masks are of training batches and do not stand here.",
            KNOB,
            pd.DataFrame(sorted(rows.sensitivity(units), key=itemgetter(*KNOB))),
        ),
        Table(
            "T5-granularity",
            "T5. Neurons against whole attention heads and MLP blocks",
            "Class masks at two thresholds; `heads` has at most the parameters of `neurons`, and "
            "the same fine-tuning.",
            ("model", "subset", "threshold", "granularity"),
            pd.DataFrame(rows.granularity(units)),
        ),
        Table(
            "T6-costs",
            "T6. What it costs",
            "On a quiet machine, batch 128. Training steps: medians of steps that took turns, "
            "ratio over the standard one's. Others: in a process of their own, one call, and the "
            "mean of 9 steps for fine-tuning. Peak: growth of the resident set over two training "
            "steps with the optimizer's state, or over the call; of fine-tuning, over its first "
            "step.",
            ("model", "what", "subset"),
            pd.DataFrame(rows.costs(times)),
        ),
        Table(
            "T7-headline",
            "T7. NeMo against MwT, modules",
            "Mean over class subsets. Gain: points of module accuracy over MwT's (published, mean "
            f"of models at full scale: {PUBLISHED['gain']}); size reduction: of its parameters "
            f"(published: {PUBLISHED['size reduction %']} %). "
            "Loss: points that the whole modular model lost against the standard one; a stronger "
            "loss on the masks makes smaller and less accurate modules, and the two methods' are "
            "not equally strong.",
            ("model",),
            pd.DataFrame(rows.headline(units)),
        ),
        Table(
            "alternatives",
            "NeMo's modules against alternatives",
            "Points of test accuracy that NeMo's fine-tuned module has over the alternative, mean "
            "over class subsets, and in how many of them it is ahead. All have at "
            "most its parameters, and FLOPs of their own, but the standard model, `whole` with its "
            "logits restricted and `tuned` on the subset besides.",
            ("model", "alternative"),
            pd.DataFrame(rows.alternatives(units)),
        ),
        Table(
            "gap",
            "The mask gap, before fine-tuning",
            "Validation accuracy. soft: masks of each sample; binary: one mask, as in the module; "
            "mean: kept neurons scaled by their mean mask; + bn: BatchNorm re-estimated; low "
            "threshold: .5 instead of the profile's.",
            ("model", "method", "subset"),
            pd.DataFrame(rows.gap(units)),
        ),
    ]
    return [table for table in made if len(table.frame)]


def summarised(table: Table) -> pd.DataFrame:
    """The table over seeds: `mean +- sd` as text, and how many seeds there are."""
    groups = table.frame.groupby(list(table.keys), sort=False)
    values = table.frame.columns.drop([*table.keys, "seed"])
    values = [c for c in values if is_numeric_dtype(table.frame[c])]
    shapes = {column: _format(table.frame[column]) for column in values}
    text = pd.DataFrame({c: groups[c].agg(_spread, shape) for c, shape in shapes.items()})
    text.insert(0, "seeds", groups["seed"].nunique())
    text.insert(1, "device", groups["device"].agg(lambda used: ", ".join(sorted(set(used)))))
    return text.reset_index()


def _format(column: pd.Series[float]) -> str:
    """One for a whole column: shares to a thousandth, all else to 4 digits or so."""
    known = column.dropna()
    if (known == known.round()).all():
        return ".1f"
    largest = known.abs().max()
    return ".3f" if largest <= 1 else ".2f" if largest < 100 else ".1f"


def _spread(column: pd.Series[float], shape: str) -> str:
    known = column.dropna()
    if known.empty:
        return ""
    mean = f"{known.mean():{shape}}"
    return mean if len(known) == 1 else f"{mean} +- {known.std():{shape}}"

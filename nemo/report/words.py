"""What the report says: the scale of every number, the headline, and what looks wrong."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nemo.cells import Cell
from nemo.config import Params
from nemo.report.results import CellResult, ModuleResult, Results
from nemo.report.table import count, percent

LOSS_LIMIT = 3.0  # points of accuracy: the paper's own sign that alpha is too high
COUPLING_LIMIT = 0.6
COHESION_LIMIT = 0.7
CERTIFICATE_LIMIT = 1e-9
METHODS = {"standard": "standard", "mwt": "MwT", "nemo": "NeMo"}


def caption(results: Results, dataset: str) -> str:
    """At which scale the numbers of one data set were measured: the caption of its tables."""
    about = results.datasets[dataset]
    counts, (height, width) = about["counts"], about["size"]
    images = ", ".join(f"{counts[part]:,} {part}" for part in ("train", "val", "test"))
    models = "; ".join(_scale(results, dataset, model) for model in results.params.models)
    seeds = ", ".join(map(str, results.params.seeds))
    plural = "s" if len(results.params.seeds) > 1 else ""
    return (
        f"{about['title']}: {images} images of {height} x {width} px, {len(about['classes'])} "
        f"classes. {models}. Seed{plural} {seeds}; profile {results.params.profile}. "
        f"Measured at this scale, which is that of params.yaml; no number here is the paper's."
    )


def _scale(results: Results, dataset: str, model: str) -> str:
    cells = results.of(dataset, model)
    epochs = " or ".join(map(str, sorted({len(c.history) for c in cells})))
    tuning = max((len(m.history) for c in cells for m in c.modules), default=0)
    parameters = count(next(c.metrics["parameters"] for c in cells if not c.masks))
    size = f"{shape_of(results.params, model)}; {parameters} parameters"
    return f"{model} ({size}): {epochs} epochs, modules fine-tuned for {tuning}"


def shape_of(params: Params, model: str) -> str:
    """A model's size as params state it: `width 0.25`, `dim 64, depth 4, heads 4, patch 4`."""
    shape = params.architecture.of(model).model_dump(exclude={"teacher"})
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def headlines(results: Results) -> list[str]:
    """One honest sentence or two per data set, computed from the numbers of the nemo cells."""
    return [_headline(results, dataset) for dataset in results.params.datasets]


def _headline(results: Results, dataset: str) -> str:
    parts, worst = [], 0.0
    for model in results.params.models:
        cells = results.of(dataset, model)
        before = 100 * fmean(c.metrics["accuracy"] for c in cells if not c.masks)
        nemo = [c for c in cells if c.cell.method == "nemo"]
        after = 100 * fmean(c.metrics["accuracy"] for c in nemo)
        kept = 100 * fmean(c.metrics["nrr"] for c in nemo)
        worst = max(worst, before - after)
        parts.append(f"{model} {before:.1f} → {after:.1f} % with {kept:.0f} % of the neurons")
    verdict = (
        f"one model loses {worst:.1f} points, more than the {LOSS_LIMIT:.0f} that are acceptable"
        if worst > LOSS_LIMIT
        else f"no model loses more than {max(worst, 0):.1f} points of accuracy"
    )
    title = results.datasets[dataset]["title"]
    first = f"{title}, standard → NeMo: {'; '.join(parts)} per class; {verdict}."
    return f"{first} {_modules_sentence(results.of(dataset))}"


def _modules_sentence(cells: list[CellResult]) -> str:
    modules = [m.metrics for c in cells if c.cell.method == "nemo" for m in c.modules]
    size = 100 * fmean(m["parameters_ratio"] for m in modules)
    gap = 100 * fmean(m["accuracy"] - m["accuracy_standard"] for m in modules)
    side = "above" if gap >= 0 else "below"
    return (
        f"Fine-tuned modules hold {size:.0f} % of the standard model's parameters on average and "
        f"are {abs(gap):.1f} points {side} the standard model restricted to the same classes."
    )


@dataclass(frozen=True)
class Flag:
    """Something that looks wrong, with its evidence and what usually helps."""

    where: str
    what: str
    advice: str


def diagnose(results: Results) -> list[Flag]:
    """The paper's failure signatures, wherever they show."""
    flags: list[Flag] = []
    for result in results.cells:
        if result.masks:
            flags += _cell_flags(result, results.standard_accuracy(result.cell))
            for module in result.modules:
                flags += _module_flags(result.cell, module)
    return flags


def _cell_flags(result: CellResult, standard: float) -> list[Flag]:
    m, where, flags = result.metrics, result.cell.name, []
    nemo, pull = result.cell.method == "nemo", _pull(result.cell)
    loss = 100 * (standard - m["accuracy"])
    if loss > LOSS_LIMIT:
        what = f"loses {loss:.1f} points against the standard model ({percent(standard)} %)"
        flags.append(Flag(where, what, f"{pull} too high for this many epochs"))
    if m["coupling"] > COUPLING_LIMIT:
        what = f"coupling {m['coupling']:.3f} is above {COUPLING_LIMIT}: classes share neurons"
        flags.append(Flag(where, what, "loss.tau, or too few epochs" if nemo else pull))
    if m["cohesion"] < COHESION_LIMIT:
        what = f"cohesion {m['cohesion']:.3f} is below {COHESION_LIMIT}: samples of a class differ"
        flags.append(Flag(where, what, "loss.tau, or too few epochs" if nemo else pull))
    if m["dead_layers"]:
        what = f"{m['dead_layers']} of {m['layers']} masked layers are dead for some class"
        flags.append(Flag(where, what, f"{pull} too high, or masks.threshold too high"))
    return flags


def _pull(cell: Cell) -> str:
    """The params that pull masks apart."""
    return "loss.alpha" if cell.method == "nemo" else "mwt.alpha and mwt.beta"


def _module_flags(cell: Cell, module: ModuleResult) -> list[Flag]:
    m, flags = module.metrics, []
    where = f"{cell.name}, classes {module.subset}"
    gap = 100 * (m["accuracy_standard"] - m["accuracy"])
    if gap > LOSS_LIMIT:
        what = (
            f"fine-tuning goes from {percent(m['accuracy_step0'])} to {percent(m['accuracy'])} %, "
            f"{gap:.1f} points below the standard model"
        )
        flags.append(Flag(where, what, "more finetune.epochs, or a lower masks.threshold"))
    if m["certificate"] > CERTIFICATE_LIMIT:
        what = f"certificate {m['certificate']:.1e} is above {CERTIFICATE_LIMIT:.0e}"
        flags.append(Flag(where, what, "the module is not exact: please report it"))
    if m.get("vacuous"):
        what = "its logits hardly vary between images, so the certificate says little"
        flags.append(Flag(where, what, f"too few neurons are left: {_pull(cell)} too high"))
    if m.get("blocked"):
        what = f"{m['blocked']} operations have no rule for smaller inputs"
        flags.append(Flag(where, what, "the module is exact, but larger than it could be"))
    return flags


def settings(params: Params) -> str:
    """The params of the run as YAML, defaults included."""
    import yaml

    content: dict[str, Any] = params.model_dump(mode="json")
    used = {"data": set(params.datasets), "architecture": set(params.models)}
    for key, names in used.items():
        content[key] = {k: v for k, v in content[key].items() if k in names}
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=90)
    return text

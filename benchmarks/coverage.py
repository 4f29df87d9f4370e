"""How many architectures decompose exactly, and how small they get.

    python -m benchmarks.coverage                       all of coverage.yaml at keep .3 and .7
    python -m benchmarks.coverage --write               and writes reports/coverage.{csv,md}: rows
                                                        of what was not run stay there
    python -m benchmarks.coverage --models resnet18,hf/bert --keep 0.3

Each is made modular and trained for one real step. Then every layer but the classifier gets a
random mask, the model is cut, and the module is compared with the modular model whose generators
put out these masks, in float64, by code of the tests that knows nothing of `nemo.cut`; then it is
saved, loaded and compared again. Norms, layer scales and other vectors that start at zero or one
are randomised, and BatchNorm statistics are taken from the masked model, so that nothing is dead
or constant.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import nemo
from benchmarks.measuring import REPORTS, Row, parser
from benchmarks.networks import CLASSES, Draw, build
from nemo.signature import call, moved
from tests.oracles.masked import modular_logits

FIELDS = ["family", "model", "keep", "trained", "status", "error", "certificate", "loaded",
          "output_std", "parameters_left", "flops_left", "blocked", "seconds", "size",
          "seed"]  # fmt: skip
TOLERANCE = 1e-9
SEEDS = 20  # narrow models are dead under some masks, which proves nothing: the next seed is taken
FAMILY_LIMIT = 0.5
WIDE = torch.zeros((), dtype=torch.float64)
HF = "hf/"  # Hugging Face's begin with this


def randomise(model: nn.Module) -> None:
    """No vector or output layer stays at the zeros or ones it started with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        flat = parameter.detach().flatten()
        if bool((flat == flat[0]).all()):  # zeros, ones, a small layer scale
            centre = 1.0 if parameter.ndim == 1 and flat[0] != 0 else 0.0
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.data = centre + scale * noise


def train_step(modular: nn.Module, draw: Draw) -> str:
    """ "yes", or why one step on the task loss and the contrastive loss fails."""
    labels = torch.tensor([0, 0, 1, 1])
    optimizer = torch.optim.SGD(modular.parameters(), 1e-3)
    try:
        logits, masks = call(modular.train(), draw(4, 2))
        logits = getattr(logits, "logits", logits)  # torchvision's Inception has others, too
        logits = logits.flatten(1, -2).mean(1) if logits.ndim > 2 else logits  # DETR: of queries
        loss = nn.functional.cross_entropy(logits, labels)
        (loss + nemo.contrastive_loss(masks, labels, 0.1)).backward()
        nn.utils.clip_grad_norm_(modular.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
    except (RuntimeError, ValueError, TypeError) as error:
        return reason(error)
    finally:
        modular.eval().zero_grad()
    return "yes"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200].replace("|", "/")


def calibrate(modular: nemo.Modular, masks: dict[str, Tensor], draw: Draw) -> None:
    """Give BatchNorms the statistics of the masked model."""
    masked = modular.under(masks).in_double()
    norms = {n: m for n, m in masked.model.named_modules() if isinstance(m, _BatchNorm)}
    for norm in norms.values():
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        call(masked, moved(draw(8, 1), WIDE))
    for name, norm in norms.items():
        target = modular.model.get_submodule(name)
        assert isinstance(target, _BatchNorm)
        target.running_mean = norm.running_mean
        variance = norm.running_var  # dead channels must not blow up later ones
        assert variance is not None
        target.running_var = variance.clamp(min=0.01 * float(variance.mean()) + 1e-6)


def random_masks(modular: nemo.Modular, keep: float, seed: int) -> dict[str, Tensor]:
    """Of all layers but the classifier, also of those that have no generator, where a mask per
    sample could act."""
    generator = torch.Generator().manual_seed(seed)
    heads = getattr(modular.model, "default_cfg", {}).get("classifier") or ()
    heads = {heads} if isinstance(heads, str) else set(heads)
    return {
        site.layer: torch.rand(site.neurons, generator=generator) < keep
        for site in modular.found
        if site.batch is not None
        and site.module not in heads
        and (site.skip is None or site.neurons != CLASSES)
    }


def compare(
    module: nemo.cut.DecomposedModule, modular: nemo.Modular, masks: dict[str, Tensor], draw: Draw
) -> Row:
    """The module's error, and whether it can be saved and loaded and then says the same."""
    inputs = moved(draw(3, 3), WIDE)
    expected = call(partial(modular_logits, modular, masks), inputs)
    with torch.no_grad():
        actual = call(module, inputs)
        error = float((actual - expected).abs().max() / expected.std())
        try:
            with TemporaryDirectory() as folder:
                nemo.save(module, folder)
                same = torch.equal(call(nemo.load(folder), inputs), actual)
                loaded = "yes" if same else "differs"
        except (ValueError, RuntimeError) as failure:
            loaded = reason(failure)
    vacuous = module.certificate["vacuous"]
    status = "vacuous" if vacuous else "exact" if error <= TOLERANCE else "wrong"
    return {"status": status, "error": float(f"{error:.1e}"), "loaded": loaded}


def measure(task: tuple[str, str, float]) -> Row:
    """One row of the table; a failure is a row, too."""
    family, name, keep = task
    torch.set_num_threads(1)
    row: Row = {"family": family, "model": name, "keep": keep}
    started = time.perf_counter()
    try:
        model, draw = build(name)
        example = draw(2, 0)
        first = next(iter(example.values())) if isinstance(example, dict) else example
        row["size"] = first.shape[-1]
        randomise(model)
        output = "logits" if name.startswith(HF) else None
        modular = nemo.modularize(model, example, output=output)
        row["trained"] = train_step(modular, draw)
        modular.double()
        for seed in range(SEEDS):
            row["seed"] = seed
            masks = random_masks(modular, keep, seed)
            calibrate(modular, masks, draw)
            started = time.perf_counter()
            module = nemo.decompose(modular, masks, tolerance=TOLERANCE)
            if not module.certificate["vacuous"]:
                break
        seconds = time.perf_counter() - started
        row |= compare(module, modular, masks, draw)
    except Exception as error:  # the table must say what went wrong with each model
        seconds = time.perf_counter() - started
        return {**row, "status": reason(error), "seconds": round(seconds, 1)}
    certificate, report = module.certificate, module.report
    return {
        **row,
        "certificate": float(f"{certificate['error']:.1e}"),
        "output_std": float(f"{certificate['output_std']:.2g}"),
        "parameters_left": round(report["parameters"] / report["parent_parameters"], 4),
        "flops_left": round(report["flops"] / report["parent_flops"], 4),
        "blocked": " ".join(report["blocked"]),
        "seconds": round(seconds, 1),
    }


def summary(rows: pd.DataFrame, keep: float) -> str:
    """One sentence on all models at one keep rate."""
    mine = rows[rows["keep"] == keep]
    good = mine[mine["status"] == "exact"]
    if good.empty:
        return f"Keep {keep}: 0 of {len(mine)} exact."
    left = good["parameters_left"]
    families = good.groupby("family", sort=False)["parameters_left"].median()
    wide = ", ".join(map(str, families.index[families > FAMILY_LIMIT])) or "none"
    done = sum((good["trained"] == "yes") & (good["loaded"] == "yes"))
    above = f"; families with a median above {FAMILY_LIMIT:.0%}: {wide}"
    return (
        f"Keep {keep}: {len(good)} of {len(mine)} exact (error at most {good['error'].max():.0e} "
        f"of the output's standard deviation), {done} of them trained for a step, saved and loaded "
        f"without a difference; parameters left: median {left.median():.1%}, "
        f"largest {left.max():.1%}{above if keep < FAMILY_LIMIT else ''}."
    )


def table(rows: pd.DataFrame) -> str:
    """Markdown, a line per model: its error, or what went wrong, and what is left of it."""
    named = rows.set_index(["family", "model"])
    columns: dict[str, Any] = {}
    for keep, own in named.groupby("keep"):
        error = own["error"].map("{:.0e}".format)
        columns[f"error at {keep}"] = error.where(own["status"] == "exact", own["status"])
        for what in ("parameters", "flops"):
            share = own[f"{what}_left"].map("{:.1%}".format, na_action="ignore")
            columns[f"{what} at {keep}"] = share
    models = named.groupby(["family", "model"])
    columns["blocked by"] = models["blocked"].agg(
        lambda each: " ".join(sorted({op for ops in each.dropna() for op in ops.split()}))
    )
    for what in ("trained", "loaded"):
        columns[what] = models[what].agg(lambda each: " ".join(sorted(set(each.dropna()))))
    columns |= {"seconds": models["seconds"].max(), "size": models["size"].first()}
    wide = pd.DataFrame(columns, index=named.index.unique()).astype(object).fillna("")
    return str(wide.reset_index().to_markdown(index=False, disable_numparse=True))


def write(rows: pd.DataFrame, folder: Path) -> None:
    rows.to_csv(folder / "coverage.csv", index=False, lineterminator="\n")
    summaries = [summary(rows, keep) for keep in sorted(rows["keep"].unique())]
    caption = (
        "Random masks that keep a share of each layer's neurons, of all layers but the classifier. "
        "Error: of the logits, float64, over their standard deviation, against the modular model "
        "whose generators put out these masks; parameters and FLOPs: left of the whole model; "
        "blocked by: ops without a rule that asked for more than is needed; trained: one step on "
        "the task loss and the contrastive loss; loaded: what was saved says the same. "
        f"Seconds: the slower of one process on a {platform.machine()} CPU with {os.cpu_count()} "
        f"cores, torch {torch.__version__.split('+')[0]}, timm {version('timm')}, torchvision "
        f"{version('torchvision').split('+')[0]}. Size: the side of an image, or tokens of a text."
    )
    if rows["model"].str.startswith(HF).any():
        caption += f" Of hf/: transformers {version('transformers')}."
    text = "\n\n".join(["# Architectures, decomposed", *summaries, caption, table(rows)])
    (folder / "coverage.md").write_text(f"{text}\n")


def kept(rows: pd.DataFrame, file: Path, names: list[str]) -> pd.DataFrame:
    """The rows, and those in the file of other networks; all in the order of the names."""
    if file.is_file():
        earlier = pd.read_csv(file)
        rows = pd.concat([earlier[~earlier["model"].isin(rows["model"])], rows])
    place = {name: number for number, name in enumerate(names)}
    order = rows["model"].map(lambda name: place.get(name, len(place)))
    return rows.iloc[order.argsort(kind="stable")]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", help="Names, with commas; by default all of coverage.yaml.")
    options.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.7])
    options.add_argument("--jobs", type=int, default=2, help="Processes.")
    arguments = options.parse_args()
    families = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    known = {name: family for family, names in families.items() for name in names}
    names = arguments.models.split(",") if arguments.models else list(known)
    missing = [name for name in names if name.startswith(HF)]
    if missing and find_spec("transformers") is None:
        options.error(f"{', '.join(missing)}: need transformers: pip install -e '.[zoo]'")
    tasks = [(known.get(name, "given"), name, keep) for name in names for keep in arguments.keep]
    found = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) as pool:
        for row in pool.imap(measure, tasks):
            found.append(row)
            print(*(row.get(field, "-") for field in FIELDS[1:]), sep="  ", flush=True)
    rows = pd.DataFrame(found, columns=FIELDS)
    print(*(summary(rows, keep) for keep in arguments.keep), sep="\n")
    if arguments.write:
        write(kept(rows, REPORTS / "coverage.csv", list(known)), REPORTS)


if __name__ == "__main__":
    main()

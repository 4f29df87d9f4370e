"""How many timm architectures decompose exactly, and how small they get.

    python -m benchmarks.coverage                       all of coverage.yaml at keep .3 and .7
    python -m benchmarks.coverage --write               and writes reports/coverage.{csv,md}
    python -m benchmarks.coverage --models resnet18,vit_tiny_patch16_224 --keep 0.3

Every convolution and Linear but the classifier gets a random mask. Norms, layer scales and other
vectors that timm starts at zero or one are randomised, and BatchNorm statistics are taken from the
masked model, so that nothing is dead or constant. The check is that of `nemo.cut` itself:
float64, batch 1 and 3.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor, nn

from benchmarks.measuring import REPORTS, Row, parser
from nemo.cut import decompose
from nemo.masking.generators import under
from nemo.masking.sites import UNCALLED, find_sites

SIZES = (64, 96, 128, 224, 240, 256)
FIELDS = ["family", "model", "keep", "status", "error", "output_std", "parameters_left",
          "flops_left", "blocked", "seconds", "size", "seed"]  # fmt: skip
TOLERANCE = 1e-9
SEEDS = 20  # narrow models are dead under some masks, which proves nothing: the next seed is taken
FAMILY_LIMIT = 0.5


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model at the smallest image size that it takes, and a batch of two such images."""
    import timm

    failure: Exception | None = None
    for size in SIZES:
        for arguments in ({"img_size": size}, {}):
            try:
                torch.manual_seed(0)
                model = timm.create_model(name, num_classes=10, **arguments).eval()
                images = torch.randn(2, 3, size, size)
                with torch.no_grad():
                    model(images)
                return model, images
            except (TypeError, RuntimeError, AssertionError, ValueError, IndexError) as error:
                failure = error
    raise RuntimeError(f"no image size works: {failure}")


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


def calibrate(model: nn.Module, masks: dict[str, Tensor], images: Tensor) -> None:
    """Give BatchNorms the statistics of the masked model."""
    masked = under(model, masks, images).in_double()
    norms = {name: m for name, m in masked.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.train()
        norm.momentum = None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        masked(torch.randn(8, *images.shape[1:], generator=generator).double())
    for name, norm in norms.items():
        target = model.get_submodule(name)
        target.running_mean = norm.running_mean.float()
        variance = norm.running_var.float()  # dead channels must not blow up later ones
        target.running_var = variance.clamp(min=0.01 * float(variance.mean()) + 1e-6)


def random_masks(model: nn.Module, images: Tensor, keep: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = getattr(model, "default_cfg", {}).get("classifier") or ()
    heads = {heads} if isinstance(heads, str) else set(heads)
    return {
        site.layer: torch.rand(site.neurons, generator=generator) < keep
        for site in find_sites(model, images)
        if site.module not in heads and site.skip != UNCALLED
    }


def measure(task: tuple[str, str, float]) -> Row:
    """One row of the table; a failure is a row, too."""
    family, name, keep = task
    torch.set_num_threads(1)
    row: Row = {"family": family, "model": name, "keep": keep}
    started = time.perf_counter()
    try:
        model, images = build(name)
        row["size"] = images.shape[-1]
        randomise(model)
        for seed in range(SEEDS):
            row["seed"] = seed
            masks = random_masks(model, images, keep, seed)
            calibrate(model, masks, images)
            started = time.perf_counter()
            module = decompose(model, masks, example=images, tolerance=TOLERANCE)
            if not module.certificate["vacuous"]:
                break
    except Exception as error:  # the table must say what went wrong with each model
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:200].replace("|", "/")
        return {**row, "status": reason, "seconds": round(time.perf_counter() - started, 1)}
    certificate, report = module.certificate, module.report
    return {
        **row,
        "status": "vacuous" if certificate["vacuous"] else "exact",
        "error": float(f"{certificate['error']:.1e}"),
        "output_std": float(f"{certificate['output_std']:.2g}"),
        "parameters_left": round(report["parameters"] / report["parent_parameters"], 4),
        "flops_left": round(report["flops"] / report["parent_flops"], 4),
        "blocked": " ".join(report["blocked"]),
        "seconds": round(time.perf_counter() - started, 1),
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
    above = f"; families with a median above {FAMILY_LIMIT:.0%}: {wide}"
    return (
        f"Keep {keep}: {len(good)} of {len(mine)} exact (error at most {good['error'].max():.0e} "
        f"of the output's standard deviation); parameters left: median {left.median():.1%}, "
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
    columns |= {"seconds": models["seconds"].max(), "image": models["size"].first()}
    wide = pd.DataFrame(columns, index=named.index.unique()).astype(object).fillna("")
    return str(wide.reset_index().to_markdown(index=False, disable_numparse=True))


def write(rows: pd.DataFrame, folder: Path) -> None:
    rows.to_csv(folder / "coverage.csv", index=False, lineterminator="\n")
    summaries = [summary(rows, keep) for keep in sorted(rows["keep"].unique())]
    caption = (
        "Random masks that keep a share of each layer's neurons, of all layers but the classifier. "
        "Error: of the logits, float64, over their standard deviation; parameters and FLOPs: left "
        "of the whole model; blocked by: ops without a rule that asked for more than is needed. "
        f"Seconds: the slower of one process on a {platform.machine()} CPU with {os.cpu_count()} "
        f"cores, torch {torch.__version__.split('+')[0]}, timm {version('timm')}."
    )
    text = "\n\n".join(["# timm architectures, decomposed", *summaries, caption, table(rows)])
    (folder / "coverage.md").write_text(f"{text}\n")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", help="Names, with commas; by default all of coverage.yaml.")
    options.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.7])
    options.add_argument("--jobs", type=int, default=2, help="Processes.")
    arguments = options.parse_args()
    families = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    known = {name: family for family, names in families.items() for name in names}
    names = arguments.models.split(",") if arguments.models else list(known)
    tasks = [(known.get(name, "given"), name, keep) for name in names for keep in arguments.keep]
    found = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=20) as pool:
        for row in pool.imap(measure, tasks):
            found.append(row)
            print(*(row.get(field, "-") for field in FIELDS[1:]), sep="  ", flush=True)
    rows = pd.DataFrame(found, columns=FIELDS)
    print(*(summary(rows, keep) for keep in arguments.keep), sep="\n")
    if arguments.write:
        write(rows, REPORTS)


if __name__ == "__main__":
    main()

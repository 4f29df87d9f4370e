"""How many timm architectures decompose exactly, and how small they get.

    python -m benchmarks.coverage                       all models below at keep .3 and .7
    python -m benchmarks.coverage --write               and writes reports/coverage.{csv,md}
    python -m benchmarks.coverage --models resnet18,vit_tiny_patch16_224 --keep 0.3

Every convolution and Linear but the classifier gets a random mask. Norms, layer scales and other
vectors that timm starts at zero or one are randomised, and BatchNorm statistics are taken from the
masked model, so that nothing is dead or constant. The check is that of `nemo.cut` itself:
float64, batch 1 and 3. Rows are kept in .coverage-cells/, by the code that made them: a run that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.architectures import MODELS
from nemo.cut import decompose
from nemo.cut.zeroing import masked_copy
from nemo.fingerprint import fingerprint
from nemo.masking.sites import find_sites

SIZES = (64, 96, 128, 224, 240, 256)
FIELDS = ["family", "model", "keep", "status", "error", "output_std", "parameters_left",
          "flops_left", "blocked", "seconds", "size", "seed"]  # fmt: skip
TOLERANCE = 1e-9
SEEDS = 20  # narrow models are dead under some masks, which proves nothing: the next seed is taken
FAMILY_LIMIT = 0.5
ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"


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
    masked = masked_copy(model, masks, find_sites(model, images))
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
        if site.module not in heads
    }


def measure(task: tuple[str, str, float]) -> dict[str, Any]:
    """One row of the table; a failure is a row, too."""
    family, name, keep = task
    torch.set_num_threads(1)
    row: dict[str, Any] = {"family": family, "model": name, "keep": keep}
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


def cells() -> Path:
    """Where the rows of this version of the code and of what it builds on are kept."""
    code = fingerprint(["nemo.cut"])
    digest = hashlib.sha256(code.encode() + Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {version('timm')}".encode())
    return ROOT / ".coverage-cells" / digest.hexdigest()[:12]


def resume(task: tuple[str, str, float]) -> dict[str, Any]:
    """The row of an earlier run, or a new one."""
    family, name, keep = task
    path = cells() / f"{name}-{keep}.json"
    if path.exists():
        return {**json.loads(path.read_text()), "family": family}
    row = measure(task)
    if "error" not in row:  # it may have been the machine
        return row
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(row))
    partial.replace(path)
    return row


def summary(rows: list[dict[str, Any]], keep: float) -> str:
    """One sentence on all models at one keep rate."""
    mine = [row for row in rows if row["keep"] == keep]
    good = [row for row in mine if row["status"] == "exact"]
    if not good:
        return f"Keep {keep}: 0 of {len(mine)} exact."
    left = [row["parameters_left"] for row in good]
    families: dict[str, list[float]] = {}
    for row in good:
        families.setdefault(row["family"], []).append(row["parameters_left"])
    wide = [f for f, values in families.items() if statistics.median(values) > FAMILY_LIMIT]
    above = f"; families with a median above {FAMILY_LIMIT:.0%}: {', '.join(wide) or 'none'}"
    return (
        f"Keep {keep}: {len(good)} of {len(mine)} exact (error at most "
        f"{max(row['error'] for row in good):.0e} of the output's standard deviation); parameters "
        f"left: median {statistics.median(left):.1%}, largest {max(left):.1%}"
        f"{above if keep < FAMILY_LIMIT else ''}."
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line per model: its error, parameters and FLOPs left at each keep rate."""
    keeps = sorted({row["keep"] for row in rows})
    heads = [f"{what} at {keep}" for keep in keeps for what in ("error", "parameters", "FLOPs")]
    lines = [["family", "model", *heads, "blocked by", "seconds", "image"]]
    lines.append(["---", "---", *["---:"] * len(heads), "---", "---:", "---:"])
    models: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    for name, mine in models.items():
        line = [mine[0]["family"], name]
        for keep in keeps:
            line += figures(next((row for row in mine if row["keep"] == keep), None))
        names = sorted({op for row in mine for op in row.get("blocked", "").split()})
        slowest = max(row["seconds"] for row in mine)
        lines.append([*line, " ".join(names), f"{slowest}", f"{mine[0].get('size', '')}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figures(row: dict[str, Any] | None) -> list[str]:
    """Error, parameters left and FLOPs left, or what went wrong."""
    if row is None or "error" not in row:
        return ["" if row is None else row["status"], "", ""]
    error = f"{row['error']:.0e}" if row["status"] == "exact" else row["status"]
    return [error, f"{row['parameters_left']:.1%}", f"{row['flops_left']:.1%}"]


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "coverage.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    summaries = [summary(rows, keep) for keep in sorted({row["keep"] for row in rows})]
    caption = (
        "Random masks that keep a share of each layer's neurons, of all layers but the classifier. "
        "Error: of the logits, float64, over their standard deviation; parameters and FLOPs: left "
        "of the whole model; blocked by: ops without a rule that asked for more than is needed. "
        f"Seconds: the slower of one process on a {platform.machine()} CPU with {os.cpu_count()} "
        f"cores, torch {torch.__version__.split('+')[0]}, timm {version('timm')}."
    )
    text = "\n\n".join(["# timm architectures, decomposed", *summaries, caption, table(rows)])
    (folder / "coverage.md").write_text(text)


@click.command(help=__doc__)
@click.option("--models", default="", help="names, with commas; default: the list in this file")
@click.option("--keep", multiple=True, type=float, default=(0.3, 0.7), show_default=True)
@click.option("--jobs", default=2, show_default=True, help="processes")
@click.option("--write", "to_reports", is_flag=True, help="write reports/coverage.{csv,md}")
def main(models: str, keep: tuple[float, ...], jobs: int, to_reports: bool) -> None:
    names = [(f, n) for f, listed in MODELS.items() for n in listed.split()]
    if models:
        family = {n: f for f, n in names}
        names = [(family.get(n, "given"), n) for n in models.split(",")]
    tasks = [(f, n, k) for f, n in names for k in keep]
    rows = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=20) as pool:
        for row in pool.imap(resume, tasks):
            rows.append(row)
            click.echo("  ".join(str(row.get(field, "-")) for field in FIELDS[1:]))
    for rate in sorted(set(keep)):
        click.echo(summary(rows, rate))
    if to_reports:
        write(rows, REPORTS)


if __name__ == "__main__":
    main()

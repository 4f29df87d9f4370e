"""Commands for a module that somebody was given: what it is, what it says, how it leaves nemo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from nemo.module.decomposed import DecomposedModule

data_option = click.option(
    "--data", "source", required=True, help="Image folder or .tar, digits, cifar10, cifar100, svhn."
)
_folder = click.argument("folder", type=click.Path(path_type=Path))


@click.command()
@_folder
def inspect(folder: Path) -> None:
    """Print the card of the module in FOLDER: classes, size, certificate, origin."""
    from nemo.module.files import load

    show(card(load(folder)))


@click.command()
@_folder
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
def predict(folder: Path, images: tuple[Path, ...]) -> None:
    """Print class and probability of each of IMAGES, as the module in FOLDER sees them.

    It sees the largest centred part in proportion to its own size. Classes without names are
    numbers: those of the parent if the module knows them, else positions. Images that cannot be
    read are named at the end, and the exit code is then 1.
    """
    import torch

    from nemo.data import DataError
    from nemo.data.images import ImageFile, ImageFiles
    from nemo.module.files import ArtefactError, load
    from nemo.module.info import class_names, preparation, takes_an_image

    module = load(folder).float()  # images are float32
    if "preprocessing" not in module.info:
        raise ArtefactError(
            f"{folder}: the module does not say how images are prepared for it; accepted: those "
            'saved with {"preprocessing": {"mean": ..., "std": ..., "size": ...}} (docs/modules.md)'
        )
    if not takes_an_image(module):
        raise ArtefactError(f"{folder}: the module takes {module.takes}; accepted: one image")
    try:
        mean, std, size = preparation(module, module.info)
        names = class_names(module.info, None) if module.info.get("class_names") else None
    except ValueError as error:
        raise ArtefactError(f"{folder}: {error}") from None
    shift, scale = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
    unreadable = []
    for path in images:
        file = ImageFile(path)
        try:
            decoded = ImageFiles([file], size, file, grey=len(mean) == 1).decode()
        except DataError as error:
            unreadable.append(str(error))
            continue
        with torch.inference_mode():
            row = module((torch.from_numpy(decoded) / 255 - shift) / scale)[0].softmax(0)
        shown = names or module.classes or range(len(row))
        if len(shown) != len(row):
            raise ArtefactError(
                f"{folder}: class_names has {len(shown)} names, and the module returns "
                f"{len(row)} logits"
            )
        best = int(row.argmax())
        click.echo(f"{path}\t{shown[best]}\t{row[best]:.4f}")
    if unreadable:
        raise DataError("\n".join(unreadable))


@click.command()
@_folder
@click.option(
    "--to", required=True, help="The format: onnx (onnxruntime and others) or pt2 (torch)."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The file.  [default: FOLDER/module.FORMAT]"
)
def export(folder: Path, to: str, out: Path | None) -> None:
    """Write the module in FOLDER as one file for a runtime without nemo.

    It takes float32 images of the module's size in batches of any length, normalised as the module
    wants them: (pixels / 255 - mean) / std. Mean, std and class names are written into the file,
    as ONNX metadata or as nemo.json inside the .pt2. Before it takes its name, the file is run on
    random images and compared with the module.

    Nothing in either file is pickled. But torch.export.load would unpickle what a stranger put
    into a .pt2: the folder itself is what to pass on.
    """
    import torch

    from nemo.module.export import TOLERANCE, export

    done = export(folder, to, out)
    theirs, ours = (f"{seconds * 1e3:.2f} ms" for seconds in (done.latency, done.module_latency))
    lines = {
        "wrote": f"{done.path}, {done.bytes:,} bytes",
        "difference": f"{done.difference:.1e} of the logits' standard deviation "
        f"(tolerance {TOLERANCE:.0e})",
        "latency": f"{theirs} an image, {ours} by the module "
        f"(medians, CPU, threads: {torch.get_num_threads()})",
    }
    show(lines)


def show(lines: dict[str, str]) -> None:
    """Print names and values, one below the other."""
    for name, value in lines.items():
        click.echo(f"{name:<12} {value}")


def card(module: DecomposedModule) -> dict[str, str]:
    """{name: value} of what is worth knowing of a module."""
    report, info = module.report, module.info
    names = info.get("class_names") or module.classes or ["all of the parent's"]
    share = report["parameters"] / report["parent_parameters"]
    work = report["flops"] / report["parent_flops"]
    layers, tuned = report["layers"].values(), info.get("finetuned")
    found = tuned.get("val_accuracy") if isinstance(tuned, dict) else None  # `info` is the user's
    reached = "yes" if tuned else "not recorded"
    if isinstance(found, float | int) and 0 <= found <= 1:
        reached += f", validation accuracy {found:.3f}"
    kept, total = (sum(layer[key] for layer in layers) for key in ("kept", "total"))
    return {
        "classes": ", ".join(map(str, names)),
        "input": " x ".join(map(str, module.input_size))
        if module.takes.plain
        else str(module.takes),
        "parameters": f"{report['parameters']:,} ({share:.1%} of the parent)",
        "FLOPs": f"{report['flops']:,} an image ({work:.1%} of the parent)",
        "neurons": f"{kept:,} of {total:,}, of all layers; those that are not masked count whole",
        "certificate": f"when cut, error {module.certificate['error']:.1e} "
        "of the logits' standard deviation",
        "fine-tuned": reached,
        "cut from": info.get("cell", "a model that the file does not name"),
        "parent": info.get("parent_sha256", "unknown"),
        "blocked ops": ", ".join(sorted(map(str, report["blocked"]))) or "none",
    }


COMMANDS = (inspect, predict, export)

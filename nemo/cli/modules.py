"""Commands for a module that somebody was given: what it is, what it says, how it leaves nemo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from torch import Tensor

    from nemo.module.decomposed import DecomposedModule

data_option = click.option(
    "--data", "source", required=True, help="An image folder or .tar, digits, cifar10, svhn, ..."
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
    numbers: those of the parent if the module knows them, else positions.
    """
    import torch

    from nemo.data.images import ImageFile, ImageFiles
    from nemo.module.files import ArtefactError, load

    module = load(folder)
    mean, std, size = _preparation(folder, module)
    files = [ImageFile(path) for path in images]
    decoded = ImageFiles(files, size, files[0], grey=len(mean) == 1).decode()
    with torch.inference_mode():
        probabilities = module((torch.from_numpy(decoded) / 255 - mean) / std).softmax(1)
    names = module.info.get("class_names") or module.classes or range(probabilities.shape[1])
    if len(names) != probabilities.shape[1]:
        raise ArtefactError(
            f"{folder}: class_names has {len(names)} names, and the module returns "
            f"{probabilities.shape[1]} logits"
        )
    for path, row in zip(images, probabilities, strict=True):
        best = int(row.argmax())
        click.echo(f"{path}\t{names[best]}\t{row[best]:.4f}")


def _preparation(folder: Path, module: DecomposedModule) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Mean and standard deviation (C, 1, 1) on a 0..1 scale, and (H, W), as the module says."""
    import torch

    from nemo.module.files import ArtefactError

    how = module.info.get("preprocessing")
    if how is None:
        raise ArtefactError(f"{folder}: the module does not say how images are prepared for it")
    try:
        mean, std = (torch.tensor(how[key], dtype=torch.float32) for key in ("mean", "std"))
        height, width = (int(side) for side in how["size"])
    except (KeyError, TypeError, ValueError):
        mean = std = torch.zeros(0)
    if mean.ndim != 1 or mean.shape != std.shape or len(mean) not in (1, 3):
        raise ArtefactError(
            f"{folder}: preprocessing is {how}; accepted: mean and std of 3 channels or of 1 "
            "(grey), and size [height, width]"
        )
    return mean.view(-1, 1, 1), std.view(-1, 1, 1), (height, width)


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
    reached = f"yes, validation accuracy {tuned['val_accuracy']:.3f}" if tuned else "no: as cut"
    kept, total = (sum(layer[key] for layer in layers) for key in ("kept", "total"))
    return {
        "classes": ", ".join(map(str, names)),
        "input": " x ".join(map(str, module.input_size))
        if module.takes.plain
        else str(module.takes),
        "parameters": f"{report['parameters']:,} ({share:.1%} of the parent)",
        "FLOPs": f"{report['flops']:,} an image ({work:.1%} of the parent)",
        "neurons": f"{kept:,} of {total:,}",
        "certificate": f"error {module.certificate['error']:.1e} of the logits' standard deviation",
        "fine-tuned": reached,
        "cut from": info.get("cell", "a model that the file does not name"),
        "parent": info.get("parent_sha256", "unknown"),
        "blocked ops": ", ".join(sorted(map(str, report["blocked"]))) or "none",
    }


COMMANDS = (inspect, predict, export)

"""One of each extension, from outside the package; docs/extending.md shows these very lines."""
# ruff: noqa: E402, F811  (each example is complete by itself)

# --- a loss ---
from nemo.fields import NonNegative, Strict
from nemo.masking.objectives import objective


class SparseParams(Strict):
    weight: NonNegative


@objective("sparse", label="sparse", section="sparse", params=SparseParams,
           remedy=" or a smaller sparse.weight", pull="sparse.weight")  # fmt: skip
def sparse(params, family):
    """Few neurons are to be on: the mean mask value is added to the task loss."""

    def penalty(masks, labels):
        mean = sum(mask.mean() for mask in masks.values()) / len(masks)
        return params.weight * mean, {"mask_mean": mean}

    return penalty


# --- a selector ---
from pydantic import Field

from nemo.fields import Strict
from nemo.masking.class_masks import ClassMasks, mask_frequency
from nemo.masking.selectors import selector


class TopParams(Strict):
    share: float = Field(gt=0, le=1)


@selector("top", params=TopParams)
def top(observed, params):
    """Each class keeps the same share of each layer: the neurons that it switches on most often."""
    masks = {}
    for layer, often in mask_frequency(observed.bits()).items():  # often: (classes, neurons)
        kept = often.topk(max(1, round(params.share * often.shape[1])), dim=1).indices
        masks[layer] = (often * 0).scatter(1, kept, 1).bool()
    return ClassMasks(masks, {})


# --- a model ---
from torch import nn

from nemo.fields import Strict
from nemo.models import model


class SmallShape(Strict):
    hidden: int = 64


@model("small_cnn", "cnn", SmallShape)
def small_cnn(num_classes, image_size, shape):
    hidden = (shape or SmallShape()).hidden
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, hidden, 3, padding=1), nn.BatchNorm2d(hidden), nn.Softshrink(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, num_classes),
    )  # fmt: skip


# --- an op's rule ---
import torch

from nemo.cut.rules import Pointwise, rule


@rule(torch.ops.aten.special_ndtr.default)
class NormalCdf(Pointwise):
    """Element by element: output i depends on input i alone."""


# --- an alternative ---
from torch import nn

from nemo.alternatives import alternative


@alternative("pixels", label="linear on pixels", budget=False)
def pixels(context):
    height, width = context.data.size
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, len(context.classes())))


# --- a metric ---
from nemo import forms
from nemo.metrics import metric


@metric("separation", "cell", header="Cohesion - coupling", form=forms.plain, tolerance=forms.MASKS)
def separation(of):
    """How much more alike the masks of one class are than those of two."""
    if not of.cell.modular:
        return None
    return of.cell.metrics["cohesion"] - of.cell.metrics["coupling"]

"""The sections of params.yaml that every method shares (ours)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from nemo.alternatives import ALTERNATIVES
from nemo.fields import (
    Count,
    MethodName,
    NonNegative,
    ParamsError,
    PerFamily,
    Positive,
    Share,
    Strict,
    Switch,
    Whole,
)
from nemo.masking.objectives import OBJECTIVES
from nemo.masking.selectors import SELECTORS
from nemo.models.registry import MODELS, TIMM, Shape, check_model_name
from nemo.models.shapes import TimmShape

SOURCES = ("digits", "cifar10", "cifar100", "svhn", "folder:PATH")


def check_subset_text(text: str) -> None:
    """Raise DataError where a subset is a file of names that cannot be read."""
    if text.startswith("file:"):
        from nemo.data.subsets import names_in_file  # numpy and PIL, for whom it concerns

        names_in_file(text)


class DataSource(Strict):
    """One data set: where it comes from, how it is split, and how training augments it."""

    source: str
    size: Annotated[int, Field(ge=8, le=512, strict=True)] | None = None
    classes: str | None = None  # a part of them, as in `subsets`; labels count from 0 in its order
    limit: Count | None = None  # training images, before validation images are held out
    title: str | None = None
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    seed: Whole = 0
    flip: bool = False
    crop: Whole = 0
    memory: Positive | None = None  # GB; more than that stays in its file and is read by the batch

    @field_validator("classes")
    @classmethod
    def _classes_syntax(cls, text: str | None) -> str | None:
        if text is not None:
            check_subset_text(text)
        return text

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SOURCES[:-1] and not re.fullmatch(r"folder:.+", value):
            raise ValueError(f"unknown source {value!r}; accepted: {', '.join(SOURCES)}")
        return value


class Architectures(Strict):
    """The shape of each model; a `timm/NAME` may stand here too."""

    model_config = Strict.model_config | {"extra": "allow"}
    __pydantic_extra__: dict[str, TimmShape]

    @model_validator(mode="after")
    def _known_models(self) -> Self:
        for name in self.__pydantic_extra__ or {}:
            check_model_name(name)
        return self

    def check(self, model: str) -> None:
        """Raise ParamsError unless params give the model's shape: the paper's takes days."""
        if model not in self.model_fields_set:
            raise ParamsError(f"architecture.{model}: missing; {{}} is the paper's shape")

    def of(self, model: str) -> Shape:
        """The shape that params give a model, or its full size."""
        if model.startswith(TIMM):
            return (self.__pydantic_extra__ or {}).get(model, TimmShape())
        shape: Shape | None = getattr(self, model)
        return MODELS[model].shape() if shape is None else shape


def architectures() -> type[Architectures]:
    """The section `architecture`, with a key for every registered model."""
    fields: dict[str, Any] = {}
    for name, model in MODELS.items():
        _check_key(name, f"the model {name!r}", Architectures)
        fields[name] = (model.shape | None, None)
    made: type[Architectures] = create_model("Architectures", __base__=Architectures, **fields)
    return made


def method_sections(params: type[Strict]) -> dict[str, Any]:
    """{key: field} of the sections that registered methods add to `params`.

    Raises:
        ParamsError: `params`, or a method with other settings, has that key already.
    """
    fields: dict[str, Any] = {}
    for method in OBJECTIVES.values():
        if method.section is not None:
            what = f"the section {method.section!r} of the method {method.name!r}"
            field = (method.params | None, None)  # type: ignore[operator]
            if fields.setdefault(method.section, field) != field:
                raise ParamsError(f"plugins: {what} is another method's; choose another name")
            _check_key(method.section, what, params)
    return fields


def _check_key(name: str, what: str, section: type[Strict]) -> None:
    """Raise ParamsError unless a section can have a key of this name besides its own."""
    taken = name in section.model_fields or hasattr(section, name)
    if taken or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        why = "is a word of params.yaml already" if taken else "is no word"
        raise ParamsError(f"plugins: {what} {why}; choose another name")


class Recipe(Strict):
    """How weights are trained; the learning rate falls along a cosine, per epoch, to 0."""

    epochs: PerFamily[Count]
    batch_size: Annotated[int, Field(ge=2, strict=True)]  # of all processes together
    processes: Count = 1
    cuda_graphs: bool = False  # on CUDA, a step's forward and backward pass as one launch
    optimizer: PerFamily[Literal["sgd", "adamw"]]
    lr: PerFamily[Positive]
    momentum: Annotated[float, Field(ge=0, lt=1)]  # of sgd
    weight_decay: PerFamily[NonNegative]
    watch_test: bool = False  # test accuracy of every epoch; it decides nothing

    @field_validator("processes")
    @classmethod
    def _share_batches(cls, processes: int, info: ValidationInfo) -> int:
        images = info.data.get("batch_size", processes)
        if images % processes:
            raise ValueError(f"{processes} processes do not share batch_size {images} evenly")
        return processes

    @field_validator("cuda_graphs")
    @classmethod
    def _record_one_process(cls, graphs: bool, info: ValidationInfo) -> bool:
        if graphs and info.data.get("processes", 1) > 1:
            raise ValueError("true, where several processes share a batch; accepted: false")
        return graphs


class TrainParams(Recipe):
    amp: bool
    channels_last: bool
    at_chance: Literal["fail", "keep"] = "fail"  # of a model that learned nothing
    start: Literal["standard"] | None = None  # of a variant: from a trained standard model
    per_class: Count | None = None  # images of a class that come together; None: by chance
    steps: Count | None = None  # batches of an epoch; None: one pass over the images

    @field_validator("per_class")
    @classmethod
    def _groups_fill_batches(cls, images: int | None, info: ValidationInfo) -> int | None:
        if images is not None and (batch := info.data.get("batch_size", images)) % images:
            raise ValueError(f"{images} do not divide batch_size {batch}")
        return images


class DecomposeParams(Strict):
    """What belongs to a cut besides the cutting."""

    recalibrate_bn: Switch = None  # BatchNorm's statistics on the subset's training images


class FinetuneParams(Recipe):
    t_max: PerFamily[Count] | None = None  # length of the cosine; None is the number of epochs
    head: Literal["inherit", "new"]
    recalibrate_bn: bool

    @model_validator(mode="after")
    def _cosine_falls(self) -> Self:
        for family in ("cnn", "transformer"):
            epochs = self.epochs.of(family)
            if self.t_max is not None and self.t_max.of(family) < epochs:
                raise ValueError(f"t_max: the cosine would rise again; accepted: {epochs} or more")
        return self


class MaskParams(Strict):
    """Which selector makes the class masks; the other keys are the selector's own."""

    selector: str = "frequency"
    batch_norm: Switch = None  # its statistics for all cuts, which then need no image


def mask_params(selector: str) -> type[MaskParams]:
    """The section `masks` for a selector.

    Raises:
        ValueError: there is no such selector.
    """
    bases: Any = (MaskParams, SELECTORS.named(selector).params)
    return cast("type[MaskParams]", create_model("MaskParams", __base__=bases))


class Of(Strict):
    """Something more to measure: `of` are the methods for which it is."""

    of: list[MethodName] = Field(default_factory=list)

    def check(self, name: str, modular: list[str], subsets: list[str]) -> None:
        """
        Args:
            name: the key of this section.
            modular, subsets: what the params have of methods with modules, and of class subsets.

        Raises:
            ValueError: a list names something twice, or what the params do not have.
        """
        for key, values in self:
            if len(set(values or ())) < len(values or ()):
                raise ValueError(f"{name}.{key}: {values} names something twice")
        for method in self.of:
            if method not in modular:
                raise ValueError(
                    f"{name}.of: {method!r} has no modules here; accepted, of methods: "
                    f"{', '.join(modular) or 'none'}"
                )


def _known_kinds(kinds: list[str]) -> list[str]:
    for kind in kinds:
        ALTERNATIVES.named(kind)
    return kinds


Kinds = Annotated[list[str], AfterValidator(_known_kinds)]


class AlternativesParams(Of):
    kinds: Kinds = Field(default_factory=list)

    def check(self, name: str, modular: list[str], subsets: list[str]) -> None:
        super().check(name, modular, subsets)
        if self.of and not self.kinds:
            raise ValueError(f"{name}.kinds: [] measures nothing; accepted: at least one")


Size = Literal["parameters", "flops"]


class BudgetsParams(Of):
    kinds: Kinds = Field(default_factory=list)
    epochs: list[NonNegative] = Field([0, 0.1, 1, 3, 10], min_length=1)  # of fine-tuning
    lr_scales: list[Positive] = Field([0.3, 1, 3], min_length=1)  # of finetune.lr; the best counts
    equal: list[Size] = Field(["parameters", "flops"], min_length=1)
    subsets: list[str] | None = Field(None, min_length=1)  # None is all
    flops_subsets: list[str] | None = None  # at equal FLOPs; None is all of them

    def check(self, name: str, modular: list[str], subsets: list[str]) -> None:
        super().check(name, modular, subsets)
        if self.of and self.equal == ["flops"] and self.flops_subsets == []:
            raise ValueError(f"{name}.flops_subsets: [] measures nothing; accepted: at least one")
        known = {"subsets": subsets, "flops_subsets": self.subsets or subsets}
        for key, accepted in known.items():
            for subset in getattr(self, key) or ():
                if subset not in accepted:
                    raise ValueError(
                        f"{name}.{key}: {subset!r} is not measured here; accepted: "
                        f"{', '.join(accepted)}"
                    )


class ThresholdsParams(Of):
    values: list[Share] = Field([tenth / 10 for tenth in range(1, 10)], min_length=1)


class GranularityParams(Of):
    subsets: list[str] = Field(["all"], min_length=1)
    thresholds: list[Share] = Field([0.5, 0.9], min_length=1)

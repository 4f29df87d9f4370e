"""params.yaml, typed: every knob of an experiment, checked before any work (ours).

Importing this module costs pydantic only; stages that need no network do not pay for torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

Family = Literal["cnn", "transformer"]
Method = Literal["standard", "mwt", "nemo"]
MODEL_FAMILIES: dict[str, Family] = {
    "simcnn": "cnn",
    "vgg16": "cnn",
    "rescnn": "cnn",
    "resnet18": "cnn",
    "vit_small": "transformer",
    "deit_small": "transformer",
}
SOURCES = ("digits", "cifar10", "cifar100", "svhn", "folder:PATH")
T = TypeVar("T")


class ParamsError(ValueError):
    """What is wrong in a params file: one line per key, each saying what is accepted."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerFamily(Strict, Generic[T]):
    """A value for every model, or one for each family: `{cnn: ..., transformer: ...}`."""

    cnn: T
    transformer: T

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (
            value if isinstance(value, dict | PerFamily) else {"cnn": value, "transformer": value}
        )

    def of(self, family: Family) -> T:
        return self.cnn if family == "cnn" else self.transformer


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1, strict=True)]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is accepted, got {value}")
    return value


NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_no_bool)]


class DataSource(Strict):
    """One data set: where it comes from, how it is split, and how training augments it."""

    source: str
    size: Annotated[int, Field(ge=8, le=512, strict=True)] | None = None
    title: str | None = None
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    flip: bool = False
    crop: Annotated[int, Field(ge=0, strict=True)] = 0
    memory: Positive | None = None  # GB; more than that stays in its file and is read by the batch

    @field_validator("source")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in SOURCES[:-1] and not re.fullmatch(r"folder:.+", value):
            raise ValueError(f"unknown source {value!r}; accepted: {', '.join(SOURCES)}")
        return value


class CnnShape(Strict):
    width: Positive = 1.0


class VitShape(Strict):
    dim: Count = 384
    depth: Annotated[int, Field(ge=2, strict=True)] = 12
    heads: Count = 12
    patch: Count = 4

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads {self.heads} and dim {self.dim}")
        return self


class DeitShape(VitShape):
    heads: Count = 6
    teacher: CnnShape = CnnShape()  # the ResNet18 it is distilled from


class TimmShape(Strict):
    pretrained: bool = False


class Architectures(BaseModel):
    """The shape of each model; a `timm/NAME` may stand here too."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, TimmShape]

    simcnn: CnnShape = CnnShape()
    vgg16: CnnShape = CnnShape()
    rescnn: CnnShape = CnnShape()
    resnet18: CnnShape = CnnShape()
    vit_small: VitShape = VitShape()
    deit_small: DeitShape = DeitShape()

    @model_validator(mode="after")
    def _known_models(self) -> Self:
        for name in self.__pydantic_extra__ or {}:
            check_model_name(name)
        return self

    def of(self, model: str) -> CnnShape | VitShape | TimmShape:
        shape = (self.__pydantic_extra__ or {}).get(model, TimmShape())
        return shape if model.startswith("timm/") else getattr(self, model)


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


class LossParams(Strict):
    alpha: PerFamily[NonNegative]
    tau: Positive
    form: Literal["equation", "released"]


class MwtParams(Strict):
    alpha: PerFamily[NonNegative]
    beta: PerFamily[NonNegative]


class MaskParams(Strict):
    threshold: Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_bool)]


class Params(Strict):
    """The whole of params.yaml."""

    profile: Name
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    datasets: Annotated[list[Name], Field(min_length=1)]
    models: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[Method], Field(min_length=1)]
    subsets: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
    data: dict[Name, DataSource]
    architecture: Architectures
    train: TrainParams
    loss: LossParams
    mwt: MwtParams
    masks: MaskParams
    finetune: FinetuneParams

    @field_validator("models")
    @classmethod
    def _known_models(cls, names: list[str]) -> list[str]:
        for name in names:
            check_model_name(name)
        return names

    @field_validator("subsets")
    @classmethod
    def _subset_syntax(cls, subsets: list[str]) -> list[str]:
        for subset in subsets:
            if not re.fullmatch(r"[A-Za-z0-9_.-]+(\+[A-Za-z0-9_.-]+)*", subset):
                raise ValueError(f"{subset!r} is no subset; accepted: all, 0-4, 3+5, cat+dog")
        return subsets

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        for key in ("datasets", "models", "methods", "subsets", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} names something twice")
        for name in self.datasets:
            if name not in self.data:
                raise ValueError(
                    f"datasets: {name!r} is not in data; accepted: {', '.join(self.data)}"
                )
        for name in self.models:
            if name not in self.architecture.model_fields_set:
                raise ValueError(f"architecture.{name}: missing; {{}} is the paper's shape")
        for method in ("standard", "nemo"):
            if method not in self.methods:
                raise ValueError(f"methods: {method!r} is always part; accepted besides: mwt")
        return self


def check_model_name(name: str) -> None:
    """Raise ValueError unless `name` is one of ours or `timm/NAME` with a NAME that timm has."""
    if name in MODEL_FAMILIES:
        return
    ours = ", ".join(MODEL_FAMILIES)
    if not name.startswith("timm/"):
        raise ValueError(f"unknown model {name!r}; accepted: {ours}, timm/NAME")
    if "." in name:
        raise ValueError(f"{name!r}: give the timm name without its pretrained tag (the dot)")
    import timm  # costs seconds, so only where a timm model is named

    if not timm.is_model(name.removeprefix("timm/")):
        raise ValueError(
            f"timm has no model {name.removeprefix('timm/')!r}; see timm.list_models()"
        )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a params file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds a key or value that is not accepted;
            the message has one line per mistake.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ParamsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ParamsError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: expected a mapping of keys, got {type(raw).__name__}")
    return check_params(raw, path)


def check_params(raw: dict[str, Any], origin: str | Path) -> Params:
    """The params in a nest of dicts; `origin` begins each line of an error.

    Raises:
        ParamsError: a key or value is missing or not accepted; one line per mistake.
    """
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        lines = dict.fromkeys(_describe(e, raw) for e in error.errors(include_url=False))
        raise ParamsError("\n".join(f"{origin}: {line}" for line in lines)) from None


def _describe(error: Any, raw: Any) -> str:
    """One pydantic error as `key: what is wrong; what is accepted`."""
    keys = _written_keys(error["loc"], raw)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key; accepted: {', '.join(_fields_at(keys[:-1]))}"
    elif error["type"] == "missing":
        message = "required, and missing"
    elif error["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    return f"{'.'.join(keys)}: {message}" if keys else message


def _written_keys(loc: tuple[str | int, ...], raw: Any) -> list[str]:
    """The part of an error's place that the file has: one value for all families has no `.cnn`."""
    keys: list[str] = []
    for part in loc:
        if not isinstance(raw, dict | list) or (isinstance(raw, list) and isinstance(part, str)):
            break
        keys.append(str(part))
        raw = raw.get(part) if isinstance(raw, dict) else raw[int(part)]
    return keys


def _fields_at(keys: list[str]) -> list[str]:
    """The keys that params.yaml accepts under `keys`."""
    model: Any = Params
    for key in keys:
        field = model.model_fields.get(key)
        if field is not None:
            model = _model_in(field.annotation)
        else:  # a name of the user's own, or timm's
            model = TimmShape if model is Architectures else DataSource
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The pydantic model in an annotation such as `PerFamily[int] | None`."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(a for a in options if isinstance(a, type) and issubclass(a, BaseModel))

"""Which units there are. The recipe is profiles/cifar10-cpu.yaml; a unit says what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo.config import Method, Params

MODELS = ("vgg16", "resnet18", "vit_small", "simcnn", "rescnn", "deit_small")
WITH_BASELINES = ("vgg16", "resnet18", "vit_small")
SEEDS = (0, 1, 2)  # of vgg16; the other models have the first one
ALPHAS = (0.25, 0.5, 2.0, 4.0)  # besides the profile's 1
TAUS = (0.05, 0.1, 0.5, 1.0)  # besides the profile's 0.2


@dataclass(frozen=True)
class Unit:
    """One model and seed of the profile.

    `changes` are {dotted key: value} of the params; without `modules` nothing is cut.
    """

    name: str
    model: str
    seed: int
    methods: tuple[Method, ...] = ("standard", "mwt", "nemo")
    changes: dict[str, Any] = field(default_factory=dict)
    modules: bool = True
    baselines: bool = False

    def params(self, profile: Params) -> Params:
        """The profile with this unit's model, seed and changes.

        Raises:
            ValidationError: a change that the params do not accept.
        """
        raw = profile.model_dump()
        raw |= {"models": [self.model], "seeds": [self.seed]}
        for key, value in self.changes.items():
            *path, last = key.split(".")
            inner = raw
            for part in path:
                inner = inner[part]
            inner[last] = value
        return Params.model_validate(raw)


def units() -> Iterator[Unit]:
    """Every unit, the ones that most tables need first."""
    for seed in SEEDS:
        yield Unit(f"vgg16-{seed}", "vgg16", seed, baselines=True)
    for model in MODELS[1:]:
        yield Unit(f"{model}-0", model, 0, baselines=model in WITH_BASELINES)
    for seed in SEEDS:
        yield from _objectives(seed)
    yield from _sensitivity()


def _objectives(seed: int) -> Iterator[Unit]:
    """T3: what each part of an objective does; `vgg16-SEED` has the equation form and MwT's sum."""
    parts = {"cohesion-only": (0.5, 0.0), "coupling-only": (0.0, 1.5), "no-mask-loss": (0.0, 0.0)}
    released = {"loss.form": "released"}
    yield Unit(f"vgg16-released-{seed}", "vgg16", seed, ("standard", "nemo"), released)
    for name, (alpha, beta) in parts.items():
        changes = {"mwt.alpha": alpha, "mwt.beta": beta}
        yield Unit(f"vgg16-{name}-{seed}", "vgg16", seed, ("standard", "mwt"), changes)


def _sensitivity() -> Iterator[Unit]:
    """T4: one knob at a time, around the profile's values."""
    for alpha in ALPHAS:
        yield _knob(f"vgg16-alpha-{alpha:g}-0", {"loss.alpha": alpha})
    for form in ("equation", "released"):
        for tau in TAUS:
            yield _knob(f"vgg16-{form}-tau-{tau:g}-0", {"loss.tau": tau, "loss.form": form})


def _knob(name: str, changes: dict[str, Any]) -> Unit:
    return Unit(name, "vgg16", 0, ("standard", "nemo"), changes, modules=False)

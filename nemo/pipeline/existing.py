"""A model that was trained elsewhere: its weights, and a module of it of the size asked for (ours).

Nothing here trains the model. Its module is fine-tuned as every module is.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nemo.calibration import batch_norms, recalibrate_bn, training_batches
from nemo.config import Params
from nemo.cut import shrink
from nemo.data import Batches, Prepared, Split, parse_subset
from nemo.device import resolve_device
from nemo.files import new_folder
from nemo.masking.generators import Modular
from nemo.models import family_of
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import save
from nemo.predict import accuracy, guess_accuracy, predict
from nemo.training.finetune import finetune

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys of checkpoints that hold the weights
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
ACCEPTED = "accepted: a state_dict, as safetensors or by torch.save(model.state_dict(), FILE)"


def load_weights(model: nn.Module, file: Path) -> None:
    """Give `model` the weights in `file`: a state_dict, alone or in a checkpoint's dict.

    Raises:
        ValueError: it cannot be read, or holds none of this model; the message has the difference.
    """
    state, own = _unwrapped(_read(file), file), model.state_dict()
    while not own.keys() & state.keys():
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    optional = {name for name in own if name.endswith("num_batches_tracked")}  # not in old files
    wrong = [
        f"{what} {len(names)} tensors, such as {min(names)}"
        for what, names in (
            ("it lacks", own.keys() - state.keys() - optional),
            ("the model does not know", state.keys() - own.keys()),
        )
        if names
    ]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, and the model's {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ][:1]
    if wrong:
        raise ValueError(f"{file}: not the weights of this model: {'; '.join(wrong)}")
    for name, value in sorted(state.items()):
        state[name] = _converted(value, own[name].dtype, f"{file}: {name}")
    model.load_state_dict(own | state)


def _converted(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A tensor of a file in the model's dtype. Raise ValueError where it says something else then:
    it is not finite before or after, or no integer where the model has one."""
    dense = value.layout is torch.strided and not (value.is_meta or value.is_quantized)
    if not dense or (value.is_complex() and not dtype.is_complex):
        kind = f"{value.layout}, {value.dtype}, on {value.device}".replace("torch.", "")
        raise ValueError(f"{what} is {kind}; accepted: dense tensors of real numbers")
    wide = torch.complex128 if dtype.is_complex else torch.float64
    converted = value.to(dtype)
    before, after = value.to(wide), converted.to(wide)
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ValueError(f"{what} is not finite; accepted: finite weights")
    if not (dtype.is_floating_point or dtype.is_complex or torch.equal(before, after)):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{what} does not fit the model's {kind}; accepted: its own values")
    return converted


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message is of PyTorch's options
        raise ValueError(f"{file}: holds more than tensors, or is damaged; {ACCEPTED}") from None
    except Exception as error:  # of what it takes for a pickle torch.load raises all kinds
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise ValueError(f"{file}: cannot be read ({reason}); {ACCEPTED}") from None


def _unwrapped(found: Any, file: Path) -> dict[str, Tensor]:
    """The state_dict in what a file holds."""
    if isinstance(found, Mapping):
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        found = inner[0] if len(inner) == 1 else found
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file}: holds a {type(found).__name__}; {ACCEPTED}")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.is_nested:
            kind = "nested tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{file}: its {name!r} is a {kind}, no tensor; {ACCEPTED}")
    return {str(name): value for name, value in found.items()}


def make_module(
    params: Params,
    data: Prepared,
    modular: Modular,
    weights: Path,
    out: Path,
    say: Callable[[str], object],
    *,
    tune: bool = True,
    **size: Any,
) -> DecomposedModule:
    """Cut the module of a subset out of a trained model, fine-tune it, measure it, and save it.

    Args:
        modular: of the trained model.
        weights: its file, which the module names as its parent.
        tune: False saves the module as cut.
        size: `keep`, `of` and `selector` of `nemo.shrink`.

    Raises:
        ValueError: the model knows nothing of these images; what `nemo.shrink` raises.
    """
    (subset, text), device = next(iter(params.subsets.items())), resolve_device(params.device)
    classes, model = parse_subset(text, data.classes), modular.model.to(device)

    def batches(split: Split) -> Batches:
        return Batches(split, data.mean, data.std, 256, device=device)

    parent = predict(model, batches(data.splits["test"]), modular.takes.output)
    measured = {"all": accuracy(*parent), "subset": accuracy(*parent, classes=classes)}
    _check_learned(measured["all"], data, weights)
    say(f"cutting {subset}: some modules, until the size is right")
    module = shrink(modular.to(device), batches(data.splits["train"]), classes, **size)
    own = data.restrict(classes)
    test = batches(own.splits["test"])
    measured["one_class"] = guess_accuracy(own.splits["test"].labels)
    seed = params.seeds[0]
    if params.decompose.recalibrate_bn and batch_norms(module):
        size_of_batch = params.finetune.batch_size
        recalibrate_bn(module.to(device), training_batches(own, size_of_batch, device, seed))
    measured["as_cut"] = accuracy(*predict(module.to(device), test))
    if tune:
        say(f"fine-tuning {subset}")
        title, family = f"{params.models[0]} {subset}", family_of(params.models[0], model)
        _, module.info["finetuned"] = finetune(module, own, family, params, seed, title)
        measured["finetuned"] = accuracy(*predict(module, test))
    module.info |= {
        "cell": f"{params.models[0]}, {weights.name}",
        "class_names": [data.classes[position] for position in classes],
        "parent_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "preprocessing": {key: list(getattr(data, key)) for key in ("mean", "std", "size")},
        "subset": subset,
        "test_accuracy": measured,
    }
    with new_folder(out) as folder:
        save(module.cpu(), folder)
    return module


def _check_learned(reached: float, data: Prepared, weights: Path) -> None:
    """Raise ValueError if the parent's test accuracy is no better than one class for all."""
    chance = guess_accuracy(data.splits["test"].labels)
    if reached <= chance:
        raise ValueError(
            f"{weights}: test accuracy {reached:.1%} on these images is no better than always "
            f"saying the most frequent class ({chance:.1%}); is the order of its classes "
            f"{', '.join(data.classes[:5])}, ..., and are --size, --mean and --std its own?"
        )

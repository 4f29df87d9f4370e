"""A batch's forward and backward pass, launched op by op or replayed from a recording (ours)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo.distributed import sync_batch_norm
from nemo.fields import ParamsError
from nemo.training.tasks import Task

Parts = dict[str, Tensor]
TaskFunction = Callable[[nn.Module, Tensor, Tensor], Parts]


class Gradients:
    """The forward and backward pass of a batch: leaves gradients in the parameters, and gives the
    parts of the loss, (P,) on `device`, whose names are in `names`."""

    def __init__(self, model: nn.Module, task: TaskFunction, device: torch.device, amp: bool):
        self.model = model
        self.task = task
        self.device = device
        self.amp = amp
        self.names: list[str] = []

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        parts = self._add(self.task, images, labels)
        self.names = list(parts)
        return _stack(parts)

    def _add(self, task: TaskFunction, images: Tensor, labels: Tensor) -> Parts:
        """Add the gradients of a task to those in the parameters."""
        with torch.autocast(self.device.type, torch.bfloat16, self.amp), sync_batch_norm():
            parts = task(self.model, images, labels)
        if parts["loss"].requires_grad:  # not where a cut pass skips this step
            parts["loss"].backward()
        return {name: value.detach() for name, value in parts.items()}


class RecordedGradients(Gradients):
    """The same from a CUDA graph: a modular step of a small model is a thousand short kernels, and
    one replay costs less than launching each. Batches of another size go one by one, and so do the
    first ones, in which libraries set themselves up. What Python computes in the step, such as a
    weight that changes from epoch to epoch, keeps the value it had when recorded.

    Of a task with a cut pass, whose shapes change from step to step, the usual step is recorded,
    and the gradients of the pass are added op by op.

    Raises:
        ParamsError: the model or task does what cannot be recorded, such as waiting for the GPU.
        torch.OutOfMemoryError: the GPU's memory is too small for the recording.
    """

    WARM = 3

    def __init__(
        self, model: nn.Module, task: TaskFunction, device: torch.device, amp: bool, size: int
    ):
        super().__init__(model, task, device, amp)
        self.split = task if isinstance(task, Task) and task.cut_pass is not None else None
        self.size = size
        self.seen = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if len(images) != self.size or self.seen < self.WARM:
            self.seen += len(images) == self.size
            return super().__call__(images, labels)
        if self.graph is None:
            self._record(images, labels)
        assert self.graph is not None
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        parts = self.parts
        if self.split is not None:
            rest = self._add(self.split.rest, images, labels)
            parts = {**parts, **rest, "loss": parts["loss"] + rest["loss"]}
        return _stack({name: parts[name] for name in self.names})

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        recordable = self.task if self.split is None else self.split.recordable
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.model.zero_grad(set_to_none=True)
                self.parts = self._add(recordable, self.images, self.labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ParamsError(
                f"cuda_graphs: a training step of this model cannot be recorded ({why}); "
                "accepted: false"
            ) from error
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph


def _stack(parts: Parts) -> Tensor:
    wide = parts["loss"].dtype
    return torch.stack([value.to(wide) for value in parts.values()])

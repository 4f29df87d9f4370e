"""A batch's forward and backward pass, launched op by op or replayed from a recording (ours)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nemo.distributed import sync_batch_norm
from nemo.fields import ParamsError

TaskFunction = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


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
        with torch.autocast(self.device.type, torch.bfloat16, self.amp), sync_batch_norm():
            parts = self.task(self.model, images, labels)
        parts["loss"].backward()
        self.names = list(parts)
        wide = parts["loss"].dtype
        return torch.stack([value.detach().to(wide) for value in parts.values()])


class RecordedGradients(Gradients):
    """The same from a CUDA graph: a modular step of a small model is a thousand short kernels, and
    one replay costs less than launching each. Batches of another size go one by one, and so do the
    first ones, in which libraries set themselves up. What Python computes in the step, such as a
    weight that changes from epoch to epoch, keeps the value it had when recorded.

    Raises:
        ParamsError: the model or task does what cannot be recorded, such as waiting for the GPU.
        torch.OutOfMemoryError: the GPU's memory is too small for the recording.
    """

    WARM = 3

    def __init__(
        self, model: nn.Module, task: TaskFunction, device: torch.device, amp: bool, size: int
    ):
        super().__init__(model, task, device, amp)
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
        return self.parts.clone()

    def _record(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                self.parts = super().__call__(self.images, self.labels)
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

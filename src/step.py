"""One step of training: forward, loss, backward, clipping, optimiser, weight average; on a GPU as one CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, optim

from data.traindata import Sample, turn
from loss import Loss
from model import Model
from model.ops.graphed import on_stream
from optimizer import ModelEMA, set_learning_rate
from system import parallel

WARM_UP = 3  # steps before the graph is captured, in which libraries choose their kernels and make their workspaces


class TrainStep:
    """Trains a model on one batch a call.

    Nothing in it waits for a GPU: whether a batch is skipped for its loss is decided there, by a flag that the fused
    optimisers read (as they do for a gradient scaler), and what a call returns stays there until somebody reads it.
    With `graph` the first calls run as usual and the next one is captured, so that all later ones are one launch.

    Args:
        model: with its weights; its network is what is trained.
        loss: between its output and the target, on the same device.
        optimizer: over its parameters.
        batch_size: samples a step, in all processes together.
        accumulation: a batch is computed in so many parts, whose gradients add up.
        clip: largest absolute value of a gradient; 0: any.
        clip_norm: largest Euclidean norm of all gradients together; 0: any.
        dtype: type that the network computes in under autocast, float32 for none; losses and weights are float32.
        ema_decay: of the average of the weights; 0: none.
        graph: capture a CUDA graph, where that can be: one process, on CUDA, in float32 or bfloat16, a fused optimiser,
            no adversarial loss.

    Attributes:
        names: of the values that a call returns.
        ema: the average of the weights, or None.
        scaler: keeps small gradients of float16 from becoming zero.
        number: of the steps before this one, int64 () on the device, where a CUDA graph reads it; for terms that ask.
        limit: batches of a greater loss are skipped.
    """

    def __init__(
        self,
        model: Model,
        loss: Loss,
        optimizer: optim.Optimizer,
        batch_size: int,
        accumulation: int = 1,
        clip: float = 0.0,
        clip_norm: float = 0.0,
        dtype: torch.dtype = torch.float32,
        ema_decay: float = 0.0,
        graph: bool = False,
    ) -> None:
        self.model, self.loss, self.optimizer, self.accumulation = model, loss, optimizer, accumulation
        self.clip, self.clip_norm, self.dtype, self.wants_graph = clip, clip_norm, dtype, graph
        self.device = model.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.ema = ModelEMA(model.net, ema_decay) if ema_decay else None
        self.number = torch.zeros((), dtype=torch.int64, device=self.device)
        self.limit = torch.full((), torch.inf, dtype=torch.float64, device=self.device)
        self.decides_itself = bool(optimizer.defaults.get('fused')) and not self.scaler.is_enabled()
        self.change(loss, batch_size)

    def change(self, loss: Loss, batch_size: int) -> None:
        """Go on with another loss, or with batches of another size or shape, for which a graph is captured anew.

        What the terms of the loss so far have learned, those of the new one know.
        """
        if loss is not self.loss:
            loss.load_state_dict(self.loss.state_dict())
        self.loss, self.batch_size = loss, batch_size
        self.names = [*loss.names, 'total', 'gradient_norm', 'replaced', 'applied']
        possible = self.device.type == 'cuda' and parallel.world_size() == 1 and not loss.adversaries
        self.graph = _StepGraph(self) if self.wants_graph and possible and self.decides_itself else None

    def __call__(self, sample: Sample, rate: float, number: int = 0) -> Tensor:
        """Train on a batch at a learning rate, after `number` steps; returns the values of `names`, on the device.

        They are the loss terms and their sum, averaged over the batch; the Euclidean norm of all gradients before they
        were clipped; the number of samples in whose place others were taken; 1 if the step was made, 0 if it was
        skipped since its loss is not finite or above `limit`, or in float16 since its gradients are not finite.
        """
        set_learning_rate(self.optimizer, rate)
        self.number.fill_(number)
        self.loss.scale_rates(rate / self.optimizer.defaults['lr'])
        with fast_convolutions(self.device):
            if self.graph:
                return self.graph(sample)
            return self.train_on(*(part.to(self.device, non_blocking=True) for part in sample))

    def train_on(self, lr: Tensor, hr: Tensor, flips: Tensor, replaced: Tensor) -> Tensor:
        """The step itself, on the parts of a batch (see `Sample`), all on the device."""
        lr, hr = turn(lr, flips), turn(hr, flips)
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros(len(self.loss.names), device=self.device)
        parts = list(zip(lr.tensor_split(self.accumulation), hr.tensor_split(self.accumulation), strict=True))
        for i, (lr_part, hr_part) in enumerate(parts):
            with parallel.no_sync(self.model.calls.train) if i < len(parts) - 1 else nullcontext():
                terms += self._gradients(lr_part, hr_part)
        sums = parallel.all_reduce_tensor(torch.cat((terms, replaced.sum().view(1).to(terms.dtype))).double())
        total = sum(sums[: len(self.loss.terms)], sums.new_zeros(()))
        applied = total.isfinite() & (total <= self.limit)
        norm = self._update(applied)
        if self.scaler.is_enabled():
            applied = applied & norm.isfinite()  # else the scaler makes no step, but its next ones are smaller
        return torch.cat((sums[:-1], torch.stack([total, norm.double(), sums[-1], applied.double()])))

    def _gradients(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Add the gradients of a part of a batch; returns its share of what the loss names."""
        share, low = len(lr) / self.batch_size, self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if low else torch.bfloat16, enabled=low):
            sr = self.model(lr)
        lr_in_range = self.model.to_range(lr) if self.loss.wants('lr') else None
        losses = self.loss(sr, self.model.to_range(hr), lr=lr_in_range, step=self.number)
        total = sum(losses.values(), torch.zeros((), device=self.device)) * share
        # The gradient is averaged over the processes, each of which has its share of the batch.
        self.scaler.scale(total * parallel.world_size()).backward()
        return torch.stack([*losses.values(), *self.loss.watched()]).detach() * share

    def _update(self, applied: Tensor) -> Tensor:
        """Clip, and let optimiser and average make their step if it is `applied`; returns the norm of the gradients."""
        if not self.decides_itself and not applied:
            return torch.full((), torch.nan, device=self.device)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.net.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grad_value_(parameters, self.clip)
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        if self.decides_itself:
            self.optimizer.found_inf = applied.logical_not().float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema and (not self.scaler.is_enabled() or norm.isfinite()):
            self.ema.update(applied if self.decides_itself else None)
        return norm


class _StepGraph:
    """A training step that is captured once and replayed."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self.stream = torch.cuda.Stream(step.device)
        self.inputs: list[Tensor] = []
        self.calls = 0

    def __call__(self, sample: Sample) -> Tensor:
        if not self.inputs:
            self.inputs = [torch.empty_like(part, device=self.step.device) for part in sample]
        for target, part in zip(self.inputs, sample, strict=True):
            target.copy_(part, non_blocking=True)
        self.calls += 1
        if self.calls <= WARM_UP:
            with on_stream(self.stream):
                return self.step.train_on(*self.inputs)
        if self.calls == WARM_UP + 1:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode='thread_local'):
                self.output = self.step.train_on(*self.inputs)
        self.graph.replay()
        return self.output.clone()


@contextmanager
def fast_convolutions(device: torch.device) -> Iterator[None]:
    """Within this block cuDNN tries its kernels for every new shape and keeps the fastest, unless they must repeat."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == 'cuda' and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before

"""Exact evaluation over ranks: sums are reduced, nothing is padded, no sample counts twice.

T time, B batch, K classes
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from pipeline.answers import Answers, answers_of
from pipeline.data.base import Loader
from pipeline.objective import Loss
from pipeline.spiking.encode import over_steps
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state


@dataclass(frozen=True)
class Evaluation:
    """Shares in 0..1; the firing rate is spikes per neuron and time step."""

    samples: int
    top1: float
    top5: float
    loss: float
    firing_rate: float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_for: Loss,
    *,
    over_time: str = "steps",
) -> tuple[Evaluation, Answers]:
    """Run the model over this rank's share of a set: the figures of all ranks together, and what it answered on this one.

    Args:
        batches: (x_TB, target_B, index_B); ranks may hold different numbers of them, or none.
    """
    was_training = model.training
    model.eval()
    answered: list[Tensor] = []  # index, target and answer of each batch
    sums = torch.zeros(6, dtype=torch.float64)  # samples, top-1 hits, top-5 hits, loss, spikes, neurons x steps
    with _counting_spikes(model) as spikes:
        for x_TB, target_B, index_B in batches:
            with fresh_state(model):
                logits_TBK = model(x_TB).float()
            loss_of = loss_for(target_B)
            mean_BK = logits_TBK.mean(0)
            if over_time == "mean":
                loss = loss_of(mean_BK)
            else:
                loss = torch.stack([loss_of(logits_BK) for logits_BK in logits_TBK]).mean()
            best_B5 = best(mean_BK)
            hits_B5 = best_B5 == target_B[:, None]
            found = (hits_B5[:, 0].sum(), hits_B5.sum(), loss.double() * len(target_B))
            sums[:4] += torch.tensor([len(target_B), *map(float, found)], dtype=torch.float64)
            answered.append(torch.stack([index_B, target_B.cpu(), best_B5[:, 0].cpu()]))
        sums[4], sums[5] = spikes
    model.train(was_training)
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        device = next(model.parameters()).device
        total = sums.to(device)
        distributed.all_reduce(total)
        sums = total.cpu()
    samples, top1, top5, loss, fired, places = sums.tolist()
    if samples == 0:
        raise ValueError("evaluate: needs at least one sample; got none on any rank")
    figures = Evaluation(int(samples), top1 / samples, top5 / samples, loss / samples, fired / max(places, 1.0))
    return figures, answers_of(answered)


def best(logits_BK: Tensor) -> Tensor:
    """The best class, the second best, ...: `[B, 5]`, narrower where there are fewer classes."""
    return logits_BK.topk(min(5, logits_BK.shape[-1])).indices


def hits(logits_BK: Tensor, target_B: Tensor) -> Tensor:
    """Whether the label is the best class, the second best, ...: `[B, 5]`, as `best`."""
    return best(logits_BK) == target_B[:, None]


def inputs(
    loader: Loader, time_steps: int, device: torch.device, *, most: int | None = None
) -> Generator[tuple[Tensor, Tensor, Tensor]]:
    """What `evaluate` takes, from this rank's batches: all of them, or the first `most` samples. Close it if you leave early."""
    left = most
    with loader.epoch(0) as batches:
        for batch in batches:
            x_B, target_B, index_B = batch.x[:left], batch.target[:left], batch.index[:left]
            if left is not None:
                left -= len(target_B)
            if len(target_B):
                yield over_steps(x_B.to(device), time_steps), target_B.to(device), index_B
            if left == 0:
                return


@contextmanager
def _counting_spikes(model: nn.Module) -> Iterator[list[float]]:
    """Spikes, and neurons times steps, that every LIF under `model` gave while the context is open."""
    counted = [0.0, 0.0]

    def count(_: nn.Module, __: object, s_TB: Tensor) -> None:
        counted[0] += float(s_TB.count_nonzero())
        counted[1] += s_TB.numel()

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, LIF)]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()

"""What training costs and how it goes, batch by batch: seconds by phase, saved bytes, loss and hits.

On a device that runs asynchronously the phases are host time: what the host waits for lands in the phase that waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.measure.memory import SavedBytes, peak_device_bytes, peak_rss_bytes, reset_peak_device_bytes, reset_peak_rss
from pipeline.rules.base import Objective
from pipeline.spiking.state import state_bytes

Reduce = Callable[[Tensor], Tensor]


@dataclass
class Totals:
    """Sums over a run; they survive restarts inside checkpoints. Seconds and bytes."""

    train_s: float = 0.0
    data_wait_s: float = 0.0
    teacher_s: float = 0.0
    compute_s: float = 0.0
    optimizer_s: float = 0.0
    steady_samples: int = 0
    """in batches whose speed counts: not the first of an attempt (compilation), not those whose memory was counted"""
    steady_s: float = 0.0
    peak_saved_bytes: int = 0
    state_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    backward_calls: int = 0
    batches: int = 0

    PEAKS = ("peak_saved_bytes", "state_bytes", "peak_rss_bytes", "peak_device_bytes")


_PHASES: tuple[str, ...] = ("data_wait", "teacher", "optimizer")  # what is timed; the rest of a batch is "compute"


@dataclass
class _Window:
    """Sums since the last `take`."""

    loss: Tensor
    hits: Tensor
    samples: int = 0
    batches: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*_PHASES, "compute"), 0.0))


class Meters:
    """The loop's meters on one rank.

    Args:
        network: its parameters do not count as saved for backward.
        batch_size: samples in a global batch.
        device: where loss and hits are summed; they are read only at `take`, so that a GPU is never waited for in between.
        memory_every: counting saved bytes costs time, so it is done on the second batch of an attempt and every so many
            batches after it, and those batches are left out of the steady speed.
    """

    def __init__(self, network: nn.Module, *, batch_size: int, device: torch.device, memory_every: int = 200) -> None:
        self.network = network
        self.batch_size = batch_size
        self.device = device
        self.memory_every = memory_every
        self.totals = Totals()
        self._in_attempt = 0
        self._phases: dict[str, float] = dict.fromkeys(_PHASES, 0.0)
        self._counting = False
        self._logits: Tensor | None = None
        self._window = self._new_window()

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Times one global batch; on some of them counts what backward keeps alive."""
        self._counting = self._in_attempt % self.memory_every == 1
        self._phases = dict.fromkeys(_PHASES, 0.0)
        begun = time.perf_counter()
        with SavedBytes(self.network) if self._counting else nullcontext() as saved:
            yield
        if self.device.type == "cuda":  # kernels run on after the host is done; their time is this batch's
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - begun
        if saved is not None:
            self.totals.peak_saved_bytes = max(self.totals.peak_saved_bytes, saved.peak)
        self._account(seconds)

    def waiting(self) -> Any:
        """Surrounds the wait for the next micro-batch."""
        return self._phase("data_wait")

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """Surrounds the question to the teacher, whose kernels are waited for: their time is not the student's."""
        with self._phase("teacher"):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def optimizer(self) -> Any:
        return self._phase("optimizer")

    def add(self, objective: Objective, share: float) -> None:
        self.totals.backward_calls += objective.backward is not None
        self._window.loss += objective.loss * share
        self._logits = objective.logits if self._logits is None else self._logits + objective.logits
        if self._counting:
            self.totals.state_bytes = max(self.totals.state_bytes, state_bytes(self.network))

    def end_of_micro_batch(self, target_B: Tensor) -> None:
        assert self._logits is not None, "a rule yields at least one objective"
        wanted_B = target_B if target_B.dim() == 1 else target_B.argmax(-1)  # of a mixed sample, what there is most of
        self._window.hits += (self._logits.argmax(-1) == wanted_B).sum()
        self._window.samples += len(target_B)
        self._logits = None

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Means since the last `take`, the same on every rank; collective through `reduce`, which sums over ranks."""
        window, self._window = self._window, self._new_window()
        sums = reduce(
            torch.stack([window.loss, window.hits, torch.tensor(float(window.samples), dtype=torch.float64, device=self.device)])
        )
        loss, hits, samples = sums.tolist()
        seconds = sum(window.seconds.values())
        batches = max(1, window.batches)
        return {
            "loss": loss / batches,
            "top1": hits / max(1.0, samples),
            "images_per_s": window.batches * self.batch_size / max(seconds, 1e-9),
            **{f"{name}_s": value / batches for name, value in window.seconds.items()},
            "step_s": seconds / batches,
        }

    def note_peaks(self) -> None:
        """Take the process's and the device's peaks of memory into the totals."""
        self.totals.peak_rss_bytes = max(self.totals.peak_rss_bytes, peak_rss_bytes())
        self.totals.peak_device_bytes = max(self.totals.peak_device_bytes, peak_device_bytes())

    def forget_peaks(self) -> None:
        """Start the peaks anew: what was held before is not training's."""
        reset_peak_rss()
        reset_peak_device_bytes()

    def over_ranks(self, reduce_max: Reduce) -> Totals:
        """The totals with every peak the largest over ranks; collective."""
        self.note_peaks()
        peaks = torch.tensor([getattr(self.totals, name) for name in Totals.PEAKS], dtype=torch.int64)
        return Totals(**{**asdict(self.totals), **dict(zip(Totals.PEAKS, reduce_max(peaks).tolist(), strict=True))})

    def _new_window(self) -> _Window:
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        return _Window(loss=zero, hits=zero.clone())

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] += time.perf_counter() - begun

    def _account(self, seconds: float) -> None:
        compute = seconds - sum(self._phases.values())
        for name, value in {**self._phases, "compute": compute}.items():
            self._window.seconds[name] += value
            setattr(self.totals, f"{name}_s", getattr(self.totals, f"{name}_s") + value)
        self.totals.train_s += seconds
        self.totals.batches += 1
        self._window.batches += 1
        if self._in_attempt > 0 and not self._counting:
            self.totals.steady_samples += self.batch_size
            self.totals.steady_s += seconds
        self._in_attempt += 1

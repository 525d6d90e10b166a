"""What training costs and how it goes, batch by batch: seconds by part, saved bytes, loss and
hits.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.allocator import release_freed_memory
from pipeline.measure.clock import Clock
from pipeline.measure.constants import MEMORY_EVERY, OPERATIONS_EVERY, PARTS, REST, Between, Part
from pipeline.measure.energy import EnergyCounter
from pipeline.measure.memory import (
    peak_device_bytes,
    peak_reserved_bytes,
    peak_rss_bytes,
    pss_bytes,
    release_reserved_bytes,
    reserved_bytes,
    reset_peak_device_bytes,
    reset_peak_rss,
    rss_bytes,
)
from pipeline.measure.operations import Operations
from pipeline.measure.tensor_bytes import SavedBytes
from pipeline.measure.totals import Totals
from pipeline.rules.base import LossTerm
from pipeline.spiking.state import state_bytes

Reduce = Callable[[Tensor], Tensor]
Counted = Literal["bytes", "operations"]
T_ = TypeVar("T_")


@dataclass
class _Learnt:
    """How learning went, on a batch or since the last `take`: kept as it comes, and summed when it
    is asked for.
    """

    hit_B: list[Tensor] = field(default_factory=list)
    """whether each sample's answer was right, of each micro-batch"""
    losses: list[Tensor] = field(default_factory=list)
    """of the loss_terms of each micro-batch"""
    shares: list[float] = field(default_factory=list)
    """of each objective: its micro-batch's in the global batch"""
    samples: int = 0
    batches: int = 0

    def add(self, batch: _Learnt) -> None:
        self.hit_B += batch.hit_B
        self.losses += batch.losses
        self.shares += batch.shares
        self.samples += batch.samples
        self.batches += 1

    def sums(self, device: torch.device) -> Tensor:
        """Loss, hits and samples."""
        found = torch.tensor([0.0, 0.0, self.samples], dtype=torch.float64, device=device)
        if self.losses:
            found[0] = torch.cat(self.losses).double() @ torch.tensor(
                self.shares, dtype=torch.float64, device=device
            )
            found[1] = torch.cat(self.hit_B).sum()
        return found


@dataclass
class _Batch:
    """Of the batch at hand: it counts once it has ended."""

    learnt: _Learnt = field(default_factory=_Learnt)
    backward_calls: int = 0
    kept: tuple[int, int] = (0, 0)
    """where bytes are counted: saved ones, and those of states beside them, at the end of the
    forward that leaves most
    """


@dataclass
class _Window:
    """Since the last `take`."""

    learnt: _Learnt = field(default_factory=_Learnt)
    batches: int = 0
    """whose seconds are known"""
    seconds: Counter[str] = field(default_factory=Counter)


class Instrument(Protocol):
    """What looks at the operations of one batch, and away from a teacher's and an optimizer's."""

    def __enter__(self) -> Any: ...
    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> Any: ...
    def paused(self) -> AbstractContextManager[None]: ...


class Meters:
    """The loop's meters on one rank.

    Args:
        network: its parameters do not count as saved for backward.
        batch_size: samples in a global batch.
        device: where loss and hits are summed; they, and the clock, are read only at `take`, so
            that a GPU is never waited for in between.
        memory_every: counting saved bytes costs time, so it is done on the second batch of an
            attempt and every so many batches after it, and those batches are left out of the steady
            speed. A batch that is left in the middle counts nothing, and the next one does in its
            place.
        operations_every: likewise of operations, but from the third step of the run on, whatever
            attempt makes it: they depend on how far the network has learnt, and not on how warm the
            machine is.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        batch_size: int,
        device: torch.device,
        clock: Clock | None = None,
        memory_every: int = MEMORY_EVERY,
        operations_every: int = OPERATIONS_EVERY,
    ) -> None:
        self.network = network
        self.batch_size = batch_size
        self.device = device
        self.clock = clock or Clock(device)
        self.memory_every, self.operations_every = memory_every, operations_every
        self.totals = Totals()
        self.busy_s = 0.0
        """of this rank between the last two `take`s, its waiting for others aside"""
        self._joules = EnergyCounter(device)
        self._joules_then: float | None = None
        """at the last reading, while training goes on"""
        self._begun = 0
        self._kinds: deque[Literal["first", "counted", "steady"]] = deque()
        """of the batches that ended since the clock was read"""
        self._due: set[Counted] = set()
        """what a batch is to be counted for, and none has ended on which it was"""
        self._counting: SavedBytes | None = None
        self._watching: Instrument | None = None
        self._asked: Instrument | None = None
        self._inside_s = 0.0
        """of what was entered inside the part between batches that is open"""
        self._loss_terms: list[tuple[Tensor, Tensor]] = []
        """loss and logits of each since the last micro-batch ended"""
        self._window, self._batch = _Window(), _Batch()

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Surrounds everything that one global batch costs; on some of them counts what backward
        keeps alive.

        Of a batch that is left in the middle nothing is kept but its seconds: the host's, which has
        waited to hear why. The seconds of an attempt's first batch count as start-up, which
        `Attempt` tells: it waits for imports and compilation."""
        begun = time.perf_counter()
        counted = self._counted_on(self._begun, step)
        is_first = self._begun == 0
        operations = Operations(self.network) if counted == "operations" else None
        self._watching = watching = operations or self._asked
        self._begun, self._asked = self._begun + 1, None
        self._batch = batch = _Batch()
        self._loss_terms = []
        if watching is not None:
            self.note_peaks()
        try:
            with (
                self.clock.batch(),
                SavedBytes(self.network) if counted == "bytes" else nullcontext() as saved,
                watching or nullcontext(),
            ):
                self._counting = saved
                yield
        except BaseException:
            if not is_first:
                self.totals.seconds["skipped"] += time.perf_counter() - begun
            raise
        finally:
            self._watching = self._counting = None
            if watching is not None:
                # an instrument takes memory of its own, which is not training's
                self.forget_peaks()
        self._kinds.append("first" if is_first else "steady" if counted is None else "counted")
        self._window.learnt.add(batch.learnt)
        if counted is not None:
            self._due.remove(counted)
        if saved is not None:
            self.totals.peak_saved_bytes = max(self.totals.peak_saved_bytes or 0, saved.peak)
            self.totals.state_bytes = max(self.totals.state_bytes or 0, batch.kept[1])
        if operations is not None:
            self.totals.add_operations(
                operations.work, batch.learnt.samples, operations.not_counted
            )
        self.totals.backward_calls += batch.backward_calls
        self.totals.batches += 1

    def watch(self, instrument: Instrument) -> None:
        """Let it see the next batch, in the place of nothing: not on one whose operations are
        counted.
        """
        self._asked = instrument

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Surrounds a part of a batch (`measure/clock.py`)."""
        if self._watching is not None and name in ("teacher", "optimizer"):
            return self._unseen(name, self._watching)
        return self.clock.part(name)

    @contextmanager
    def _unseen(self, name: Part, instrument: Instrument) -> Iterator[None]:
        with self.clock.part(name), instrument.paused():
            yield

    def each(self, name: Part, source: Iterable[T_]) -> Iterator[T_]:
        """`source`, with what it takes to make each next one as that part."""
        return self.clock.each(name, source)

    @contextmanager
    def between(self, name: Between) -> Iterator[None]:
        """Surrounds what is done between two batches; the innermost is charged."""
        if self.device.type == "cuda" and name != "coordination":
            torch.cuda.synchronize(self.device)  # kernels of the last batches are theirs
        begun, (outer, self._inside_s) = time.perf_counter(), (self._inside_s, 0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            self.totals.seconds[name] += took - self._inside_s
            self._inside_s = outer + took

    def add(self, objective: LossTerm) -> None:
        """At the end of its forward: what backward keeps is there, and with states the most that
        there is.
        """
        self._batch.backward_calls += objective.backward is not None
        self._loss_terms.append(
            (objective.loss, objective.logits)
        )  # summed once: each sum is a kernel
        if (saved := self._counting) is not None:
            with self.part("metrics"):
                found = saved.now, state_bytes(self.network, beside=saved.storages)
                self._batch.kept = max(self._batch.kept, found)

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None:
        """`share`: of the micro-batch in the global batch, which its losses are weighed with."""
        assert self._loss_terms, "a rule yields at least one objective"
        with self.part("metrics"):
            losses, logits = zip(*self._loss_terms, strict=True)
            wanted_B = (
                target_B if target_B.dim() == 1 else target_B.argmax(-1)
            )  # of a mixed sample, what there is most of
            learnt = self._batch.learnt
            learnt.hit_B.append(torch.stack(logits).sum(0).argmax(-1) == wanted_B)
            learnt.losses.append(torch.stack(losses))
            learnt.shares += [share] * len(losses)
            learnt.samples += len(target_B)
            self._loss_terms = []

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Means since the last `take`, the same on every rank; collective through `reduce`, which
        sums over ranks.
        """
        self._account()
        window, self._window = self._window, _Window()
        loss, hits, samples = reduce(window.learnt.sums(self.device)).tolist()
        seconds = sum(window.seconds.values())
        self.busy_s = seconds - window.seconds["communication"]
        batches = max(1, window.batches)
        return {
            "loss": (
                loss / window.learnt.batches if window.learnt.batches else math.nan
            ),  # nothing was learnt from
            "top1": hits / max(1.0, samples),
            "images_per_s": window.batches * self.batch_size / max(seconds, 1e-9),
            **{f"{name}_s": window.seconds[name] / batches for name in (*PARTS, REST)},
            "step_s": seconds / batches,
        }

    def note_peaks(self) -> None:
        """Take the process's and the device's peaks of memory into the totals, and what the device
        has used.
        """
        self._note({**_peaks(self.device), "peak_pss_bytes": pss_bytes()})
        then, now = self._joules_then, self._joules.read()
        if then is not None and now is not None:
            self.totals.device_j = (self.totals.device_j or 0.0) + now - then
        self._joules_then = now

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[], None]]:
        """Surrounds an evaluation, whose peaks of memory are its own: yields what notes them, once
        every answer is there.
        """
        self.note_peaks()
        release_freed_memory()  # else training's would be the least that is told
        release_reserved_bytes(self.device)
        reset_peak_rss()
        reset_peak_device_bytes(self.device)
        try:
            yield lambda: self._note(
                {f"evaluation_{name}": value for name, value in _peaks(self.device).items()}
            )
        finally:
            self.forget_peaks()

    def _note(self, peaks: Mapping[str, int]) -> None:
        for name, value in peaks.items():
            setattr(self.totals, name, max(getattr(self.totals, name), value))

    def forget_peaks(self) -> None:
        """Start the peaks anew: what was held, and used, before is not training's.

        What was held and is free goes back to the kernel, or the device, where it would be told as
        training's peak; else training keeps it, and is not given it again page by page.
        """
        if rss_bytes() > self.totals.peak_rss_bytes:
            release_freed_memory()
        if reserved_bytes(self.device) > self.totals.peak_reserved_bytes:
            release_reserved_bytes(self.device)
        reset_peak_rss()
        reset_peak_device_bytes(self.device)
        self._joules_then = self._joules.read()

    def over_ranks(self, reduce_max: Reduce, reduce_mean: Reduce) -> Totals:
        """The totals with every peak the largest over ranks, and of joules the mean; collective."""
        self._account()
        self.note_peaks()
        used = (
            math.nan if self.totals.device_j is None else self.totals.device_j
        )  # every rank takes part, counter or not
        mean = float(reduce_mean(torch.tensor(used, dtype=torch.float64, device=self.device)))
        self.totals.device_j = None if math.isnan(mean) else mean
        own = [getattr(self.totals, name) for name in Totals.PEAKS]
        peaks = reduce_max(
            torch.tensor([-1 if peak is None else peak for peak in own], dtype=torch.int64)
        ).tolist()
        found = {
            name: None if peak < 0 else peak for name, peak in zip(Totals.PEAKS, peaks, strict=True)
        }
        return Totals(**{**asdict(self.totals), **found})

    def _counted_on(self, batch: int, step: int) -> Counted | None:
        """What this batch of the attempt, and step of the run, is counted for: one thing at a
        time.
        """
        if batch % self.memory_every == 1:
            self._due.add("bytes")
        if step % self.operations_every == 2:
            self._due.add("operations")
        return (
            "bytes" if "bytes" in self._due else "operations" if "operations" in self._due else None
        )

    def _account(self) -> None:
        """Take what the clock has measured since the last time."""
        for seconds in self.clock.take():
            kind = self._kinds.popleft()
            for name, value in seconds.items():
                # a Counter of floats
                self._window.seconds[name] += value  # type: ignore[assignment]
                if kind != "first":
                    self.totals.seconds[name] += value
            self._window.batches += 1
            self.totals.timed_batches += kind != "first"
            if kind == "steady":
                self.totals.steady_batches += 1
                self.totals.steady_samples += self.batch_size
                for name, value in seconds.items():
                    self.totals.steady_seconds[name] += value


def _peaks(device: torch.device) -> dict[str, int]:
    """Of the process and the device, since they were last started anew."""
    return {
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(device),
        "peak_reserved_bytes": peak_reserved_bytes(device),
    }

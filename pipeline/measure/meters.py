"""Meters of training for each batch: seconds by part, saved bytes, operations, loss and hits.

A hit is a correct prediction. `Totals` are the costs of a run's training so far: sums, counts and
peaks. Checkpoints store them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import release_freed_memory
from pipeline.measure.clock import Clock, synchronize
from pipeline.measure.constants import (
    MEMORY_EVERY,
    OPERATIONS_EVERY,
    PARTS,
    REST,
    SECTIONS,
    Part,
    Section,
)
from pipeline.measure.energy import EnergyCounter
from pipeline.measure.memory import (
    peaks,
    pss_bytes,
    reset_peak_device_bytes,
    reset_peak_rss,
    rss_bytes,
)
from pipeline.measure.operations import Operations, Pausable, Work
from pipeline.measure.saved_bytes import SavedBytes
from pipeline.rules.base import LossTerm
from pipeline.spiking.state import state_bytes

Reduce = Callable[[Tensor], Tensor]
Quantity = Literal["bytes", "operations"]  # counted on some batches only
Item = TypeVar("Item")


# L loss terms of a micro-batch, B its samples


class _MicroBatch(NamedTuple):
    """Loss and hits of a micro-batch. To save kernels, `take` sums all batches at once."""

    losses_L: Tensor
    hit_B: Tensor
    share: float  # of the global batch


@dataclass(eq=False)
class _Batch:
    """Measurements of one batch. A completed batch adds them to the totals."""

    step: int
    kind: Literal["first", "counted", "steady"]
    counted: Quantity | None
    # the totals' fields about operations, before a batch that counts them
    operations_before: dict[str, Any] = field(default_factory=dict)
    is_dropped: bool = False
    # loss and logits of each term of the current micro-batch
    loss_terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    micro_batches: list[_MicroBatch] = field(default_factory=list)
    backward_calls: int = 0
    # (bytes saved for backward, bytes of other states), at the largest number of saved bytes
    saved_and_state_bytes: tuple[int, int] = (0, 0)


class Meters:
    """The meters of the training loop on one rank.

    Args:
        network: its parameters do not count as saved for backward.
        batch_size: samples in a global batch.
        device: the device on which loss and hits are summed. A batch does not wait for a GPU unless
            its operations are counted: loss, hits and clock are read later.
        memory_every: saved bytes are counted on the second batch of an attempt and on every
            `memory_every`-th batch after it. Counting takes time, so these batches are not steady.
            If such a batch is not completed, the next batch is counted instead. None: never.
        operations_every: operations are counted in the same way, but by steps of the run, from the
            third step. They depend on the learnt weights, not on the warm-up of the machine. None:
            never.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        batch_size: int,
        device: torch.device,
        clock: Clock | None = None,
        memory_every: int | None = MEMORY_EVERY,
        operations_every: int | None = OPERATIONS_EVERY,
    ) -> None:
        self.network = network
        self.batch_size = batch_size
        self.device = device
        self.clock = clock or Clock(device)
        self.memory_every, self.operations_every = memory_every, operations_every
        self.totals = Totals()
        # seconds of batches between the last two calls of `take`, without communication
        self.busy_s = 0.0
        self._energy_counter = EnergyCounter(device)
        self._last_reading_j: float | None = None
        self._started_batches = 0
        self._unread: list[_Batch] = []  # completed since the clock was read
        # to be counted on the next completed batches, the earliest first
        self._due: dict[Quantity, None] = {}
        self._saved_bytes: SavedBytes | None = None  # counts the bytes of the current batch
        self._instrument: Pausable | None = None  # observes the current batch
        self._next_instrument: Pausable | None = None  # will observe the next batch
        self._nested_s = 0.0  # seconds of sections nested in the open section between batches
        self._batch = _Batch(-1, "first", None)
        # since the last `take`: completed batches, and the seconds of each by part
        self._batches: list[_Batch] = []
        self._batch_seconds: list[dict[str, float]] = []

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Surround one global batch. On some batches saved bytes or operations are counted.

        A batch that raises is not recorded. The first batch of an attempt includes imports and
        compilation. Its seconds are start-up time, which `Trainer` records.
        """
        is_first = self._started_batches == 0
        counted = self._quantity_to_count(self._started_batches, step)
        operations = Operations(self.network) if counted == "operations" else None
        self._instrument = instrument = operations or self._next_instrument
        self._started_batches += 1
        self._next_instrument = None
        kind = "first" if is_first else "steady" if counted is None else "counted"
        self._batch = batch = _Batch(step, kind, counted)
        if operations is not None:
            batch.operations_before = self._operations()
        if instrument is not None:
            self.note_peaks()
        try:
            with (
                self.clock.batch(),
                SavedBytes(self.network) if counted == "bytes" else nullcontext() as saved,
                instrument or nullcontext(),
            ):
                self._saved_bytes = saved
                yield
        finally:
            self._instrument = self._saved_bytes = None
            if instrument is not None:
                self.forget_peaks()  # excludes the memory of the instrument itself
        self._unread.append(batch)
        self._batches.append(batch)
        if counted is not None:
            self._due.pop(counted, None)
        if saved is not None:
            self._raise_peaks(
                {"peak_saved_bytes": saved.peak, "state_bytes": batch.saved_and_state_bytes[1]}
            )
        if operations is not None:
            self.totals.add_operations(
                operations, sum(len(micro_batch.hit_B) for micro_batch in batch.micro_batches)
            )
        self.totals.backward_calls += batch.backward_calls
        self.totals.batches += 1

    def drop(self, step: int) -> None:
        """Remove batch `step` from the totals. Its seconds count as skipped, and its memory peaks
        stay. The quantity that was due on it is counted on another batch.

        The batch must have been completed after the last `take`.
        """
        [batch] = [each for each in self._unread if each.step == step]
        batch.is_dropped = True
        if batch.counted is not None:
            self._due.setdefault(batch.counted)
        vars(self.totals).update(batch.operations_before)
        self._batches.remove(batch)
        self.totals.backward_calls -= batch.backward_calls
        self.totals.batches -= 1

    def _operations(self) -> dict[str, Any]:
        totals = self.totals
        return {
            "operations": dict(totals.operations),
            "operation_samples": totals.operation_samples,
            "not_counted": totals.not_counted,
        }

    def watch(self, instrument: Pausable) -> None:
        """Let an instrument observe the next batch, unless that batch's operations are counted."""
        self._next_instrument = instrument

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Surround a part of a batch (`measure/clock.py`)."""
        if self._instrument is not None and name in ("teacher", "optimizer"):
            return self._unobserved_part(name, self._instrument)
        return self.clock.part(name)

    @contextmanager
    def _unobserved_part(self, name: Part, instrument: Pausable) -> Iterator[None]:
        with self.clock.part(name), instrument.paused():
            yield

    def each(self, name: Part, source: Iterable[Item]) -> Iterator[Item]:
        """Iterate over `source`, and charge its time for each item to the part `name`."""
        iterator, end = iter(source), object()
        while True:
            with self.clock.part(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]  # not the end

    @contextmanager
    def between(self, name: Section) -> Iterator[None]:
        """Surround a section of work between two batches. The innermost section is charged."""
        if name != "coordination":
            synchronize(self.device)  # charges the last kernels to their batches
        outer_nested_s, self._nested_s = self._nested_s, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            section_s = time.perf_counter() - start
            self.totals.seconds[name] += section_s - self._nested_s
            self._nested_s = outer_nested_s + section_s

    def add(self, term: LossTerm) -> None:
        """Record a loss term at the end of its forward, when saved bytes and states are largest."""
        self._batch.backward_calls += term.backward is not None
        self._batch.loss_terms.append((term.loss, term.logits))
        if (saved := self._saved_bytes) is not None:
            with self.part("metrics"):
                now = (saved.now, state_bytes(self.network, excluded=saved.storages))
                self._batch.saved_and_state_bytes = max(self._batch.saved_and_state_bytes, now)

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None:
        """Record loss and hits. `share` is the micro-batch's share of the global batch."""
        batch = self._batch
        assert batch.loss_terms, "a rule yields at least one loss term"
        with self.part("metrics"):
            losses, logits = zip(*batch.loss_terms, strict=True)
            # the class with the largest share of a mixed sample
            target_B = target_B if target_B.dim() == 1 else target_B.argmax(-1)
            hit_B = torch.stack(logits).sum(0).argmax(-1) == target_B
            batch.micro_batches.append(_MicroBatch(torch.stack(losses), hit_B, share))
            batch.loss_terms = []

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Means since the last `take`. Collective.

        Loss and accuracy are the same on every rank; times are those of this rank. `reduce` sums
        over ranks.
        """
        self._read_clock()
        taken, self._batches = self._batches, []
        micro_batches = [each for batch in taken for each in batch.micro_batches]
        batches, self._batch_seconds = self._batch_seconds, []
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, hits, samples
        if micro_batches:
            losses, hits, _ = zip(*micro_batches, strict=True)
            hit_B = torch.cat(hits)
            shares = [each.share for each in micro_batches for _ in range(len(each.losses_L))]
            sums[0] = torch.cat(losses).double() @ sums.new_tensor(shares)
            sums[1], sums[2] = hit_B.sum(), len(hit_B)
        loss, hits, samples = reduce(sums).tolist()
        by_part = {name: sum(batch[name] for batch in batches) for name in (*PARTS, REST)}
        seconds, count = sum(by_part.values()), max(1, len(batches))
        self.busy_s = seconds - by_part["communication"]
        return {
            "loss": loss / count if batches else math.nan,
            "top1": hits / max(1.0, samples),
            "images_per_s": len(batches) * self.batch_size / max(seconds, 1e-9),
            **{f"{name}_s": part_s / count for name, part_s in by_part.items()},
            "step_s": seconds / count,
        }

    def note_peaks(self) -> None:
        """Add the current memory peaks, and the energy since the last reading, to the totals."""
        self._raise_peaks({**peaks(self.device), "peak_pss_bytes": pss_bytes()})
        last_j, now_j = self._last_reading_j, self._energy_counter.read()
        if last_j is not None and now_j is not None:
            self.totals.device_j = (self.totals.device_j or 0.0) + now_j - last_j
        self._last_reading_j = now_j

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[], None]]:
        """Surround an evaluation, whose memory peaks are recorded separately from training's.

        It yields a function that records these peaks. Call it after the last prediction.
        """
        self.note_peaks()
        self.forget_peaks(releases_memory=True)  # excludes memory that training has freed
        try:
            yield lambda: self._raise_peaks(
                {f"evaluation_{name}": value for name, value in peaks(self.device).items()}
            )
        finally:
            self.forget_peaks()

    def _raise_peaks(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            setattr(self.totals, name, max(getattr(self.totals, name) or 0, value))

    def forget_peaks(self, *, releases_memory: bool = False) -> None:
        """Reset the peaks, to exclude earlier memory and energy that are not training's.

        Freed memory is returned to the kernel or the device if it would raise training's peak, or
        with `releases_memory`. Otherwise training reuses the memory, and need not allocate it again
        page by page.
        """
        if releases_memory or rss_bytes() > self.totals.peak_rss_bytes:
            release_freed_memory()
        if self.device.type == "cuda" and (
            releases_memory
            or torch.cuda.memory_reserved(self.device) > self.totals.peak_reserved_bytes
        ):
            torch.cuda.empty_cache()
        reset_peak_rss()
        reset_peak_device_bytes(self.device)
        self._last_reading_j = self._energy_counter.read()

    def totals_over_ranks(self, reduce_max: Reduce, reduce_mean: Reduce) -> "Totals":
        """This rank's totals, with the peaks' maxima and the mean energy over ranks. Collective."""
        self._read_clock()
        self.note_peaks()
        # Every rank takes part, with or without a counter.
        own_j = math.nan if self.totals.device_j is None else self.totals.device_j
        mean_j = float(reduce_mean(torch.tensor(own_j, dtype=torch.float64, device=self.device)))
        self.totals.device_j = None if math.isnan(mean_j) else mean_j
        own_peaks = {
            name: -1 if value is None else value
            for name, value in asdict(self.totals).items()
            if name.endswith("_bytes")
        }
        maxima = reduce_max(torch.tensor(list(own_peaks.values()))).tolist()
        return replace(
            self.totals,
            **{
                name: None if peak < 0 else peak
                for name, peak in zip(own_peaks, maxima, strict=True)
            },
        )

    def _quantity_to_count(self, batch: int, step: int) -> Quantity | None:
        """The quantity to count on this batch of the attempt and step of the run, if any."""
        if self.memory_every is not None and batch >= 1 and (batch - 1) % self.memory_every == 0:
            self._due.setdefault("bytes")
        if (
            self.operations_every is not None
            and step >= 2
            and (step - 2) % self.operations_every == 0
        ):
            self._due.setdefault("operations")
        return next(iter(self._due), None)

    def _read_clock(self) -> None:
        totals = self.totals
        unread, self._unread = self._unread, []
        for batch, seconds in zip(unread, self.clock.take(), strict=True):
            if batch.is_dropped:
                totals.seconds["skipped"] += 0 if batch.kind == "first" else sum(seconds.values())
                continue
            self._batch_seconds.append(seconds)
            if batch.kind == "first":
                continue
            totals.timed_batches += 1
            if batch.kind == "steady":
                totals.steady_batches += 1
                totals.steady_samples += self.batch_size
            for name, value in seconds.items():
                totals.seconds[name] += value
                if batch.kind == "steady":
                    totals.steady_seconds[name] += value


@dataclass
class Totals:
    """Seconds, bytes and operations of one rank.

    Only completed batches count, except in "skipped" seconds. A batch is timed unless it is the
    first of an attempt, which compiles and warms up. A timed batch is steady unless its bytes or
    operations were counted. Fields whose name ends in `_bytes` are peaks.
    """

    # for each part of the timed batches, and for each kind of work between batches
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST, *SECTIONS), 0.0)
    )
    timed_batches: int = 0
    steady_batches: int = 0
    steady_samples: int = 0
    steady_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST), 0.0)
    )
    # None until a batch with counted bytes has ended
    peak_saved_bytes: int | None = None
    state_bytes: int | None = None  # without states that backward saves too
    peak_rss_bytes: int = 0
    # The largest of all readings, because the kernel records no peak.
    peak_pss_bytes: int = 0
    peak_device_bytes: int = 0
    peak_reserved_bytes: int = 0
    # during evaluations, without the free memory that training keeps for reuse
    evaluation_peak_rss_bytes: int = 0
    evaluation_peak_device_bytes: int = 0
    evaluation_peak_reserved_bytes: int = 0
    device_j: float | None = None  # joules of training, mean over ranks; None without a counter
    backward_calls: int = 0
    batches: int = 0
    # by purpose: the fields of `Work`, for this rank's batches with counted operations
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    operation_samples: int = 0
    not_counted: list[str] = field(
        default_factory=list
    )  # torch operations whose products are not counted

    @property
    def train_s(self) -> float:
        """Seconds of all timed batches."""
        return sum(self.seconds[name] for name in (*PARTS, REST))

    def mean_steady_s(self, part: Part) -> float | None:
        """Mean seconds of a part in a steady batch; None without a steady batch."""
        return self.steady_seconds[part] / self.steady_batches if self.steady_batches else None

    def share_of_steady_time(self, part: Part) -> float:
        """A part's share of the steady time, in 0..1; 0 without a steady batch."""
        return self.steady_seconds[part] / self.steady_s if self.steady_s else 0.0

    @property
    def steady_s(self) -> float:
        """Seconds of all steady batches."""
        return sum(self.steady_seconds.values())

    def add_operations(self, counted: Operations, samples: int) -> None:
        """Add the operations of one batch, by purpose."""
        for purpose, work in counted.work.items():
            self.operations[purpose] = asdict(Work(**self.operations.get(purpose, {})) + work)
        self.operation_samples += samples
        self.not_counted = sorted({*self.not_counted, *counted.not_counted})

    def operations_per_sample(self) -> dict[str, dict[str, float]]:
        """Operations of training on one sample, by purpose."""
        return {
            purpose: {name: count / self.operation_samples for name, count in work.items()}
            for purpose, work in self.operations.items()
        }

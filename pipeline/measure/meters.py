"""Meters of training for each batch: seconds by part, saved bytes, operations, loss and hits.

`Totals` are the costs of a run's training so far: sums, counts and peaks. Checkpoints store them.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pipeline.core.torch_settings import release_freed_memory
from pipeline.measure.clock import Clock, synchronize
from pipeline.measure.constants import (
    BETWEEN,
    MEMORY_EVERY,
    OPERATIONS_EVERY,
    PARTS,
    REST,
    Between,
    Part,
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
Counted = Literal["bytes", "operations"]
T_ = TypeVar("T_")


class _MicroBatch(NamedTuple):
    """Loss and hits of a micro-batch. They are summed only when needed, as each sum is a kernel."""

    losses_K: Tensor  # of its loss terms
    hit_B: Tensor  # whether answers are correct
    share: float  # of the global batch


@dataclass
class _Batch:
    """Measurements of the current batch. They count once it has ended."""

    # loss and logits of each term of the current micro-batch
    loss_terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    micro_batches: list[_MicroBatch] = field(default_factory=list)
    backward_calls: int = 0
    # If bytes are counted: (saved, states beside them) after the forward with the largest sum.
    kept: tuple[int, int] = (0, 0)


class Meters:
    """The meters of the training loop on one rank.

    Args:
        network: its parameters do not count as saved for backward.
        batch_size: samples in a global batch.
        device: the device on which loss and hits are summed. They and the clock are read only in
            `take`, so the loop never waits for a GPU in between.
        memory_every: saved bytes are counted on the second batch of an attempt and on every
            `memory_every`-th batch after it. Counting takes time, so those batches are not steady.
            If such a batch is not completed, the next one is counted instead.
        operations_every: operations are counted likewise, but from the third step of the run. They
            depend on what the network has learnt, not on the warm-up of the machine. None disables
            a count, here and in `memory_every`.
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
        self.busy_s = 0.0  # seconds of this rank between two `take`s, without waits for others
        self._joules = EnergyCounter(device)
        self._joules_then: float | None = None  # at the last reading during training
        self._begun = 0
        # the kinds of the batches that ended since the clock was read
        self._kinds: list[Literal["first", "counted", "steady"]] = []
        self._due: set[Counted] = set()  # counts that are due on the next completed batch
        self._counting: SavedBytes | None = None
        self._watching: Pausable | None = None  # observes the current batch
        self._next: Pausable | None = None  # is to observe the next batch
        self._inside_s = 0.0  # seconds of sections nested in the open section between batches
        self._batch = _Batch()
        # since the last `take`: micro-batches, and the seconds of each batch by part
        self._micro_batches: list[_MicroBatch] = []
        self._seconds: list[dict[str, float]] = []

    @contextmanager
    def batch(self, step: int) -> Iterator[None]:
        """Surround one global batch. On some batches saved bytes or operations are counted.

        If a batch raises, only the host's seconds are kept, as "skipped". The first batch of an
        attempt waits for imports and compilation. Its seconds are start-up time, which `Trainer`
        records.
        """
        begun = time.perf_counter()
        is_first, counted = self._begun == 0, self._counted_on(self._begun, step)
        operations = Operations(self.network) if counted == "operations" else None
        self._watching = watching = operations or self._next
        self._begun, self._next = self._begun + 1, None
        self._batch = batch = _Batch()
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
                self.forget_peaks()  # excludes the memory of the instrument itself
        self._kinds.append("first" if is_first else "steady" if counted is None else "counted")
        self._micro_batches += batch.micro_batches
        self._due.discard(counted)
        if saved is not None:
            self._note({"peak_saved_bytes": saved.peak, "state_bytes": batch.kept[1]})
        if operations is not None:
            self.totals.add_operations(
                operations, sum(len(each.hit_B) for each in batch.micro_batches)
            )
        self.totals.backward_calls += batch.backward_calls
        self.totals.batches += 1

    def watch(self, instrument: Pausable) -> None:
        """Let an instrument observe the next batch, unless its operations are counted."""
        self._next = instrument

    def part(self, name: Part) -> AbstractContextManager[None]:
        """Surround a part of a batch (`measure/clock.py`)."""
        if self._watching is not None and name in ("teacher", "optimizer"):
            return self._unseen(name, self._watching)
        return self.clock.part(name)

    @contextmanager
    def _unseen(self, name: Part, instrument: Pausable) -> Iterator[None]:
        with self.clock.part(name), instrument.paused():
            yield

    def each(self, name: Part, source: Iterable[T_]) -> Iterator[T_]:
        """Iterate over `source`, charging the time to produce each item to that part."""
        iterator, end = iter(source), object()
        while True:
            with self.clock.part(name):
                value = next(iterator, end)
            if value is end:
                return
            yield value  # type: ignore[misc]  # not the end

    @contextmanager
    def between(self, name: Between) -> Iterator[None]:
        """Surround work between two batches. The innermost section is charged."""
        if name != "coordination":
            synchronize(self.device)  # charges the last kernels to their batches
        begun, (outer, self._inside_s) = time.perf_counter(), (self._inside_s, 0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            self.totals.seconds[name] += took - self._inside_s
            self._inside_s = outer + took

    def add(self, term: LossTerm) -> None:
        """Record a loss term at the end of its forward, when saved bytes and states are largest."""
        self._batch.backward_calls += term.backward is not None
        self._batch.loss_terms.append((term.loss, term.logits))
        if (saved := self._counting) is not None:
            with self.part("metrics"):
                beside = state_bytes(self.network, excluded=saved.storages)
                self._batch.kept = max(self._batch.kept, (saved.now, beside))

    def end_of_micro_batch(self, target_B: Tensor, share: float) -> None:
        """Record loss and hits. `share`: the micro-batch's share of the global batch."""
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
        """Means since the last `take`, the same on every rank. Collective.

        `reduce` sums over ranks.
        """
        self._account()
        done, self._micro_batches = self._micro_batches, []
        batches, self._seconds = self._seconds, []
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, hits, samples
        if done:
            losses, hits, _ = zip(*done, strict=True)
            hit_B = torch.cat(hits)
            shares = [each.share for each in done for _ in range(len(each.losses_K))]
            sums[0] = torch.cat(losses).double() @ sums.new_tensor(shares)
            sums[1], sums[2] = hit_B.sum(), len(hit_B)
        loss, hits, samples = reduce(sums).tolist()
        by_part = {name: sum(each[name] for each in batches) for name in (*PARTS, REST)}
        seconds, count = sum(by_part.values()), max(1, len(batches))
        self.busy_s = seconds - by_part["communication"]
        return {
            "loss": loss / count if batches else math.nan,
            "top1": hits / max(1.0, samples),
            "images_per_s": len(batches) * self.batch_size / max(seconds, 1e-9),
            **{f"{name}_s": value / count for name, value in by_part.items()},
            "step_s": seconds / count,
        }

    def note_peaks(self) -> None:
        """Add the current memory peaks, and the energy since the last reading, to the totals."""
        self._note({**peaks(self.device), "peak_pss_bytes": pss_bytes()})
        then, now = self._joules_then, self._joules.read()
        if then is not None and now is not None:
            self.totals.device_j = (self.totals.device_j or 0.0) + now - then
        self._joules_then = now

    @contextmanager
    def evaluating(self) -> Iterator[Callable[[], None]]:
        """Surround an evaluation, whose memory peaks are kept apart.

        It yields a function that records the peaks. Call it once all answers are there.
        """
        self.note_peaks()
        self.forget_peaks(gives_back=True)  # otherwise memory that training freed would count
        try:
            yield lambda: self._note(
                {f"evaluation_{name}": value for name, value in peaks(self.device).items()}
            )
        finally:
            self.forget_peaks()

    def _note(self, found: Mapping[str, int]) -> None:
        for name, value in found.items():
            setattr(self.totals, name, max(getattr(self.totals, name) or 0, value))

    def forget_peaks(self, *, gives_back: bool = False) -> None:
        """Reset the peaks, to exclude earlier memory and energy that are not training's.

        Freed memory is returned to the kernel or the device only if it would raise training's
        peak. Otherwise training keeps it and need not allocate it again page by page. `gives_back`
        returns it always.
        """
        if gives_back or rss_bytes() > self.totals.peak_rss_bytes:
            release_freed_memory()
        if self.device.type == "cuda" and (
            gives_back or torch.cuda.memory_reserved(self.device) > self.totals.peak_reserved_bytes
        ):
            torch.cuda.empty_cache()
        reset_peak_rss()
        reset_peak_device_bytes(self.device)
        self._joules_then = self._joules.read()

    def over_ranks(self, reduce_max: Reduce, reduce_mean: Reduce) -> "Totals":
        """The totals, with the maximum of each peak and the mean energy over ranks. Collective."""
        self._account()
        self.note_peaks()
        # every rank takes part, with or without a counter
        used = math.nan if self.totals.device_j is None else self.totals.device_j
        mean = float(reduce_mean(torch.tensor(used, dtype=torch.float64, device=self.device)))
        self.totals.device_j = None if math.isnan(mean) else mean
        own = {
            name: -1 if value is None else value
            for name, value in asdict(self.totals).items()
            if name.endswith("_bytes")
        }
        maxima = reduce_max(torch.tensor(list(own.values()))).tolist()
        return replace(
            self.totals,
            **{name: None if peak < 0 else peak for name, peak in zip(own, maxima, strict=True)},
        )

    def _counted_on(self, batch: int, step: int) -> Counted | None:
        """The quantity to count on this batch of the attempt and step of the run, if any."""
        if self.memory_every is not None and batch % self.memory_every == 1:
            self._due.add("bytes")
        if self.operations_every is not None and step % self.operations_every == 2:
            self._due.add("operations")
        return min(self._due, default=None)  # "bytes" precedes "operations"

    def _account(self) -> None:
        totals = self.totals
        kinds, self._kinds = self._kinds, []
        for kind, seconds in zip(kinds, self.clock.take(), strict=True):
            self._seconds.append(seconds)
            if kind == "first":
                continue
            totals.timed_batches += 1
            if kind == "steady":
                totals.steady_batches += 1
                totals.steady_samples += self.batch_size
            for name, value in seconds.items():
                totals.seconds[name] += value
                if kind == "steady":
                    totals.steady_seconds[name] += value


@dataclass
class Totals:
    """Seconds, bytes and operations of one rank.

    A batch is timed unless it is the first of an attempt, which compiles and warms up. A timed
    batch is steady unless its bytes or operations were counted. Fields whose name ends in `_bytes`
    are peaks.
    """

    # for each part of the timed batches, and for the work between batches
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST, *BETWEEN), 0.0)
    )
    timed_batches: int = 0
    steady_batches: int = 0
    steady_samples: int = 0
    steady_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*PARTS, REST), 0.0)
    )
    # None until a batch with counted bytes has ended
    peak_saved_bytes: int | None = None
    state_bytes: int | None = None  # states that backward does not save as well
    peak_rss_bytes: int = 0
    # The largest value at the end of a measured section, because the kernel keeps no peak.
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
    # by purpose: multiplications, additions and dense, for this rank's counted batches
    operations: dict[str, dict[str, int]] = field(default_factory=dict)
    operation_samples: int = 0
    not_counted: list[str] = field(default_factory=list)  # operations with uncounted products

    @property
    def train_s(self) -> float:
        """Seconds of all timed batches."""
        return sum(self.seconds[name] for name in (*PARTS, REST))

    def of_a_steady_batch(self, part: Part) -> float | None:
        """Mean seconds of a part; None without a steady batch."""
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
        for purpose, more in counted.work.items():
            self.operations[purpose] = asdict(Work(**self.operations.get(purpose, {})) + more)
        self.operation_samples += samples
        self.not_counted = sorted({*self.not_counted, *counted.not_counted})

    def operations_per_sample(self) -> dict[str, dict[str, float]]:
        """Operations of training on one sample, by purpose."""
        return {
            purpose: {name: count / self.operation_samples for name, count in work.items()}
            for purpose, work in self.operations.items()
        }

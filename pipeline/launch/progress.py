"""Shows a run while it trains, from its journal: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted
from pipeline.measure.energy import describe_inference
from pipeline.track import events
from pipeline.track.connect import without_password
from pipeline.track.events import Event, from_dict
from pipeline.track.journal import Follower, Record, number


class Watch:
    """Draws the events that `show` is given, some times a second or more rarely; `close` ends the
    bar.

    At once it prints where the run is kept and the command that resumes it. `every` is the number
    of seconds between lines where the console is no terminal; `clock` tells them. A `name` begins
    each line: then several runs are shown at once, and none of them has a bar.
    """

    def __init__(
        self,
        console: Console,
        *,
        run_dir: str | os.PathLike[str],
        store: str,
        resume_command: str = "",
        name: str = "",
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._prefix = f"{name}  " if name else ""
        self._has_bar = console.is_terminal and not name
        self._every = every
        self._clock = clock
        self._shown = float("-inf")  # when the last plain line about steps was printed
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start: events.Start | None = None
        self._since_step, self._since = 0, 0.0  # steps done and time of the first batch's end
        self._accuracy = ""
        self._say(os.fspath(run_dir), label="run     ")
        self._say(without_password(store), label="mlflow  ")
        if resume_command:
            self._say(resume_command, label="resume  ", whole=[resume_command])
        self._say("waiting for the workers, which import torch and build the network")

    def show(self, new: Iterable[Event]) -> None:
        """Take new events of the journal, in order. Of steps in a row the last is drawn."""
        step: events.Step | None = None
        for event in new:
            if isinstance(event, events.Step):
                step = event
                continue
            if step is not None:
                self._draw(step)
                step = None
            handler = getattr(self, f"_on_{event.kind}", None)
            if handler is not None:
                handler(event)
        if step is not None:
            self._draw(step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # --------------------------------------------------------------------------------------- events

    def _on_start(self, event: events.Start) -> None:
        self._start, self._since_step, self._since = event, event.step, event.time
        if _has_gpu(event):
            cores, loaders = event.hardware.get("threads"), event.loader_threads
            self._say(
                f"cores   {cores} for each GPU, {loaders} loader threads (--cpus-per-worker,"
                " --loader-threads)"
            )
        done, total = event.step, event.total_steps
        workers = counted(event.world_size, "worker")
        if event.attempt:
            self._say(f"start {event.attempt + 1}: goes on at step {done}/{total} on {workers}")
        else:
            steps, samples = counted(total, "step"), counted(event.batch_size, "sample")
            what = f"{event.rule} on {workers}, {steps} of {samples}"
            self._say(f"start   {what}, study {event.study[:8]}, commit {event.commit}")
        if done != total:
            self._say("waiting for the first batch, which compiles what reads the data")
        if self._has_bar:
            if self._bar is None:
                self._bar = _bar(self._console)
                self._task = self._bar.add_task(event.rule, text="")
                self._bar.start()
            self._bar.reset(self._task, total=total, completed=done, text="")

    def _on_first_batch(self, event: events.FirstBatch) -> None:
        self._say(
            f"started after {_short(event.startup_s)} s: imports, compilation and the first"
            " batch are done"
        )
        self._since_step, self._since = event.step, event.time

    def _on_phase(self, event: events.Phase) -> None:
        head = "" if event.head is None else f", head {event.head}"
        steps = counted(event.steps, "step")
        self._say(
            f"phase {event.phase + 1}/{event.of}, {event.name}: from step {event.step},"
            f" {steps}{head}"
        )

    def _on_evaluation(self, event: events.Evaluation) -> None:
        metrics = event.metrics
        parts = [
            f"{name} {_share(metrics[key])}"
            for name, key in (("top-1", "top1"), ("top-5", "top5"))
            if key in metrics
        ]
        parts += [
            f"{key.replace('_', ' ')} {_short(metrics[key])}"
            for key in ("loss", "firing_rate")
            if key in metrics
        ]
        parts += [f"BWT {_share(metrics['bwt'])}"] if "bwt" in metrics else []
        self._accuracy = _share(metrics["top1"]) if "top1" in metrics else ""
        self._say(
            f"evaluation after step {event.step} (epoch {event.epoch + 1}): {', '.join(parts)}"
        )
        tasks = [
            f"{key.removeprefix('top1_')} {_share(top1)}"
            for key, top1 in metrics.items()
            if key.startswith("top1_")
        ]
        if len(tasks) > 1:
            self._say(f"each task: {', '.join(tasks)}")

    def _on_checkpoint(self, event: events.Checkpoint) -> None:
        if self._bar is not None:
            return  # a terminal shows the bar; a log should say what can be resumed
        size, written, stalled = _bytes(event.bytes), _short(event.write_s), _short(event.stall_s)
        self._say(
            f"checkpoint at step {event.step}: {size} in {written} s, training stood still"
            f" for {stalled} s"
        )

    def _on_quarantine(self, event: events.Quarantine) -> None:
        self._say(f"quarantined {event.path}: {event.reason}")

    def _on_unwritten(self, event: events.Unwritten) -> None:
        self._say(f"{event.error}; another is begun at once")

    def _on_waiting(self, event: events.Waiting) -> None:
        why = f": {event.error}" if event.error else ""
        self._say(f"{event.what} is waited for, for up to {_short(event.most_s)} s{why}")

    def _on_undeleted(self, event: events.Undeleted) -> None:
        self._say(
            f"checkpoint at step {event.step} is whole; an older one could not be deleted:"
            f" {event.error}"
        )

    def _on_skipped(self, event: events.Skipped) -> None:
        samples = counted(event.samples, "sample")
        self._say(f"skipped {_batch(event)} of {samples}: {event.reason}{_advice(event)}")

    def _on_preempted(self, event: events.Preempted) -> None:
        when = "soon" if event.seconds_left is None else f"in {event.seconds_left:.0f} s"
        count = len(event.machines)
        which = f"{counted(count, 'machine')} {'is' if count == 1 else 'are'}"
        self._say(
            f"{which} taken away {when}: a checkpoint at step {event.step} is begun"
        )  # and told once it is whole

    def _on_stopped(self, event: events.Stopped) -> None:
        self._say(f"stopped after step {event.step}: {event.reason}")

    def _on_failed(self, event: events.Failed) -> None:
        self._say(f"failed: {event.error}")

    def _on_hung(self, event: events.Hung) -> None:
        self._say(
            f"worker {event.worker} gave no sign of life: what it was at is in {event.stacks}"
        )

    def _on_died(self, event: events.Died) -> None:
        self._say(f"worker {event.worker} ended: {event.error}")

    def _on_rollback(self, event: events.Rollback) -> None:
        self._say(f"{_batch(event)}: {event.reason}; back to step {event.to}{_advice(event)}")

    def _on_straggler(self, event: events.Straggler) -> None:
        for rank, about in event.workers.items():
            self._say(
                f"worker {rank} on {about['host']} takes {about['times']:.1f} times as"
                " long as the others"
            )

    def _on_data_wait(self, event: events.DataWait) -> None:
        waits = f"training waits for data {_share(event.share)} of the time"
        self._say(
            f"{waits}: take more --loader-threads, now {event.loader_threads}, and more"
            " --cpus-per-worker"
        )

    def _on_smaller(self, event: events.Smaller) -> None:
        self._say(
            f"out of memory: at most {counted(event.micro_batch, 'sample')} at a time from here on"
        )

    def _on_diverged(self, event: events.Diverged) -> None:
        self._say(f"diverged: {event.error}")

    def _on_finish(self, event: events.Finish) -> None:
        summary, start = event.summary, self._start
        if self._bar is not None and start is not None:
            self._bar.update(self._task, completed=start.total_steps)
        if summary.get("inference"):
            on_gpu = start is not None and _has_gpu(start)
            self._say(describe_inference(summary["inference"], on_gpu=on_gpu))
        top1 = f", top-1 {_share(summary['top1'])}" if summary.get("top1") is not None else ""
        bwt = f", BWT {_share(summary['bwt'])}" if summary.get("bwt") is not None else ""
        steps = counted(event.step, "step")
        # Replicas that differ make a run go back, too, and skip nothing.
        back = summary.get("rollbacks") if summary.get("skipped_batches") else 0
        diverged = f"; its training diverged and went back {counted(back, 'time')}" if back else ""
        self._say(f"finished: {steps} in {_short(summary.get('wall_s'))} s{top1}{bwt}{diverged}")

    # -------------------------------------------------------------------------------------- drawing

    def _draw(self, event: events.Step) -> None:
        metrics, start = event.metrics, self._start
        epochs, total = ("?", "?") if start is None else (start.epochs, start.total_steps)
        parts = [
            f"epoch {event.epoch + 1}/{epochs}",
            f"{_short(metrics.get('images_per_s'))} images/s",
            f"loss {_short(metrics.get('loss'))}",
            f"top-1 {_share(metrics.get('top1'))}"
            + (f" (val {self._accuracy})" if self._accuracy else ""),
            _bytes(event.memory_bytes),
        ]
        if self._bar is not None and start is not None:
            text = self._fitting(parts, start)
            self._bar.update(self._task, completed=event.step, text=text)
            return
        if self._has_bar or self._clock() - self._shown < self._every:
            return
        self._shown = self._clock()
        left = "" if start is None else self._left(event, start)
        self._say(f"step {event.step}/{total}  {'  '.join(parts)}{left}")

    def _fitting(self, parts: list[str], start: events.Start) -> str:
        """As many parts as fit beside the bar: rich would cut the times that stand after them."""
        steps = 2 * len(str(start.total_steps)) + 1
        beside = (len(start.rule), _bar_width(self._console), steps, *2 * [len("00:00:00")])
        room = self._console.width - sum(beside) - len(beside)
        while parts and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)

    def _left(self, event: events.Step, start: events.Start) -> str:
        """The time to the end at the speed since the first batch of this start."""
        done, seconds = event.step - self._since_step, event.time - self._since
        if done <= 0:
            return ""
        minutes, rest = divmod(int((start.total_steps - event.step) * seconds / done), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{rest:02d} left"

    def _say(self, line: str, *, label: str = "", whole: Sequence[str] = ()) -> None:
        """Above the bar, where there is one."""
        say(self._console, line, label=f"{self._prefix}{label}", whole=whole)


def _has_gpu(start: events.Start) -> bool:
    return start.hardware.get("gpu", "none") != "none"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_bar_width(console)),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )


def _bar_width(console: Console) -> int:
    return 20 if console.width >= 120 else 6


def _short(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:,.0f}" if abs(found) >= 1000 else f"{found:.3g}"


def _share(value: Any) -> str:
    found = number(value)
    return "-" if found is None else f"{found:.2%}"


def _bytes(value: Any) -> str:
    found = number(value)
    if found is None:
        return "-"
    scale, unit = next(
        pair
        for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
        if found >= pair[0] or pair[0] == 1
    )
    return f"{found / scale:.3g} {unit}"


def _batch(event: events.Skipped | events.Rollback) -> str:
    return f"batch {event.step} (epoch {event.epoch + 1})"


def _advice(event: events.Skipped | events.Rollback) -> str:
    return f"; {event.advice}" if event.advice else ""


class Shown:
    """Shows a run while it trains, from its journal as it grows. No error in here ends the
    training.

    It begins where the journal in `folder` ends now. `store`, `resume_command` and `name` are
    `Watch`'s. `also` is given the same events.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        store: str,
        resume_command: str = "",
        name: str = "",
        also: Callable[[list[Record]], None] = lambda events: None,
    ) -> None:
        self._console, self._also = console, also
        journal = RunFolder(folder).journal
        end = journal.stat().st_size if journal.exists() else 0
        self._follower = Follower(journal, offset=end)
        self._watch = Watch(
            console, run_dir=folder, store=store, resume_command=resume_command, name=name
        )
        self._is_blind = self._is_broken = False

    def look(self) -> None:
        """Show what has come to the journal since the last call."""
        try:
            new = self._follower.poll()
        except OSError as error:  # storage that is away for a moment
            if not self._is_blind:
                why = error.strerror or error
                text = f"the journal cannot be read ({why}): looked for again, and training goes on"
                say(self._console, text)
            self._is_blind = True
            return
        self._is_blind = False
        if self._is_broken:
            return
        try:
            self._watch.show([from_dict(event) for event in new])
            self._also(new)
        except Exception as error:  # a mistake in what is shown must not cost a training
            self._is_broken = True
            why = f"{type(error).__name__}: {error}"
            text = f"shown no more ({why}): training goes on, and its journal has everything"
            say(self._console, text)

    def close(self) -> None:
        self.look()
        self._watch.close()

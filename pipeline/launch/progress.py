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
from pipeline.core.units import counted
from pipeline.measure.energy import describe_inference
from pipeline.track.connect import without_password
from pipeline.track.journal import Event, Follower, number


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
        self._start: dict[str, Any] = {}
        self._newest: dict[str, Any] = {}  # step event
        self._accuracy = ""
        self._say(os.fspath(run_dir), label="run     ")
        self._say(without_password(store), label="mlflow  ")
        if resume_command:
            self._say(resume_command, label="resume  ", whole=[resume_command])
        self._say("waiting for the workers, which import torch and build the network")

    def show(self, events: Iterable[dict[str, Any]]) -> None:
        """Take new events of the journal, in order."""
        stepped = False
        for event in events:
            if event["event"] == "step":  # of several steps since the last look the newest is drawn
                self._newest, stepped = event, True
                continue
            if stepped:
                self._draw()
                stepped = False
            handler = getattr(self, f"_on_{event['event']}", None)
            if handler is not None:
                handler(event)
        if stepped:
            self._draw()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # --------------------------------------------------------------------------------------- events

    def _on_start(self, event: dict[str, Any]) -> None:
        self._start, self._newest = event, {}
        if (event.get("hardware") or {}).get("gpu", "none") != "none":
            cores, loaders = event["hardware"].get("threads"), event.get("loader_threads")
            self._say(
                f"cores   {cores} for each GPU, {loaders} loader threads (--cpus-per-worker,"
                " --loader-threads)"
            )
        done, total = event.get("step", 0), event.get("total_steps")
        workers = counted(event.get("world_size"), "worker")
        if event.get("attempt", 0):
            self._say(f"start {event['attempt'] + 1}: goes on at step {done}/{total} on {workers}")
        else:
            steps, samples = counted(total, "step"), counted(event.get("batch_size"), "sample")
            what = f"{event.get('rule')} on {workers}, {steps} of {samples}"
            self._say(
                f"start   {what}, study {str(event.get('study', ''))[:8]}, commit"
                f" {event.get('commit')}"
            )
        if done != total:
            self._say("waiting for the first batch, which compiles what reads the data")
        if self._has_bar:
            if self._bar is None:
                self._bar = _bar(self._console)
                self._task = self._bar.add_task(str(event.get("rule", "")), text="")
                self._bar.start()
            self._bar.reset(self._task, total=total, completed=done, text="")

    def _on_first_batch(self, event: dict[str, Any]) -> None:
        self._say(
            f"started after {_short(event.get('startup_s'))} s: imports, compilation and the first"
            " batch are done"
        )
        self._start = {**self._start, "step": event.get("step", 0), "time": event.get("time", 0)}

    def _on_phase(self, event: dict[str, Any]) -> None:
        head = "" if event.get("head") is None else f", head {event['head']}"
        place = f"{_from_one(event.get('phase'))}/{event.get('of')}"
        self._say(
            f"phase {place}, {event.get('name')}: from step {event.get('step')},"
            f" {counted(event.get('steps'), 'step')}{head}"
        )

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        metrics = event.get("metrics", {})
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
            f"evaluation after step {event.get('step')} (epoch {_from_one(event.get('epoch'))}):"
            f" {', '.join(parts)}"
        )
        tasks = [
            f"{key.removeprefix('top1_')} {_share(top1)}"
            for key, top1 in metrics.items()
            if key.startswith("top1_")
        ]
        if len(tasks) > 1:
            self._say(f"each task: {', '.join(tasks)}")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        if self._bar is not None:
            return  # a terminal shows the bar; a log should say what can be resumed
        size, written, stalled = (
            _bytes(event.get("bytes")),
            _short(event.get("write_s")),
            _short(event.get("stall_s")),
        )
        self._say(
            f"checkpoint at step {event.get('step')}: {size} in {written} s, training stood still"
            f" for {stalled} s"
        )

    def _on_quarantine(self, event: dict[str, Any]) -> None:
        self._say(f"quarantined {event.get('path')}: {event.get('reason')}")

    def _on_unwritten(self, event: dict[str, Any]) -> None:
        self._say(f"{event.get('error')}; another is begun at once")

    def _on_waiting(self, event: dict[str, Any]) -> None:
        why = f": {event['error']}" if event.get("error") else ""
        self._say(
            f"{event.get('what')} is waited for, for up to {_short(event.get('most_s'))} s{why}"
        )

    def _on_undeleted(self, event: dict[str, Any]) -> None:
        self._say(
            f"checkpoint at step {event.get('step')} is whole; an older one could not be deleted:"
            f" {event.get('error')}"
        )

    def _on_skipped(self, event: dict[str, Any]) -> None:
        samples = counted(event.get("samples"), "sample")
        self._say(f"skipped {_batch(event)} of {samples}: {event.get('reason')}{_advice(event)}")

    def _on_preempted(self, event: dict[str, Any]) -> None:
        left = number(event.get("seconds_left"))
        when = "soon" if left is None else f"in {left:.0f} s"
        count = len(event.get("machines") or ())
        which = f"{counted(count, 'machine')} {'is' if count == 1 else 'are'}"
        self._say(
            f"{which} taken away {when}: a checkpoint at step {event.get('step')} is begun"
        )  # and told once it is whole

    def _on_stopped(self, event: dict[str, Any]) -> None:
        self._say(f"stopped after step {event.get('step')}: {event.get('reason')}")

    def _on_failed(self, event: dict[str, Any]) -> None:
        self._say(f"failed: {event.get('error')}")

    def _on_hung(self, event: dict[str, Any]) -> None:
        self._say(
            f"worker {event.get('worker')} gave no sign of life: what it was at is in"
            f" {event.get('stacks')}"
        )

    def _on_died(self, event: dict[str, Any]) -> None:
        self._say(f"worker {event.get('worker')} ended: {event.get('error')}")

    def _on_rollback(self, event: dict[str, Any]) -> None:
        self._say(
            f"{_batch(event)}: {event.get('reason')}; back to step"
            f" {event.get('to')}{_advice(event)}"
        )

    def _on_straggler(self, event: dict[str, Any]) -> None:
        for rank, about in (event.get("workers") or {}).items():
            self._say(
                f"worker {rank} on {about.get('host')} takes {about.get('times', 0):.1f} times as"
                " long as the others"
            )

    def _on_data_wait(self, event: dict[str, Any]) -> None:
        waits = f"training waits for data {_share(event.get('share'))} of the time"
        self._say(
            f"{waits}: take more --loader-threads, now {event.get('loader_threads')}, and more"
            " --cpus-per-worker"
        )

    def _on_smaller(self, event: dict[str, Any]) -> None:
        self._say(
            f"out of memory: at most {counted(event.get('micro_batch'), 'sample')} at a time from"
            " here on"
        )

    def _on_diverged(self, event: dict[str, Any]) -> None:
        self._say(f"diverged: {event.get('error')}")

    def _on_finish(self, event: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._start.get("total_steps"))
        if event.get("inference"):
            gpu = (self._start.get("hardware") or {}).get("gpu", "none")
            self._say(describe_inference(event["inference"], on_gpu=gpu != "none"))
        top1 = f", top-1 {_share(event['top1'])}" if event.get("top1") is not None else ""
        bwt = f", BWT {_share(event['bwt'])}" if event.get("bwt") is not None else ""
        steps = counted(event.get("steps", event.get("step")), "step")
        # Replicas that differ make a run go back, too, and skip nothing.
        back = event.get("rollbacks") if event.get("skipped_batches") else 0
        diverged = f"; its training diverged and went back {counted(back, 'time')}" if back else ""
        self._say(f"finished: {steps} in {_short(event.get('wall_s'))} s{top1}{bwt}{diverged}")

    # -------------------------------------------------------------------------------------- drawing

    def _draw(self) -> None:
        event, metrics = self._newest, self._newest.get("metrics", {})
        parts = [
            f"epoch {_from_one(event.get('epoch'))}/{self._start.get('epochs', '?')}",
            f"{_short(metrics.get('images_per_s'))} images/s",
            f"loss {_short(metrics.get('loss'))}",
            f"top-1 {_share(metrics.get('top1'))}"
            + (f" (val {self._accuracy})" if self._accuracy else ""),
            _bytes(event.get("memory_bytes")),
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=event.get("step"), text=self._fitting(parts))
            return
        if self._has_bar or self._clock() - self._shown < self._every:
            return
        self._shown = self._clock()
        self._say(
            f"step {event.get('step')}/{self._start.get('total_steps', '?')} "
            f" {'  '.join(parts)}{self._left()}"
        )

    def _fitting(self, parts: list[str]) -> str:
        """As many parts as fit beside the bar: rich would cut the times that stand after them."""
        steps = 2 * len(str(self._start.get("total_steps", ""))) + 1
        beside = (
            len(str(self._start.get("rule", ""))),
            _bar_width(self._console),
            steps,
            *2 * [len("00:00:00")],
        )
        room = self._console.width - sum(beside) - len(beside)
        while parts and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)

    def _left(self) -> str:
        """Time to the end at the speed since the first batch of this start; a bar knows by
        itself.
        """
        done, seconds = (
            self._newest.get("step", 0) - self._start.get("step", 0),
            self._newest["time"] - self._start.get("time", 0),
        )
        if not self._start.get("total_steps") or done <= 0:
            return ""
        minutes, rest = divmod(
            int((self._start["total_steps"] - self._newest["step"]) * seconds / done), 60
        )
        return f"  {minutes // 60}:{minutes % 60:02d}:{rest:02d} left"

    def _say(self, line: str, *, label: str = "", whole: Sequence[str] = ()) -> None:
        """Above the bar, where there is one."""
        say(self._console, line, label=f"{self._prefix}{label}", whole=whole)


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


def _batch(event: Event) -> str:
    epoch = event.get("epoch")
    return f"batch {event.get('step')}" + ("" if epoch is None else f" (epoch {_from_one(epoch)})")


def _advice(event: Event) -> str:
    return f"; {event['advice']}" if event.get("advice") else ""


def _from_one(epoch: Any) -> Any:
    return epoch + 1 if isinstance(epoch, int) else "-"


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
        also: Callable[[list[Event]], None] = lambda events: None,
    ) -> None:
        self._console, self._also = console, also
        journal = folder / "journal.jsonl"
        end = journal.stat().st_size if journal.exists() else 0
        self._follower = Follower(journal, offset=end)
        self._watch = Watch(
            console, run_dir=folder, store=store, resume_command=resume_command, name=name
        )
        self._is_blind = self._is_broken = False

    def look(self) -> None:
        """Show what has come to the journal since the last call."""
        try:
            events = self._follower.poll()
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
            self._watch.show(events)
            self._also(events)
        except Exception as error:  # a mistake in what is shown must not cost a training
            self._is_broken = True
            why = f"{type(error).__name__}: {error}"
            text = f"shown no more ({why}): training goes on, and its journal has everything"
            say(self._console, text)

    def close(self) -> None:
        self.look()
        self._watch.close()

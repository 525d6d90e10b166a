"""The progress display of a run: a bar that names the phase on a terminal, else plain lines."""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

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

from pipeline.core.code_version import NOT_INSTALLED
from pipeline.core.printing import say
from pipeline.core.run_folder import RunFolder
from pipeline.core.units import counted, format_quantity
from pipeline.measure.energy import describe_inference
from pipeline.track import events
from pipeline.track.events import Event, from_dict
from pipeline.track.journal import Follower, Record
from pipeline.track.mlflow_store import without_password

_TASK = TaskID(0)  # the only task of the bar
_PHASES: dict[type[Event], str] = {  # the phase that begins with an event
    events.Start: "compile readers",
    events.FirstBatch: "warm up",
    events.Evaluating: "evaluate",
    events.Evaluation: "save",
    events.Waiting: "wait",
    events.Hung: "restart workers",
    events.Died: "restart workers",
    events.Failed: "failed",
    events.Diverged: "diverged",
    events.Stopped: "stopped",
    events.Finish: "finished",
}


class ProgressDisplay:
    """Shows the events of a run's journal while the run trains.

    It first prints the run's folder, the MLflow store and the command that resumes the run. It
    shows only events that are written after its creation. Its errors do not end the training.

    Args:
        mlflow_uri: the URI of the MLflow store.
        name: prefix of each line, for several runs that are shown at once. With a name there is no
            bar.
        on_events: called with the new events after they were shown.
        interval_s: seconds between lines about steps if there is no bar.
        clock: measures these seconds.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        mlflow_uri: str,
        resume_command: str = "",
        name: str = "",
        on_events: Callable[[list[Record]], None] = lambda events: None,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._on_events = console, on_events
        journal = RunFolder(folder).journal
        end = journal.stat().st_size if journal.exists() else 0
        self._follower = Follower(journal, offset=end)
        self._has_read_error = self._has_stopped = False
        self._prefix = f"{name}  " if name else ""
        self._interval_s, self._clock = interval_s, clock
        self._last_line_at = float("-inf")  # time of the last plain line about steps
        self._bar_width = 20 if console.width >= 120 else 6
        self._bar: Progress | None = None
        if console.is_terminal and not name:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=self._bar_width),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                refresh_per_second=4,
            )
            self._bar.add_task("start workers", total=None, text="")
            self._bar.start()
        self._start: events.Start | None = None
        # Step and time at which the attempt started, or at which its first batch ended.
        self._first_step, self._first_time = 0, 0.0
        self._accuracy = ""  # top-1 of the last evaluation
        self._print(f"run     {folder}")
        self._print(f"mlflow  {without_password(mlflow_uri)}")
        if resume_command:
            self._print(f"resume  {resume_command}", whole=[resume_command])
        self._print("waiting for the workers, which import torch and build the network")

    def update(self) -> None:
        """Show the events that were written to the journal since the last call."""
        try:
            new = self._follower.poll()
        except OSError as error:  # the storage does not answer for a moment
            if not self._has_read_error:
                say(
                    self._console,
                    f"the journal cannot be read ({error.strerror or error}): training continues,"
                    " and reading is tried again",
                )
            self._has_read_error = True
            return
        self._has_read_error = False
        if self._has_stopped:
            return
        try:
            self.show([from_dict(event) for event in new])
            self._on_events(new)
        except Exception as error:  # an error in the display must not end a training
            self._has_stopped = True
            say(
                self._console,
                f"the progress display has stopped ({type(error).__name__}: {error}): training"
                " continues, and its journal has all events",
            )

    def close(self) -> None:
        self.update()
        if self._bar is not None:
            self._bar.stop()

    def show(self, new: Iterable[Event]) -> None:
        """Show new events of the journal, in order. Of consecutive steps only the last is shown."""
        for is_step, group in groupby(new, lambda event: isinstance(event, events.Step)):
            if is_step:
                *_, step = group
                self._show_step(cast("events.Step", step))
                continue
            for event in group:
                self._update_state(event)
                if self._bar is not None and isinstance(event, events.Checkpoint):
                    continue  # lines about checkpoints are for logs only
                for line in _lines(event, self._start):
                    self._print(line)

    def _update_state(self, event: Event) -> None:
        if isinstance(event, (events.Start, events.FirstBatch)):
            self._first_step, self._first_time = event.step, event.time
        if isinstance(event, events.Start):
            self._start = event
        if type(event) in _PHASES:
            self._show_phase(_PHASES[type(event)])
        if isinstance(event, events.Evaluation):
            self._accuracy = _percent(event.metrics["top1"]) if "top1" in event.metrics else ""
        elif isinstance(event, events.Start):
            if self._bar is not None:
                self._bar.reset(_TASK, total=event.total_steps, completed=event.step, text="")
        elif isinstance(event, events.Finish) and self._bar is not None and self._start is not None:
            self._bar.update(_TASK, completed=self._start.total_steps)

    def _show_phase(self, phase: str) -> str:
        """Name the phase in the bar, after the rule. Returns the text."""
        text = phase if self._start is None else f"{self._start.rule}  {phase}"
        if self._bar is not None:
            self._bar.update(_TASK, description=text)
        return text

    def _show_step(self, event: events.Step) -> None:
        metrics, start = event.metrics, self._start
        epochs, total = ("?", "?") if start is None else (start.epochs, start.total_steps)
        parts = [
            f"{_short(metrics.get('images_per_s'))} images/s",
            f"loss {_short(metrics.get('loss'))}",
            f"top-1 {_percent(metrics.get('top1'))}"
            + (f" (val {self._accuracy})" if self._accuracy else ""),
            _quantity(event.memory_bytes, "B"),
        ]
        if self._bar is not None and start is not None:
            # Show as many parts as fit. If the line were too long, rich would cut the times.
            columns = (
                "00:00:00",
                "00:00:00",
                self._show_phase(f"epoch {event.epoch + 1} of {epochs}"),
                "-" * self._bar_width,
                f"{total}/{total}",
            )
            room = self._console.width - len(" ".join(columns)) - 1
            while parts and len("  ".join(parts)) > room:
                parts.pop()
            self._bar.update(_TASK, completed=event.step, text="  ".join(parts))
        elif self._bar is None and self._clock() - self._last_line_at >= self._interval_s:
            self._last_line_at = self._clock()
            # The remaining time, at the mean speed of this attempt.
            done, seconds = event.step - self._first_step, event.time - self._first_time
            if start is not None and done > 0:
                left_s = int((start.total_steps - event.step) * seconds / done)
                parts.append(f"{timedelta(seconds=left_s)} left")
            epoch = f"epoch {event.epoch + 1}/{epochs}"
            self._print("  ".join((f"step {event.step}/{total}", epoch, *parts)))

    def _print(self, line: str, *, whole: Sequence[str] = ()) -> None:
        """Print a line, which is wrapped beside its label, such as `start   `."""
        text = re.sub(r"^\w+ {2,}", "", line)
        label = line.removesuffix(text)
        say(self._console, text, label=f"{self._prefix}{label}", whole=whole)


# ------------------------------------------------------------------------------ lines of events


def _lines(event: Event, start: events.Start | None) -> list[str]:
    if isinstance(event, events.Finish):
        return _finish_lines(event, on_gpu=start is not None and _has_gpu(start))
    text = _FORMATTERS[type(event)](event) if type(event) in _FORMATTERS else []
    return [text] if isinstance(text, str) else text


def _start_lines(event: events.Start) -> list[str]:
    lines: list[str] = []
    if _has_gpu(event):
        lines.append(
            f"cores   {event.hardware.get('threads')} for each GPU, {event.loader_threads} loader"
            " threads (--cpus-per-worker, --loader-threads)"
        )
    done, total, workers = event.step, event.total_steps, counted(event.world_size, "worker")
    if event.attempt:
        lines.append(f"start {event.attempt + 1}: continues at step {done}/{total} on {workers}")
    else:
        lines.append(
            f"start   {event.rule} on {workers}, {counted(total, 'step')} of"
            f" {counted(event.batch_size, 'sample')}, study {event.study[:8]}, commit"
            f" {event.commit}"
        )
    if event.versions.get("ffcv") == NOT_INSTALLED:
        lines.append("FFCV is not installed: Pillow decodes images, which is slower")
    emulates_bf16 = "AVX2" in str(event.hardware.get("instructions"))
    if event.precision == "bf16" and emulates_bf16 and not _has_gpu(event):
        lines.append(
            "bf16 is slow here: without AVX-512 torch emulates it, and a convolution takes"
        )
        lines.append("30 to 40 times as long as in fp32 (--set precision=fp32)")
    if done != total:
        lines.append(
            "waiting for the first batch; a machine's first start compiles the data loader"
        )
    return lines


def _evaluation_lines(event: events.Evaluation) -> list[str]:
    metrics = event.metrics
    formats = {
        "top1": ("top-1", _percent),
        "top5": ("top-5", _percent),
        "loss": ("loss", _short),
        "firing_rate": ("firing rate", _short),
        "bwt": ("BWT", _percent),
    }
    parts = [
        f"{name} {format_(metrics[key])}"
        for key, (name, format_) in formats.items()
        if key in metrics
    ]
    tasks = [
        f"{key.removeprefix('top1_')} {_percent(top1)}"
        for key, top1 in metrics.items()
        if key.startswith("top1_")
    ]
    lines = [f"evaluation after step {event.step} (epoch {event.epoch + 1}): {', '.join(parts)}"]
    return [*lines, f"each task: {', '.join(tasks)}"] if len(tasks) > 1 else lines


def _finish_lines(event: events.Finish, *, on_gpu: bool) -> list[str]:
    summary = event.summary
    text = f"finished: {counted(event.step, 'step')} in {_short(summary.get('wall_s'))} s"
    for name, key in (("top-1", "top1"), ("BWT", "bwt")):
        if summary.get(key) is not None:
            text += f", {name} {_percent(summary[key])}"
    if rollbacks := summary.get("rollbacks"):
        text += f"; it went back to a checkpoint {counted(rollbacks, 'time')}"
    if inference := summary.get("inference"):
        return [describe_inference(inference, on_gpu=on_gpu), text]
    return [text]


def _has_gpu(start: events.Start) -> bool:
    return start.hardware.get("gpu", "none") != "none"


def _batch(event: events.Skipped | events.Rollback) -> str:
    return f"batch {event.step} (epoch {event.epoch + 1})"


def _advice(event: events.Skipped | events.Rollback) -> str:
    return f"; {event.advice}" if event.advice else ""


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _quantity(value: float | None, kind: str) -> str:
    return "-" if value is None else format_quantity(value, kind=kind)


_percent = partial(_quantity, kind="share")

_FORMATTERS: dict[type[Event], Callable[[Any], str | list[str]]] = {
    events.Start: _start_lines,
    events.Evaluation: _evaluation_lines,
    events.Straggler: lambda event: [
        f"worker {rank} on {worker['host']} takes {worker['times']:.1f} times as long as the median"
        for rank, worker in event.workers.items()
    ],
    events.FirstBatch: lambda event: (
        f"started after {_short(event.startup_s)} s: imports, compilation and the first batch are"
        " done"
    ),
    events.Phase: lambda event: (
        f"phase {event.phase + 1}/{event.of}, {event.name}: from step {event.step},"
        f" {counted(event.steps, 'step')}{'' if event.head is None else f', head {event.head}'}"
    ),
    events.Checkpoint: lambda event: (
        f"checkpoint at step {event.step}: {_quantity(event.bytes, 'B')} in"
        f" {_short(event.write_s)} s, training was stopped for {_short(event.stall_s)} s"
    ),
    events.Quarantine: lambda event: f"quarantined {event.path}: {event.reason}",
    events.Unwritten: lambda event: f"{event.error}; another checkpoint follows at once",
    events.Waiting: lambda event: (
        f"waiting for {event.what}, for up to {_short(event.most_s)} s"
        f"{f': {event.error}' if event.error else ''}"
    ),
    events.Undeleted: lambda event: (
        f"checkpoint at step {event.step} is complete; an older checkpoint could not be deleted:"
        f" {event.error}"
    ),
    events.Skipped: lambda event: (
        f"skipped {_batch(event)} of {counted(event.samples, 'sample')}:"
        f" {event.reason}{_advice(event)}"
    ),
    events.Rollback: lambda event: (
        f"{_batch(event)}: {event.reason}; the run goes back to step {event.to}{_advice(event)}"
    ),
    events.Preempted: lambda event: (
        f"{counted(len(event.machines), 'machine')} will be preempted"
        f" {'soon' if event.seconds_left is None else f'in {event.seconds_left:.0f} s'}:"
        f" saving a checkpoint at step {event.step}"
    ),
    events.Stopped: lambda event: f"stopped after step {event.step}: {event.reason}",
    events.Failed: lambda event: f"failed: {event.error}",
    events.Diverged: lambda event: f"diverged: {event.error}",
    events.Hung: lambda event: (
        f"worker {event.worker} hung and was ended: the stacks of its threads are in {event.stacks}"
    ),
    events.Died: lambda event: f"worker {event.worker} ended: {event.error}",
    events.DataWait: lambda event: (
        f"training waits for data {_percent(event.share)} of the time: raise --loader-threads"
        f" (now {event.loader_threads}) and --cpus-per-worker"
    ),
    events.Smaller: lambda event: (
        f"out of memory: a micro-batch has at most {counted(event.micro_batch, 'sample')} from now"
        " on"
    ),
}

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.core.printing import NO_WIDTH
from pipeline.launch.progress import ProgressDisplay
from tests.helpers.events import typed

START = {
    "event": "start",
    "time": 1000.0,
    "attempt": 0,
    "rule": "SLTT",
    "study": "0123456789abcdef",
    "commit": "abc",
    "world_size": 2,
    "step": 0,
    "total_steps": 100,
    "epochs": 4,
    "batch_size": 64,
}


STANDING_BY = "waiting for the workers, which import torch and build the network"
BEGUN = "start   SLTT on 2 workers, 100 steps of 64 samples, study 01234567, commit abc"
WAITING = "waiting for the first batch; a machine's first start compiles the data loader"


def step(number: int, **metrics: Any) -> dict[str, Any]:
    return {
        "event": "step",
        "time": 1000.0 + number,
        "attempt": 0,
        "step": number,
        "epoch": 1,
        "metrics": {"loss": 1.2345, "top1": 0.25, "images_per_s": 12345.6, **metrics},
        "memory_bytes": 3.2e8,
    }


def watch(
    *, terminal: bool = False, width: int = 60
) -> tuple[ProgressDisplay, io.StringIO, list[float]]:
    out, clock = io.StringIO(), [0.0]
    return (
        ProgressDisplay(
            Path("/runs/[b]a"),
            Console(file=out, force_terminal=terminal, width=width if terminal else NO_WIDTH),
            mlflow_uri="sqlite:////runs/mlflow.db",
            resume_command=(
                "spiketrain resume a-run-with-a-name --runs /a/long/path/to/the/runs/of/somebody"
            ),
            clock=lambda: clock[0],
        ),
        out,
        clock,
    )


def show(view: ProgressDisplay, records: list[dict[str, Any]]) -> None:
    view.show([typed(record) for record in records])


def test_what_can_be_copied_is_printed_at_once_and_whole():
    _, out, _ = watch()
    assert out.getvalue().splitlines() == [
        "run     /runs/[b]a",
        "mlflow  sqlite:////runs/mlflow.db",
        "resume  spiketrain resume a-run-with-a-name --runs /a/long/path/to/the/runs/of/somebody",
        STANDING_BY,
    ]


def test_plain_lines_come_every_ten_seconds():
    view, out, clock = watch()
    out.truncate(0)
    show(view, [START])
    for number in range(1, 26):
        clock[0] = float(number)
        show(view, [step(number)])
    lines = out.getvalue().lstrip("\0").splitlines()
    assert lines[:2] == [BEGUN, WAITING]
    assert [line.split()[1] for line in lines[2:]] == ["1/100", "11/100", "21/100"]
    assert (
        lines[2]
        == "step 1/100  epoch 2/4  12,346 images/s  loss 1.23  top-1 25.00%  320 MB  0:01:39 left"
    )
    assert not any("\x1b" in line for line in lines)


@pytest.mark.parametrize(
    ("precision", "instructions", "gpu", "is_told"),
    [
        ("bf16", "AVX2", "none", True),
        ("bf16", "AVX2 (1 of 2 workers) + AVX512 (1 of 2 workers)", "none", True),
        ("bf16", "AVX512", "none", False),
        ("bf16", "AVX2", "an H100", False),
        ("fp32", "AVX2", "none", False),
    ],
)
def test_processors_that_emulate_bf16_are_told_of(precision, instructions, gpu, is_told):
    view, out, _ = watch()
    out.truncate(0)
    hardware = {"instructions": instructions, "gpu": gpu, "threads": 1}
    show(view, [{**START, "precision": precision, "hardware": hardware}])
    told = [line for line in out.getvalue().splitlines() if "bf16" in line or "fp32" in line]
    assert [len(line) <= 80 for line in told] == [True, True] * is_told


def test_everything_else_is_a_line_of_its_own_at_once():
    view, out, clock = watch()
    show(view, [START, step(10)])
    out.truncate(0)
    clock[0] = 1.0
    show(
        view,
        [
            {
                "event": "evaluation",
                "step": 10,
                "epoch": 0,
                "metrics": {"top1": 0.5, "top5": 1, "loss": math.nan, "firing_rate": 0.1},
            },
            {
                "event": "checkpoint",
                "step": 10,
                "path": "x",
                "stall_s": 0.01,
                "write_s": 0.25,
                "bytes": 12_300_000,
            },
            {
                "event": "quarantine",
                "path": "checkpoints/step_00000008",
                "reason": "sha256 of [trainer.json] differs",
            },
            {
                "event": "unwritten",
                "step": 9,
                "error": "checkpoint after step 9 was not written: Input/output error",
            },
            {"event": "waiting", "what": "resources for 2 workers", "most_s": 3600.0},
            {
                "event": "waiting",
                "what": "storage",
                "error": "[Errno 116] Stale file handle",
                "most_s": 600.0,
            },
            {"event": "undeleted", "step": 10, "error": "PermissionError: Access Denied"},
            {"event": "preempted", "step": 11, "machines": ["a", "b"], "seconds_left": 59.6},
            {"event": "preempted", "step": 12, "machines": ["a"], "seconds_left": None},
            {"event": "skipped", "step": 7, "reason": "loss is nan", "samples": 64, "epoch": 1},
            {
                "event": "skipped",
                "step": 7,
                "epoch": 0,
                "reason": "its loss is nan",
                "samples": 64,
                "advice": "lower it",
            },
            {
                "event": "rollback",
                "step": 8,
                "epoch": 0,
                "reason": "its loss is nan",
                "to": 6,
                "advice": "lower it",
            },
            {"event": "failed", "error": "RuntimeError: worker died"},
            {"event": "hung", "worker": 1, "stacks": "stacks/rank1-20260105-120000.txt"},
            {"event": "died", "worker": 1, "error": "KeyError: 'cable'"},
            {**START, "attempt": 1, "step": 8, "world_size": 1},
            {"event": "stopped", "step": 12, "reason": "asked to stop"},
            {"event": "finish", "step": 100, "steps": 100, "wall_s": 34.5, "top1": 0.61},
        ],
    )
    assert out.getvalue().lstrip("\0").splitlines() == [
        (
            "evaluation after step 10 (epoch 1): top-1 50.00%, top-5 100.00%, loss nan, firing"
            " rate 0.1"
        ),
        "checkpoint at step 10: 12.3 MB in 0.25 s, training was stopped for 0.01 s",
        "quarantined checkpoints/step_00000008: sha256 of [trainer.json] differs",
        "checkpoint after step 9 was not written: Input/output error; another checkpoint"
        " follows at once",
        "waiting for resources for 2 workers, for up to 3,600 s",
        "waiting for storage, for up to 600 s: [Errno 116] Stale file handle",
        (
            "checkpoint at step 10 is complete; an older checkpoint could not be deleted:"
            " PermissionError:"
            " Access Denied"
        ),
        "2 machines will be preempted in 60 s: saving a checkpoint at step 11",
        "1 machine will be preempted soon: saving a checkpoint at step 12",
        "skipped batch 7 (epoch 2) of 64 samples: loss is nan",
        "skipped batch 7 (epoch 1) of 64 samples: its loss is nan; lower it",
        "batch 8 (epoch 1): its loss is nan; the run goes back to step 6; lower it",
        "failed: RuntimeError: worker died",
        (
            "worker 1 hung and was ended: the stacks of its threads are in"
            " stacks/rank1-20260105-120000.txt"
        ),
        "worker 1 ended: KeyError: 'cable'",
        "start 2: continues at step 8/100 on 1 worker",
        WAITING,
        "stopped after step 12: asked to stop",
        "finished: 100 steps in 34.5 s, top-1 61.00%",
    ]
    clock[0] = 20.0
    show(view, [step(13)])
    assert "top-1 25.00% (val 50.00%)" in out.getvalue()


def test_a_terminal_gets_a_bar_and_lines_above_it():
    view, out, _ = watch(terminal=True, width=200)
    show(view, [START, step(25)])
    assert view._bar is not None
    task = view._bar.tasks[0]
    assert (task.completed, task.total) == (25, 100)
    assert task.fields["text"] == "12,346 images/s  loss 1.23  top-1 25.00%  320 MB"
    show(view, [{**START, "attempt": 1, "step": 20}])
    assert (task.completed, task.total) == (20, 100)
    show(
        view,
        [
            {
                "event": "checkpoint",
                "step": 20,
                "path": "x",
                "stall_s": 0.01,
                "write_s": 0.25,
                "bytes": 1,
            },
            {"event": "evaluation", "step": 20, "epoch": 0, "metrics": {"top1": 0.5}},
            {"event": "finish", "step": 100, "wall_s": 1.0, "top1": 0.5},
        ],
    )
    assert task.completed == 100
    view.close()
    view.close()
    text = out.getvalue()
    assert "evaluation after step 20 (epoch 1): top-1 50.00%" in text
    assert "checkpoint" not in text and "step 25/100" not in text
    assert "\x1b[?25h" in text  # the cursor is given back


@pytest.mark.parametrize(
    ("width", "told"), [(60, "epoch 2 of 4"), (80, "12,346 images/s"), (120, "320 MB")]
)
def test_a_narrow_terminal_shows_what_it_has_room_for_and_cuts_nothing(width: int, told: str):
    view, out, _ = watch(terminal=True, width=width)
    show(view, [{**START, "rule": "SLTT-1", "total_steps": 14_070}, step(25)])
    assert view._bar is not None
    view._bar.refresh()
    view.close()
    assert told in out.getvalue() and "…" not in out.getvalue()


def test_the_bar_names_the_phase() -> None:
    view, _, _ = watch(terminal=True)
    assert view._bar is not None
    task, phases = view._bar.tasks[0], []
    for record in (
        None,
        START,
        {"event": "first_batch", "time": 1030.0, "step": 1, "startup_s": 42.0},
        step(25),
        {"event": "evaluating", "step": 25},
        {"event": "evaluation", "step": 25, "epoch": 0, "metrics": {"top1": 0.5}},
        step(26),
        {"event": "waiting", "what": "storage", "most_s": 600.0},
        step(27),
        {"event": "died", "worker": 1, "error": "KeyError: 'cable'"},
        {"event": "failed", "error": "RuntimeError: worker died"},
        {**START, "attempt": 1, "step": 20},
        {"event": "stopped", "step": 20, "reason": "asked to stop"},
        {"event": "finish", "step": 100, "wall_s": 1.0, "top1": 0.5},
    ):
        show(view, [] if record is None else [record])
        phases.append(task.description)
    view.close()
    assert phases == [
        "start workers",
        *(
            f"SLTT  {phase}"
            for phase in (
                "compile readers",
                "warm up",
                "epoch 2 of 4",
                "evaluate",
                "save",
                "epoch 2 of 4",
                "wait",
                "epoch 2 of 4",
                "restart workers",
                "failed",
                "compile readers",
                "stopped",
                "finished",
            )
        ),
    ]


def test_closing_before_anything_happened():
    view, _, _ = watch(terminal=True)
    view.close()


FINISH = {"event": "finish", "step": 8, "steps": 8, "wall_s": 17.6, "top1": 0.3333}
FINISHED = "finished: 8 steps in 17.6 s, top-1 33.33%"


def inference(gpu: str, **measured: float) -> list[dict[str, Any]]:
    return [
        {**START, "hardware": {"gpu": gpu}},
        {**FINISH, "inference": {"energy_j": 1.43e-5, "prices": "45 nm, fp32", **measured}},
    ]


ENERGY = "an inference: 14.3 µJ estimated (45 nm, fp32), "


@pytest.mark.parametrize(
    ("records", "lines"),
    [
        # Of many steps at once the newest is drawn.
        (
            [START, *(step(number) for number in range(1, 50))],
            [
                WAITING,
                "step 49/100  epoch 2/4  12,346 images/s  loss 1.23  top-1 25.00%  320 MB  0:00:51"
                " left",
            ],
        ),
        # Values may be infinite, NaN or missing.
        (
            [START, step(1, loss=math.nan, top1=None, images_per_s=math.inf)],
            [
                WAITING,
                "step 1/100  epoch 2/4  inf images/s  loss nan  top-1 -  320 MB  0:01:39 left",
            ],
        ),
        (
            [
                START,
                {"event": "step", "time": 1002.0, "attempt": 0, "step": 2},
                {"event": "finish"},
            ],
            [
                WAITING,
                "step 2/100  epoch 1/4  - images/s  loss -  top-1 -  -  0:01:38 left",
                "finished: 0 steps in - s",
            ],
        ),
        # What a worker with a GPU gets is said.
        (
            [{**START, "hardware": {"gpu": "H100", "threads": 8}, "loader_threads": 6}],
            [
                "cores   8 for each GPU, 6 loader threads (--cpus-per-worker, --loader-threads)",
                BEGUN,
                WAITING,
            ],
        ),
        (
            [{**START, "hardware": {"gpu": "none", "threads": 8}, "loader_threads": 6}],
            [STANDING_BY, BEGUN, WAITING],
        ),
        # The time that is left has no start-up in it.
        (
            [
                START,
                {"event": "first_batch", "time": 1030.0, "step": 1, "startup_s": 42.0},
                {**step(11), "time": 1040.0},
            ],
            [
                "started after 42 s: imports, compilation and the first batch are done",
                "step 11/100  epoch 2/4  12,346 images/s  loss 1.23  top-1 25.00%  320 MB  0:01:29"
                " left",
            ],
        ),
        # It counts from this start.
        (
            [{**START, "step": 50, "attempt": 1, "time": 1050.0}, step(60)],
            [
                "step 60/100  epoch 2/4  12,346 images/s  loss 1.23  top-1 25.00%  320 MB  0:00:40"
                " left"
            ],
        ),
        # A run of several tasks shows each of them.
        (
            [
                START,
                {
                    "event": "phase",
                    "step": 50,
                    "phase": 1,
                    "of": 2,
                    "name": "b",
                    "steps": 50,
                    "head": 1,
                },
                {
                    "event": "evaluation",
                    "step": 100,
                    "epoch": 1,
                    "metrics": {"top1": 0.8, "top1_a": 0.7, "top1_b": 0.9, "bwt": -0.125},
                },
                {**FINISH, "bwt": -0.125},
            ],
            [
                "phase 2/2, b: from step 50, 50 steps, head 1",
                "evaluation after step 100 (epoch 2): top-1 80.00%, BWT -12.50%",
                "each task: a 70.00%, b 90.00%",
                f"{FINISHED}, BWT -12.50%",
            ],
        ),
        # A run that went back to a checkpoint says so at its end.
        (
            [
                {**FINISH, "rollbacks": 2, "skipped_batches": 6},
                {**FINISH, "rollbacks": 1, "skipped_batches": 0},
            ],
            [
                f"{FINISHED}; it went back to a checkpoint 2 times",
                f"{FINISHED}; it went back to a checkpoint 1 time",
            ],
        ),
        # The energy of an inference stands beside what a card measured.
        (inference("none"), [f"{ENERGY}not measured on a CPU", FINISHED]),
        (
            inference("H100"),
            [f"{ENERGY}not measured: a card has no counter, or its counter did not move", FINISHED],
        ),
        (
            inference("H100", measured_j=2.1e-3),
            [
                f"{ENERGY}2.1 mJ measured on the whole card, idle power and waits for data"
                " included",
                FINISHED,
            ],
        ),
        (
            [START, {"event": "data_wait", "share": 0.345, "loader_threads": 1}],
            [
                "training waits for data 34.50% of the time: raise --loader-threads (now 1)"
                " and --cpus-per-worker"
            ],
        ),
    ],
)
def test_the_last_lines_of_these_events(records: list[dict[str, Any]], lines: list[str]) -> None:
    view, out, _ = watch()
    show(view, records)
    view.close()
    assert out.getvalue().splitlines()[-len(lines) :] == lines

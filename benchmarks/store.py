"""The cost of 500 runs for a reader: `compare`, `pipeline.results`, and the dashboard's list.

Command:  python -m benchmarks.store --like runs/fashion-sltt-tiny-20260105-120000
Result:   500 runs in 10 studies, commit 274fb5fb5517, 2 cores of an AMD EPYC beside other programs
          (load 1.5 to 1.9): the dashboard's list after 0.46 s (0.31 to 2.78), in the first page
          0.41 s; results 0.36 s from the folder, 0.18 s from SQLite, 4.64 s from the server;
          `compare` adds 0.77 to 1.02 s to the 0.7 s of its imports.

`--like` is the folder of a finished run that stands alone, short for choice. It is copied 500
times, as 10 studies of 5 rules with 10 seeds each (or `--studies 1`: one of 5 rules with 100
seeds), and delivered to an SQLite store. Then each journal is lengthened to `--steps` step events,
as those of long runs are. What `compare` adds is the time of the command less that of a process
which imports what it imports and prints its help: medians of five pairs. `results` are medians of
five calls in this process, after imports. The list of the dashboard is timed in new pages of
Chromium, from the request to the first row: a first page, and the median of five more.

Exits with 1 where `compare` adds more than 2 s, results take more than 1 s from the folder or
SQLite or 4 s through the server, or the list takes more than 1 s.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Browser

import pipeline
from pipeline.core.code_version import commit
from pipeline.measure.memory import device_here, hardware
from pipeline.report.stores import open_store, studies
from pipeline.track.journal import read
from pipeline.track.mlflow import sync
from tests.helpers.browser import chromium

RUNS = 500
RULES = ("BPTT", "SLTT", "SLTT-1", "OTTT-A", "OPZO")
TIMES = 5
ADDED_S, LIST_S = 2.0, 1.0
RESULTS_S = {"folder": 1.0, "SQLite": 1.0, "server": 4.0}
HELP = (
    "import sys; import pandas, pipeline.report.compare, pipeline.report.suite; from"
    " pipeline.__main__ import main; sys.argv = ['spiketrain', 'compare', '--help']; main()"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        uri = f"sqlite:///{runs / 'mlflow.db'}"
        keys = [f"{index:016x}" for index in range(arguments.studies)]
        for index, (key, rule, seed) in enumerate(
            product(keys, RULES, range(RUNS // arguments.studies // len(RULES)))
        ):
            copy = copied(
                arguments.like, runs / f"run-{index:03d}", study=key, rule=rule, seed=seed
            )
            sync(copy, uri=uri)
            lengthened(copy / "journal.jsonl", arguments.steps)
        sys.exit(not report(runs, uri, keys))


def copied(like: Path, folder: Path, *, study: str, rule: str, seed: int) -> Path:
    """A run's folder under another name."""
    folder.mkdir()
    about = {
        "run": folder.name,
        "run_id": uuid.uuid4().hex,
        "study": study,
        "rule": rule,
        "seed": seed,
    }
    recipe = json.loads((like / "recipe.json").read_text())
    # A rule's label belongs to one rule: a part of its name, where `compare` looks for that.
    recipe["recipe"] |= {
        "name": folder.name,
        "seed": seed,
        "rule": {"target": f"pipeline.rules.{rule}", "kwargs": {}},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
    (folder / "summary.json").write_text(
        json.dumps(json.loads((like / "summary.json").read_text()) | about, indent=1)
    )
    (folder / "activity.json").write_text((like / "activity.json").read_text())
    events = read(like / "journal.jsonl")
    for event in events:
        if event["event"] == "start":
            event |= about
        elif event["event"] == "finish":
            event["summary"] |= about
    _write(folder / "journal.jsonl", events)
    return folder


def lengthened(journal: Path, steps: int) -> None:
    """With as many step events as a long run has, between the start and the rest."""
    events = read(journal)
    step = next(event for event in events if event["event"] == "step")
    _write(journal, [events[0], *({**step, "step": index} for index in range(steps)), *events[1:]])


def report(runs: Path, uri: str, keys: Sequence[str]) -> bool:
    """Print all that was measured; returns whether it is within its limits."""
    limited: list[float] = []
    journals, store = (
        sum(file.stat().st_size for file in runs.glob("*/journal.jsonl")),
        (runs / "mlflow.db").stat().st_size,
    )
    print(
        f"{RUNS} runs, {len(keys)} studies, journals {journals / 1e6:.0f} MB, store"
        f" {store / 1e6:.0f} MB"
    )
    base = [sys.executable, "-c", HELP]
    fifty = [f"run-{index:03d}" for index in range(50)]
    for what, names in (("compare", []), ("compare STUDY", [keys[0]]), ("compare 50 RUNS", fifty)):
        command = [sys.executable, "-m", "pipeline", "compare", *names, "--runs", str(runs)]
        pairs = [
            (_seconds(base), _seconds(command)) for _ in range(TIMES)
        ]  # in turn, as other work comes and goes
        bare, whole = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
        adds = statistics.median(after - before for before, after in pairs)
        print(f"{what}: {whole:.2f} s, its imports and --help {bare:.2f} s: it adds {adds:.2f} s")
        limited.append(adds)
    listed = _median_of(lambda: studies(open_store(uri).runs()))
    print(f"store: list of studies, with all runs and their metrics, {listed:.3f} s")
    with served(uri) as address:
        sources = {"folder": str(runs), "SQLite": uri, "server": address}
        took = {
            name: _median_of(lambda source=source: pipeline.results(source))
            for name, source in sources.items()
        }
    print(
        "results:"
        f" {', '.join(f'{seconds:.2f} s from the {name}' for name, seconds in took.items())}"
    )
    first, *later = list_times(uri)
    listed_s = statistics.median(later)
    each = ", ".join(f"{seconds:.2f}" for seconds in later)
    print(f"dashboard: the list after {listed_s:.2f} s ({each}), in the first page {first:.2f} s")
    machine = hardware(device_here())
    print(f"(commit {commit()}, {machine['cpu']}, {machine['cores']} cores)")
    is_quick = all(took[name] <= most for name, most in RESULTS_S.items())
    return is_quick and max(limited) <= ADDED_S and listed_s <= LIST_S


@contextmanager
def served(uri: str) -> Iterator[str]:
    """The address of an MLflow server on a store."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            while not _answers(f"http://127.0.0.1:{port}/health"):
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def list_times(uri: str) -> list[float]:
    """Seconds to the first row of the list in each of several pages; before the first one, the
    server has read nothing.
    """
    command = [sys.executable, "-m", "pipeline", "dashboard", "--store", uri, "--port", "0"]
    with (
        chromium() as browser,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdout is not None
        address = server.stdout.readline().split()[0]
        try:
            return [_list_time(browser, address) for _ in range(1 + TIMES)]
        finally:
            server.terminate()


def _list_time(browser: Browser, address: str) -> float:
    with closing(browser.new_page()) as page:
        began = time.perf_counter()
        page.goto(address)
        page.locator("#list li").first.wait_for()
        return time.perf_counter() - began


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _median_of(call: Callable[[], object]) -> float:
    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return statistics.median(seconds() for _ in range(TIMES))


def _write(journal: Path, events: Sequence[dict]) -> None:
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))


if __name__ == "__main__":
    main()

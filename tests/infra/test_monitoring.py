"""The board and the scrape configuration: every metric that they name is one that Ray or this package exposes."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.track.exposition import exposition

INFRA = Path(__file__).resolve().parents[2] / "infra"
BOARD = INFRA / "grafana" / "spiketrain.json"

# As ray 2.60.0 names them in its reporter; exported with `ray_` before them.
RAY = frozenset(
    "ray_" + name
    for name in (
        "node_cpu_utilization",  # percent
        "node_cpu_count",
        "node_mem_used",  # bytes
        "node_mem_total",
        "node_gpus_utilization",  # percent, one for each GpuIndex
        "node_gpus_available",
        "node_gram_used",  # megabytes
        "node_gram_available",
        "node_disk_utilization_percentage",
        "node_network_receive_speed",  # bytes per second
        "node_network_send_speed",
    )
)
_OPERATORS = {"and", "or", "unless"}


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - _OPERATORS


def ours() -> set[str]:
    """All that a run which has told everything exposes."""
    figures = ("loss", "top1", "images_per_s", "lr", "step_s", "data_wait_s", "firing_rate")
    events: list[dict[str, Any]] = [
        {"event": "start", "time": 1.0, "attempt": 0, "run": "r", "recipe": "r", "rule": "r", "world_size": 1, "total_steps": 2},
        {"event": "step", "time": 2.0, "step": 1, "metrics": dict.fromkeys(figures, 1.0), "memory_bytes": 1},
        {"event": "evaluation", "time": 3.0, "step": 1, "metrics": dict.fromkeys(figures, 1.0)},
        {"event": "checkpoint", "time": 4.0, "step": 1, "path": "p", "stall_s": 0.1, "write_s": 1.0, "bytes": 1},
    ]
    return set(re.findall(r"^# TYPE (\S+)", exposition(events), re.MULTILINE))


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_metrics_of_an_expression():
    found = metrics_in('sum(rate(a_b{run=~"$run"}[5m])) by (instance) / on(run) c:d == 1')

    assert found == {"a_b", "c:d"}


def test_every_expression_asks_for_a_metric_that_there_is(board: dict[str, Any]):
    asked = {name for expression in expressions(board) for name in metrics_in(expression)}
    asked |= {
        name for each in board["templating"]["list"][1:] for name in re.findall(r"label_values\((\w+),", each["definition"])
    }

    assert asked - ours() - RAY == set()
    assert len(expressions(board)) >= 18


def test_the_board_shows_what_an_operator_looks_for(board: dict[str, Any]):
    asked = {name for expression in expressions(board) for name in metrics_in(expression)}

    assert {"images_per_second", "loss", "data_wait_seconds", "memory_bytes", "restarts_total"} <= {
        name.removeprefix("spiketrain_") for name in asked
    }
    assert {"ray_node_cpu_utilization", "ray_node_gpus_utilization", "ray_node_mem_used", "ray_node_gram_used"} <= asked


def test_panels_are_in_their_places(board: dict[str, Any]):
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in board["panels"]]

    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    for panel in board["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${source}"


def test_names_of_ray_are_those_of_the_installed_one():
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    reporter = Path(spec.origin).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    gone = [name for name in RAY if f'"{name.removeprefix("ray_")}": Gauge(' not in reporter.read_text()]

    assert not gone, f"ray {version('ray')} has other names than 2.60.0"


def test_the_scrape_configuration():
    told = yaml.safe_load((INFRA / "prometheus" / "prometheus.yml").read_text())

    jobs = {job["job_name"]: job for job in told["scrape_configs"]}
    assert set(jobs) == {"ray", "spiketrain"}
    assert "/tmp/ray/prom_metrics_service_discovery.json" in jobs["ray"]["file_sd_configs"][0]["files"]
    for file in jobs["ray"]["file_sd_configs"][0]["files"]:
        assert re.fullmatch(r"(/[^*]+)*/[^/]+\.json", file), "Prometheus takes a * in the last part alone"
    assert jobs["spiketrain"]["params"] == {"collect[]": ["textfile"]}
    assert jobs["spiketrain"]["static_configs"] == [{"targets": ["localhost:9100"]}]

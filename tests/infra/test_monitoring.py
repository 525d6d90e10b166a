"""The board, the alerts and what is collected: every metric that they name is one that Ray or this
package exposes.
"""

import json
import re
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.track.exposition import STATES, exposition
from tests.infra.rules import LABEL, MONITORING, build, containers

INFRA = Path(__file__).resolve().parents[2] / "infra"
BOARD = INFRA / "grafana" / "spiketrain.json"
PROMETHEUS, K8S = INFRA / "prometheus", INFRA / "k8s"
ALERTS = Path(__file__).parent / "alerts.yml"

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
        {
            "event": "start",
            "time": 1.0,
            "attempt": 0,
            "run": "r",
            "recipe": "r",
            "rule": "r",
            "world_size": 1,
            "total_steps": 2,
        },
        {
            "event": "step",
            "time": 2.0,
            "step": 1,
            "metrics": dict.fromkeys(figures, 1.0),
            "memory_bytes": 1,
        },
        {"event": "evaluation", "time": 3.0, "step": 1, "metrics": dict.fromkeys(figures, 1.0)},
        {
            "event": "checkpoint",
            "time": 4.0,
            "step": 1,
            "path": "p",
            "stall_s": 0.1,
            "write_s": 1.0,
            "bytes": 1,
        },
    ]
    return set(re.findall(r"^# TYPE (\S+)", exposition(events), re.MULTILINE))


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads(BOARD.read_text())


def expressions(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_metrics_of_an_expression():
    expression = 'sum(rate(a_b{run=~"$run"}[5m])) by (instance) / on(run) c:d == 1'
    assert metrics_in(expression) == {"a_b", "c:d"}


def test_every_expression_asks_for_a_metric_that_there_is(board: dict[str, Any]):
    asked = {name for expression in expressions(board) for name in metrics_in(expression)}
    asked |= {
        name
        for each in board["templating"]["list"][1:]
        for name in re.findall(r"label_values\((\w+),", each["definition"])
    }

    assert asked - ours() - RAY == set()
    assert len(expressions(board)) >= 18


def test_the_board_shows_what_an_operator_looks_for(board: dict[str, Any]):
    asked = {name for expression in expressions(board) for name in metrics_in(expression)}

    assert {"images_per_second", "loss", "data_wait_seconds", "memory_bytes", "restarts_total"} <= {
        name.removeprefix("spiketrain_") for name in asked
    }
    assert {
        "ray_node_cpu_utilization",
        "ray_node_gpus_utilization",
        "ray_node_mem_used",
        "ray_node_gram_used",
    } <= asked


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
    gone = [
        name for name in RAY if f'"{name.removeprefix("ray_")}": Gauge(' not in reporter.read_text()
    ]

    assert not gone, f"ray {version('ray')} has other names than 2.60.0"


def test_the_scrape_configuration():
    told = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())

    jobs = {job["job_name"]: job for job in told["scrape_configs"]}
    assert set(jobs) == {"ray", "spiketrain"}
    assert told["rule_files"] == ["rules.yml"] and (PROMETHEUS / "rules.yml").is_file()
    assert (
        "/tmp/ray/prom_metrics_service_discovery.json" in jobs["ray"]["file_sd_configs"][0]["files"]
    )
    for file in jobs["ray"]["file_sd_configs"][0]["files"]:
        assert re.fullmatch(r"(/[^*]+)*/[^/]+\.json", file), (
            "Prometheus takes a * in the last part alone"
        )
    assert jobs["spiketrain"]["params"] == {"collect[]": ["textfile"]}
    assert jobs["spiketrain"]["static_configs"] == [{"targets": ["localhost:9100"]}]


# ------------------------------------------------------------------------------------------- alerts


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for group in yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_every_alert_asks_for_a_metric_that_there_is():
    asked = {name for rule in rules() for name in metrics_in(rule["expr"])}
    recorded = {rule["record"] for rule in rules() if "record" in rule}

    assert recorded <= asked <= recorded | ours() | {"up"}
    watched = ("state", "event_timestamp_seconds", "checkpoint_timestamp_seconds", "restarts_total")
    assert {f"spiketrain_{name}" for name in watched} <= asked
    told = {
        state
        for rule in rules()
        for each in re.findall(r'state=~?"([^"]+)"', rule["expr"])
        for state in each.split("|")
    }
    assert told == set(STATES) - {"finished"}


def test_every_alert_says_of_what_and_what_to_do():
    assert len(alerts()) + sum("record" in rule for rule in rules()) == len(rules())
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        assert re.match(r"\{\{ \$labels\.(run|instance) \}\} ", rule["annotations"]["summary"]), (
            name
        )
        assert rule["annotations"]["description"].endswith("."), name


def test_every_alert_is_tried():
    assert set(re.findall(r'alertname="(\w+)"', ALERTS.read_text())) == set(alerts())


@pytest.mark.parametrize(
    ("what", "file"),
    [(("test", "rules"), ALERTS), (("check", "config"), PROMETHEUS / "prometheus.yml")],
)
def test_prometheus_reads_it_and_alerts_when_it_is_due(what: tuple[str, str], file: Path):
    promtool = shutil.which("promtool")
    assert promtool, "this test needs promtool, which `infra/setup.sh --tools` installs"

    done = subprocess.run([promtool, *what, str(file)], capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------- Kubernetes


def test_indented_the_rules_are_the_spec_of_a_prometheusrule():
    """As the command in infra/README.md makes one."""
    command = (INFRA / "README.md").read_text()
    head = re.search(r"printf '(apiVersion: [^']*)'", command)
    assert head is not None and "sed 's/^/  /' infra/prometheus/rules.yml" in command

    indented = "".join(
        f"  {line}\n" for line in (PROMETHEUS / "rules.yml").read_text().splitlines()
    )
    made = yaml.safe_load(head[1].replace("\\n", "\n") + indented)
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load((PROMETHEUS / "rules.yml").read_text())


@pytest.mark.parametrize("folder", ["base/cluster", "base/job"])
def test_what_pods_tell_is_let_in_and_collected(folder: str):
    """Under the names that jobs have in prometheus.yml, which the alerts go by."""
    [policy] = [each for each in build(K8S / "shared") if each["kind"] == "NetworkPolicy"]
    [monitor] = build(K8S / "monitoring")
    [let_in] = [rule["ports"] for rule in policy["spec"]["ingress"] if rule["from"] == [MONITORING]]
    ports = [port for each in containers(build(K8S / folder)[0]) for port in each.get("ports", ())]
    told = {
        port["name"]: port["containerPort"] for port in ports if port["name"].startswith("metrics")
    }

    assert len(told) == 2 and {port["port"] for port in let_in} == set(told.values())
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"] == {"matchLabels": LABEL}
    collected = {
        each["port"]: each["relabelings"] for each in monitor["spec"]["podMetricsEndpoints"]
    }
    assert set(collected) == set(told)
    jobs = [
        job["job_name"]
        for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    ]
    assert sorted(collected.values(), key=str) == [
        [{"targetLabel": "job", "replacement": job}] for job in sorted(jobs)
    ]

"""The board, the alerts and what is collected: every metric that they name is one that Ray or this
package exposes.
"""

import json
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.track.prometheus import STATES, exposition
from tests.helpers.programs import program
from tests.infra.rules import build, containers

INFRA = Path(__file__).resolve().parents[2] / "infra"
PROMETHEUS, K8S = INFRA / "prometheus", INFRA / "k8s"
ALERTS = Path(__file__).parent / "alerts.yml"
BOARD: dict[str, Any] = json.loads((INFRA / "grafana" / "spiketrain.json").read_text())
CONFIGURATION = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
JOBS = {job["job_name"]: job for job in CONFIGURATION["scrape_configs"]}
RULES_TEXT = (PROMETHEUS / "rules.yml").read_text()
RULES = [rule for group in yaml.safe_load(RULES_TEXT)["groups"] for rule in group["rules"]]
ALERTED = {rule["alert"]: rule for rule in RULES if "alert" in rule}

# As ray 2.60.0 names them in its reporter; exported with `ray_` before them.
RAY = {
    *("node_cpu_utilization", "node_gpus_utilization"),  # percent, one for each GpuIndex
    *("node_cpu_count", "node_gpus_available", "node_disk_utilization_percentage"),
    *("node_mem_used", "node_mem_total"),  # bytes
    *("node_gram_used", "node_gram_available"),  # megabytes
    *("node_network_receive_speed", "node_network_send_speed"),  # bytes per second
}


def metrics_in(*expressions: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', "", "\n".join(expressions))
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)) - {"and", "or", "unless"}


def ours() -> set[str]:
    figures = ("loss", "top1", "images_per_s", "lr", "step_s", "data_wait_s", "firing_rate")
    metrics, about = dict.fromkeys(figures, 1.0), dict.fromkeys(("run", "recipe", "rule"), "r")
    saved = {"path": "p", "stall_s": 0.1, "write_s": 1.0, "bytes": 1}
    events: list[dict[str, Any]] = [
        {"event": "start", "time": 1.0, "attempt": 0, "world_size": 1, "total_steps": 2, **about},
        {"event": "step", "time": 2.0, "step": 1, "metrics": metrics, "memory_bytes": 1},
        {"event": "evaluation", "time": 3.0, "step": 1, "metrics": metrics},
        {"event": "checkpoint", "time": 4.0, "step": 1, **saved},
    ]
    return set(re.findall(r"^# TYPE (\S+)", exposition(events), re.MULTILINE))


def test_every_expression_of_the_board_asks_for_a_metric_that_there_is():
    targets = [target for panel in BOARD["panels"] for target in panel.get("targets", [])]
    assert len(targets) >= 18
    shown = metrics_in(*(target["expr"] for target in targets))
    named = re.findall(
        r"label_values\((\w+),",
        "\n".join(each["definition"] for each in BOARD["templating"]["list"][1:]),
    )
    assert {*shown, *named} <= ours() | {f"ray_{name}" for name in RAY}
    watched = ("images_per_second", "loss", "data_wait_seconds", "memory_bytes", "restarts_total")
    assert shown >= {f"spiketrain_{name}" for name in watched}
    machines = ("cpu_utilization", "gpus_utilization", "mem_used", "gram_used")
    assert shown >= {f"ray_node_{name}" for name in machines}


def test_panels_are_in_their_places():
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in BOARD["panels"]]
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    taken = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    for panel in BOARD["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${source}"


def test_names_of_ray_are_those_of_the_installed_one():
    ray = distribution("ray")
    reporter = Path(str(ray.locate_file("ray/dashboard/modules/reporter/reporter_agent.py")))
    text = reporter.read_text()
    assert not [name for name in RAY if f'"{name}": Gauge(' not in text], (
        f"ray {ray.version} has other names than 2.60.0"
    )


def test_the_scrape_configuration():
    assert set(JOBS) == {"ray", "spiketrain"} and CONFIGURATION["rule_files"] == ["rules.yml"]
    [discovered] = JOBS["ray"]["file_sd_configs"]
    assert "/tmp/ray/prom_metrics_service_discovery.json" in discovered["files"]
    # Prometheus takes a * in the last part alone.
    assert all(re.fullmatch(r"(/[^*]+)*/[^/]+\.json", file) for file in discovered["files"])
    assert JOBS["spiketrain"] == {
        "job_name": "spiketrain",
        "params": {"collect[]": ["textfile"]},
        "static_configs": [{"targets": ["localhost:9100"]}],
    }


def test_every_alert_asks_for_a_metric_that_there_is():
    asked = metrics_in(*(rule["expr"] for rule in RULES))
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    assert recorded <= asked <= recorded | ours() | {"up"}
    watched = ("state", "event_timestamp_seconds", "checkpoint_timestamp_seconds", "restarts_total")
    assert {f"spiketrain_{name}" for name in watched} <= asked
    states = re.findall(r'state=~?"([^"]+)"', "\n".join(rule["expr"] for rule in RULES))
    assert {state for each in states for state in each.split("|")} == set(STATES) - {"finished"}


def test_every_alert_is_tried_and_says_of_what_and_what_to_do():
    assert len(ALERTED) + sum("record" in rule for rule in RULES) == len(RULES)
    for name, rule in ALERTED.items():
        assert rule["labels"]["severity"] in ("critical", "warning", "info"), name
        says = rule["annotations"]
        assert re.match(r"\{\{ \$labels\.(run|instance) \}\} ", says["summary"]), name
        assert says["description"].endswith("."), name
    assert set(re.findall(r'alertname="(\w+)"', ALERTS.read_text())) == set(ALERTED)


@pytest.mark.parametrize(
    ("what", "file"),
    [(("test", "rules"), ALERTS), (("check", "config"), PROMETHEUS / "prometheus.yml")],
)
def test_prometheus_reads_it_and_alerts_when_it_is_due(what: tuple[str, str], file: Path):
    done = subprocess.run([program("promtool"), *what, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_indented_the_rules_are_the_spec_of_a_prometheusrule():
    """As the command in infra/README.md makes one."""
    command = (INFRA / "README.md").read_text()
    [head] = re.findall(r"printf '(apiVersion: [^']*)'", command)
    assert "sed 's/^/  /' infra/prometheus/rules.yml" in command
    made = yaml.safe_load(
        head.replace("\\n", "\n") + re.sub("^", "  ", RULES_TEXT, flags=re.MULTILINE)
    )
    assert (made["apiVersion"], made["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert made["spec"] == yaml.safe_load(RULES_TEXT)


@pytest.mark.parametrize("folder", ["base/cluster", "base/job"])
def test_what_pods_tell_is_let_in_and_collected(folder: str):
    """Under the names that jobs have in prometheus.yml, which the alerts go by."""
    [policy] = [each for each in build(K8S / "shared") if each["kind"] == "NetworkPolicy"]
    [monitor] = build(K8S / "monitoring")
    [let_in] = [
        rule["ports"]
        for rule in policy["spec"]["ingress"]
        if rule["from"][0]["podSelector"]["matchLabels"].get("app.kubernetes.io/name")
        == "prometheus"
    ]
    ports = [port for each in containers(build(K8S / folder)[0]) for port in each.get("ports", ())]
    told = {
        port["name"]: port["containerPort"] for port in ports if port["name"].startswith("metrics")
    }
    assert len(told) == 2 and {port["port"] for port in let_in} == set(told.values())
    assert (
        monitor["spec"]["selector"]
        == policy["spec"]["podSelector"]
        == {"matchLabels": {"app.kubernetes.io/part-of": "spiketrain"}}
    )
    endpoints = monitor["spec"]["podMetricsEndpoints"]
    assert {each["port"] for each in endpoints} == set(told)
    assert sorted((each["relabelings"] for each in endpoints), key=str) == [
        [{"targetLabel": "job", "replacement": job}] for job in sorted(JOBS)
    ]

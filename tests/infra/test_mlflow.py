"""The files of infra/mlflow, with neither a secret nor a stray version in them; and the server of
its compose.yaml, as it is told there, over a PostgreSQL of the test: no container, loopback alone.
"""

import json
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from pipeline.track.mlflow import sync
from pipeline.track.mlflow_store import TrackingError, connect
from tests.helpers.nodes import free_port
from tests.helpers.programs import program
from tests.helpers.waiting import until
from tests.track.conftest import FakeRun, fake_run, steps

__all__ = ["fake_run"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    name: (ROOT / "infra" / "mlflow" / name).read_text()
    for name in ("compose.yaml", "kubernetes.yaml", "auth.ini", ".env.example")
}
COMPOSE = yaml.safe_load(TEXTS["compose.yaml"])
SERVICES = COMPOSE["services"]
MANIFESTS = {
    (each["kind"], each["metadata"]["name"]): each
    for each in yaml.safe_load_all(TEXTS["kubernetes.yaml"])
    if each
}
WORKLOADS = {
    name: MANIFESTS[kind, name] for kind, name in MANIFESTS if kind.endswith(("ment", "Set"))
}
CONTAINERS = {
    name: each["spec"]["template"]["spec"]["containers"][0] for name, each in WORKLOADS.items()
}
SECRETS = ("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")


def docker_compose(*words: str, file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    files = ("--file", ROOT / "infra" / "mlflow" / "compose.yaml", "--env-file", file)
    return subprocess.run(
        [program("docker-compose"), *files, "config", *words],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("given", ["the example", "secrets alone"])
def test_docker_compose_takes_the_file_and_binds_to_loopback(tmp_path: Path, given: str):
    filled = tmp_path / "env"
    example = re.sub(r"^(\w+)=$", r"\1=a-long-secret", TEXTS[".env.example"], flags=re.MULTILINE)
    lines = example.splitlines()
    if given == "secrets alone":
        lines = [line for line in lines if line.split("=")[0] in SECRETS]
    filled.write_text("\n".join(lines))
    quiet = docker_compose("--quiet", file=filled)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    told = json.loads(docker_compose("--format", "json", file=filled).stdout)["services"]
    (port,) = told["mlflow"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "5000", 5000)
    assert "ports" not in told["postgres"]
    given, taken = (told[name]["environment"] for name in ("mlflow", "postgres"))
    assert given["PGPASSWORD"] == taken["POSTGRES_PASSWORD"] == "a-long-secret"
    assert {
        "--allowed-hosts=localhost:*,127.0.0.1:*",
        "--cors-allowed-origins=http://localhost:5000",
    } <= set(told["mlflow"]["command"])


@pytest.mark.parametrize("missing", SECRETS)
def test_the_example_does_not_work_until_it_is_filled_in(missing: str):
    refused = docker_compose(
        "--quiet",
        file=ROOT / "infra" / "mlflow" / ".env.example",
        **{name: "a-long-secret" for name in SECRETS if name != missing},
    )
    assert refused.returncode != 0
    assert missing in refused.stderr and "must be set in .env" in refused.stderr


def test_every_value_that_is_asked_for_is_in_the_example_and_no_secret_has_one():
    asked = set(re.findall(r"\$\{(\w+)", TEXTS["compose.yaml"]))
    told = dict(re.findall(r"^(\w+)=(.*)$", TEXTS[".env.example"], re.MULTILINE))
    assert asked == set(told) and set(SECRETS) < asked
    assert [name for name, value in told.items() if not value] == list(SECRETS)


def test_a_filled_in_env_is_not_in_git():
    files = ("infra/mlflow/.env", "infra/mlflow/.env.example")
    assert subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *files], capture_output=True, text=True
    ).stdout.splitlines() == [files[0]]


def test_no_password_on_a_command_line_or_in_an_address():
    words = [word for service in SERVICES.values() for word in service.get("command", [])]
    assert not [word for word in words for name in SECRETS if name in word]
    assert not re.search(r"//\w+:[^@/\s]+@", "".join(TEXTS.values()))


def test_images_are_pinned_and_the_server_is_of_the_client_s_release():
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert images == {each["name"]: each["image"] for each in CONTAINERS.values()}
    [locked] = re.findall(r"^mlflow==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert images["mlflow"].endswith(f":v{locked}-full")
    assert re.search(r":\d+\.\d+$", images["postgres"])


def test_kubernetes_has_what_compose_has():
    service, container = SERVICES["mlflow"], CONTAINERS["mlflow"]
    assert {each["name"] for each in container["env"]} == {*service["environment"], "HOME"}
    given, there = (
        [word for word in each["command"] if "-allowed-" not in word]
        for each in (service, container)
    )
    assert there == given
    # Of origins each in full.
    for allowed in (r"--allowed-hosts=[^*\s]+:\*(,\S+)*", r"--cors-allowed-origins=[^*\s]+"):
        assert any(re.fullmatch(allowed, word) for word in container["command"])
    values = re.sub(r"^#.*\n", "", TEXTS["auth.ini"], flags=re.MULTILINE)
    assert MANIFESTS["ConfigMap", "mlflow"]["data"]["auth.ini"] == values


def test_secrets_are_references():
    assert not [name for kind, name in MANIFESTS if kind == "Secret"]
    references = [
        variable["valueFrom"]["secretKeyRef"]
        for container in CONTAINERS.values()
        for variable in container["env"]
        if "valueFrom" in variable
    ]
    assert {(each["name"], each["key"]) for each in references} == {("mlflow", n) for n in SECRETS}


@pytest.mark.parametrize("name", ["mlflow", "postgres"])
def test_manifests_refer_to_one_another(name: str):
    spec, service = WORKLOADS[name]["spec"], MANIFESTS["Service", name]["spec"]
    labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
    assert spec["selector"]["matchLabels"] == labels == service["selector"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    claimed = [each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", [])]
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    assert {mount["name"] for mount in CONTAINERS[name]["volumeMounts"]} == {*volumes, *claimed}
    for source, kind, key in (
        ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
        ("configMap", "ConfigMap", "name"),
    ):
        named = {(kind, each[source][key]) for each in volumes.values() if source in each}
        assert named <= MANIFESTS.keys()
    assert WORKLOADS["postgres"]["spec"]["serviceName"] == "postgres"


# --------------------------------------------------------------------------------------- the server

ORIGIN = "https://mlflow.example.org"
GIVEN = {**{name: secrets.token_hex(24) for name in SECRETS}, "MLFLOW_ALLOWED_ORIGINS": ORIGIN}
PASSWORD = GIVEN["MLFLOW_AUTH_ADMIN_PASSWORD"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of a new server with the user and the database that compose.yaml makes."""
    folder, port = Path(tempfile.mkdtemp(prefix="spiketrain-postgres-")), free_port()
    password = GIVEN["POSTGRES_PASSWORD"]
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD": password}
    how: dict[str, Any] = {"cwd": folder, "env": environment}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        how |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    (folder / "given").write_text(password)
    (folder / "given").chmod(0o644)
    initdb = [
        *(program("initdb"), "--username=mlflow", "--auth=scram-sha-256", "--no-sync"),
        *(f"--pwfile={folder}/given", "--encoding=UTF8", "--locale=C", f"{folder}/data"),
    ]
    subprocess.run(initdb, check=True, capture_output=True, **how)
    server = subprocess.Popen(
        [
            *(program("postgres"), "-D", f"{folder}/data", "-p", str(port)),
            *("--listen_addresses=127.0.0.1", f"--unix_socket_directories={folder}", "--fsync=off"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
        **how,
    )
    createdb = [
        *(program("createdb"), "--host=127.0.0.1", f"--port={port}", "--username=mlflow", "mlflow")
    ]
    try:
        until(
            lambda: not subprocess.run(createdb, capture_output=True, env=environment).returncode,
            process=server,
            within=30,
            said=(folder / "log").read_text,
        )
        yield port
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Its address, and its pid: command and environment are compose.yaml's, but for places, and one
    process in place of four.
    """
    folder, uri = tmp_path_factory.mktemp("server"), f"http://127.0.0.1:{(port := free_port())}"

    def here(text: str) -> str:
        """${NAME:-otherwise} and ${NAME:?complaint} as docker compose reads them; our places."""
        filled = re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda m: GIVEN.get(m[1], m[2]), text)
        filled = filled.replace("@postgres:5432/", f"@127.0.0.1:{postgres}/")
        return filled.replace("/etc/mlflow/", f"{folder}/").replace("=/artifacts", f"={folder}/a")

    (folder / "auth.ini").write_text(here(TEXTS["auth.ini"]))
    told = SERVICES["mlflow"]
    environment = {name: here(value) for name, value in told["environment"].items()}
    assert {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD"} <= environment.keys()
    command = [here(w) for w in told["command"] if not w.startswith(("--host=", "--port="))]
    assert command[:2] == ["mlflow", "server"]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "PG"))}
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--host=127.0.0.1", f"--port={port}", "--workers=1"],
        cwd=folder,
        env=outside | environment,
        stdout=(log := (folder / "log").open("w")),
        stderr=log,
        start_new_session=True,
    )
    try:
        until(
            lambda: answer(f"{uri}/health")[0] == 200,
            process=process,
            within=120,
            said=(folder / "log").read_text,
        )
        yield uri, process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answer(
    url: str, *, password: str | None = None, asked: Any = None, **headers: str | None
) -> tuple[int, str]:
    """Status and body; 0 where nobody listens. What is `asked` goes in a POST, as JSON."""
    try:
        found = requests.request(
            "GET" if asked is None else "POST",
            url,
            headers=headers,
            auth=None if password is None else ("admin", password),
            json=asked,
            timeout=20,
        )
    except requests.ConnectionError:
        return 0, ""
    return found.status_code, found.text


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_that_is_logged_with_the_password_arrives(
    server: tuple[str, int], fake_run: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch
):
    run = fake_run()
    run.attempt(*steps(0, 5), ("finish", {"step": 5, "top1": 0.5}))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert sync(run.folder, uri=server[0]).delivered > 0
    client = connect(server[0])
    experiment = client.get_experiment_by_name(run.family)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.data.params["epochs"]) == ("FINISHED", "2")
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 5
    assert {"recipe.json", "journal.jsonl"} <= {
        file.path for file in client.list_artifacts(found.info.run_id)
    }


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("password", [None, "wrong-password-1"])
def test_without_the_password_nothing_is_read_or_logged(
    server: tuple[str, int],
    fake_run: Callable[..., FakeRun],
    monkeypatch: pytest.MonkeyPatch,
    password: str | None,
):
    for name, value in {"USERNAME": "admin", "PASSWORD": password}.items():
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        if password is not None and value is not None:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    run = fake_run()
    run.attempt(*steps(0, 2))
    with pytest.raises(TrackingError) as error:
        sync(run.folder, uri=server[0])
    assert "\n" not in str(error.value)
    for path in (
        "/",
        "/api/2.0/mlflow/experiments/search?max_results=10",
        "/api/2.0/mlflow-artifacts/artifacts",
    ):
        assert answer(f"{server[0]}{path}", password=password)[0] == 401


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("header", "values", "status", "said"),
    [
        ("Host", (None, "localhost:5000"), 200, ""),
        (
            "Host",
            ("mlflow.example.org", "mlflow.example.org:5000", "127.0.0.1.example.org"),
            *(403, "Invalid Host header"),
        ),
        ("Origin", (ORIGIN, "http://localhost:5000", "http://127.0.0.1:5000"), 200, ""),
        (
            "Origin",
            (
                *(f"{ORIGIN}:5000", f"{ORIGIN}.evil.example", "http://10.0.0.5:5000", "null"),
                "http://mlflow.example.org",
            ),
            *(403, "Cross-origin request blocked"),
        ),
    ],
)
def test_its_pages_work_where_they_are_opened_and_others_may_not_ask(
    server: tuple[str, int], header: str, values: tuple[str | None, ...], status: int, said: str
):
    """A browser says of every POST which page it comes from, of the server's own pages, too; they
    search runs by one.
    """
    url, asked = f"{server[0]}/ajax-api/2.0/mlflow/runs/search", {"experiment_ids": ["0"]}
    for value in values:
        got, body = answer(url, password=PASSWORD, asked=asked, **{header: value})
        assert got == status and said in body, value


@pytest.mark.full
@pytest.mark.timeout(300)
def test_its_health_asks_for_nothing_and_no_password_is_on_a_command_line(server: tuple[str, int]):
    assert answer(f"{server[0]}/health") == (200, "OK")
    process = psutil.Process(server[1])
    lines = [" ".join(each.cmdline()) for each in (process, *process.children(recursive=True))]
    assert len(lines) >= 2  # the command, and what serves
    assert not [line for line in lines for name in SECRETS if GIVEN[name] in line]

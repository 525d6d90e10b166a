"""The server of infra/mlflow/compose.yaml, as it is told there, over a PostgreSQL of the test: no
container, loopback alone.
"""

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

from pipeline.track.connect import TrackingError, connect
from pipeline.track.mlflow import sync
from tests.helpers.nodes import free_port
from tests.helpers.waiting import until
from tests.track.conftest import FakeRun, fake_run, steps

__all__ = ["fake_run"]  # a fixture

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "mlflow"
ORIGIN = "https://mlflow.example.org"
PASSWORD = {
    name: secrets.token_hex(24) for name in ("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD")
}


def postgres_program(name: str) -> str:
    """Debian keeps the server's programs of each release in a folder of its own, off PATH."""
    found = [*sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))] or [
        Path(path) for path in [shutil.which(name)] if path
    ]
    assert found, f"this test needs PostgreSQL's {name}, which `infra/setup.sh --servers` installs"
    return str(found[-1])


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of a new server with the user and the database that compose.yaml makes."""
    folder, port = Path(tempfile.mkdtemp(prefix="spiketrain-postgres-")), free_port()
    as_user: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    given, data = folder / "given", folder / "data"
    given.write_text(PASSWORD["POSTGRES_PASSWORD"])
    given.chmod(0o644)
    options = [
        "--username=mlflow",
        "--auth=scram-sha-256",
        f"--pwfile={given}",
        "--no-sync",
        "--encoding=UTF8",
        "--locale=C",
    ]
    environment = {"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD["POSTGRES_PASSWORD"]}
    subprocess.run(
        [postgres_program("initdb"), *options, str(data)],
        check=True,
        capture_output=True,
        env=environment,
        **as_user,
    )
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(folder),
        "fsync": "off",
    }
    server = subprocess.Popen(
        [
            postgres_program("postgres"),
            "-D",
            str(data),
            "-p",
            str(port),
            *(f"--{k}={v}" for k, v in settings.items()),
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("w"),
        env=environment,
        **as_user,
    )
    try:
        createdb = [
            postgres_program("createdb"),
            "--host=127.0.0.1",
            f"--port={port}",
            "--username=mlflow",
            "mlflow",
        ]
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
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    told = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["mlflow"]
    (folder / "auth.ini").write_text(_here((FOLDER / "auth.ini").read_text(), folder, postgres))
    given = {
        **PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(24),
        "MLFLOW_ALLOWED_ORIGINS": ORIGIN,
    }
    environment = {
        name: _here(_filled_in(value, given), folder, postgres)
        for name, value in told["environment"].items()
    }
    command = [_here(_filled_in(word, given), folder, postgres) for word in told["command"]]
    command = [word for word in command if not word.startswith(("--host=", "--port="))]
    assert command[:2] == ["mlflow", "server"] and not {
        "PGPASSWORD",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
    } - set(environment)
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PG"))
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *command, "--host=127.0.0.1", f"--port={port}", "--workers=1"],
        cwd=folder,
        env=outside | environment,
        stdout=(log := (folder / "log").open("w")),
        stderr=log,
        start_new_session=True,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
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


def _filled_in(value: str, given: dict[str, str]) -> str:
    """${NAME:-otherwise} and ${NAME:?complaint} as docker compose reads them."""
    return re.sub(r"\$\{(\w+):[-?]([^}]*)\}", lambda match: given.get(match[1], match[2]), value)


def _here(text: str, folder: Path, postgres: int) -> str:
    text = text.replace("@postgres:5432/", f"@127.0.0.1:{postgres}/").replace(
        "/etc/mlflow/", f"{folder}/"
    )
    return text.replace("=/artifacts", f"={folder}/artifacts")


def answer(
    url: str,
    *,
    password: str | None = None,
    host: str | None = None,
    origin: str | None = None,
    asked: Any = None,
) -> tuple[int, str]:
    """Status and body; 0 where nobody listens. What is `asked` goes in a POST, as JSON."""
    headers = {name: value for name, value in {"Host": host, "Origin": origin}.items() if value}
    login = None if password is None else ("admin", password)
    ask = requests.get if asked is None else requests.post
    try:
        found = ask(url, headers=headers, auth=login, json=asked, timeout=20)
    except requests.ConnectionError:
        return 0, ""
    return found.status_code, found.text


def test_a_run_that_is_logged_with_the_password_arrives(
    server: tuple[str, int], fake_run: Callable[..., FakeRun], monkeypatch: pytest.MonkeyPatch
):
    uri, _ = server
    run = fake_run()
    with run.start() as journal:
        steps(journal, 0, 5)
        journal.event("finish", steps=5, top1=0.5)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD["MLFLOW_AUTH_ADMIN_PASSWORD"])

    assert sync(run.folder, uri=uri).delivered > 0
    client = connect(uri)
    experiment = client.get_experiment_by_name(run.family)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["epochs"] == "2"
    assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 5
    assert {"recipe.json", "journal.jsonl"} <= {
        file.path for file in client.list_artifacts(found.info.run_id)
    }


@pytest.mark.parametrize("password", [None, "wrong-password-1"])
def test_without_the_password_nothing_is_read_or_logged(
    server: tuple[str, int],
    fake_run: Callable[..., FakeRun],
    monkeypatch: pytest.MonkeyPatch,
    password: str | None,
):
    uri, _ = server
    for name, value in {"USERNAME": "admin", "PASSWORD": password}.items():
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
        if password is not None and value is not None:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    run = fake_run()
    with run.start() as journal:
        steps(journal, 0, 2)

    with pytest.raises(TrackingError) as error:
        sync(run.folder, uri=uri)
    assert "\n" not in str(error.value)
    assert (
        answer(f"{uri}/api/2.0/mlflow/experiments/search?max_results=10", password=password)[0]
        == 401
    )
    assert answer(f"{uri}/", password=password)[0] == 401
    assert answer(f"{uri}/api/2.0/mlflow-artifacts/artifacts", password=password)[0] == 401


def test_a_foreign_host_header_is_refused_with_the_password(server: tuple[str, int]):
    uri, _ = server
    url, password = (
        f"{uri}/api/2.0/mlflow/experiments/search?max_results=10",
        PASSWORD["MLFLOW_AUTH_ADMIN_PASSWORD"],
    )

    assert answer(url, password=password)[0] == 200
    assert answer(url, password=password, host="localhost:5000")[0] == 200
    for host in ("mlflow.example.org", "mlflow.example.org:5000", "127.0.0.1.example.org"):
        status, body = answer(url, password=password, host=host)
        assert status == 403 and "Invalid Host header" in body


def test_its_pages_work_where_they_are_opened_and_others_may_not_ask(server: tuple[str, int]):
    """A browser says of every POST which page it comes from, of the server's own pages, too; they
    search runs by one.
    """
    url, password = (
        f"{server[0]}/ajax-api/2.0/mlflow/runs/search",
        PASSWORD["MLFLOW_AUTH_ADMIN_PASSWORD"],
    )
    asked = {"experiment_ids": ["0"]}

    for origin in (None, ORIGIN, "http://localhost:5000", "http://127.0.0.1:5000"):
        assert answer(url, password=password, origin=origin, asked=asked)[0] == 200, origin
    for origin in (
        "http://mlflow.example.org",
        f"{ORIGIN}:5000",
        f"{ORIGIN}.evil.example",
        "http://10.0.0.5:5000",
        "null",
    ):
        status, body = answer(url, password=password, origin=origin, asked=asked)
        assert status == 403 and "Cross-origin request blocked" in body


def test_it_has_a_health_that_asks_for_nothing(server: tuple[str, int]):
    assert answer(f"{server[0]}/health") == (200, "OK")


def test_no_password_is_on_a_command_line(server: tuple[str, int]):
    process = psutil.Process(server[1])
    lines = [" ".join(each.cmdline()) for each in (process, *process.children(recursive=True))]
    assert len(lines) >= 2  # the command, and what serves
    assert not [line for line in lines for password in PASSWORD.values() if password in line]

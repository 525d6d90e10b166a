"""What the files of infra/mlflow say, and that neither a secret nor a stray version is in them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "mlflow"
SECRETS = ("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    read = [each for each in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in read}


def docker_compose(*words: str, file: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = shutil.which("docker-compose")
    assert command, "this test needs docker-compose, which `infra/setup.sh --tools` installs"
    return subprocess.run(
        [
            command,
            "--file",
            str(FOLDER / "compose.yaml"),
            "--env-file",
            str(file),
            "config",
            *words,
        ],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("given", ["the example", "secrets alone"])
def test_docker_compose_takes_the_file_and_binds_to_loopback(tmp_path: Path, given: str):
    filled = tmp_path / "env"
    example = re.sub(
        r"^(\w+)=$", r"\1=a-long-secret", (FOLDER / ".env.example").read_text(), flags=re.MULTILINE
    )
    lines = [
        line
        for line in example.splitlines()
        if given == "the example" or line.split("=")[0] in SECRETS
    ]
    filled.write_text("\n".join(lines))

    quiet = docker_compose("--quiet", file=filled)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    told = json.loads(docker_compose("--format", "json", file=filled).stdout)["services"]
    (port,) = told["mlflow"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "5000", 5000)
    assert "ports" not in told["postgres"]
    assert (
        told["mlflow"]["environment"]["PGPASSWORD"]
        == told["postgres"]["environment"]["POSTGRES_PASSWORD"]
        == "a-long-secret"
    )
    assert {
        "--allowed-hosts=localhost:*,127.0.0.1:*",
        "--cors-allowed-origins=http://localhost:5000",
    } <= set(told["mlflow"]["command"])


@pytest.mark.parametrize("missing", SECRETS)
def test_the_example_does_not_work_until_it_is_filled_in(missing: str):
    others = {name: "a-long-secret" for name in SECRETS if name != missing}

    refused = docker_compose("--quiet", file=FOLDER / ".env.example", **others)
    assert refused.returncode != 0
    assert missing in refused.stderr and "must be set in .env" in refused.stderr


def test_every_value_that_is_asked_for_is_in_the_example_and_no_secret_has_one():
    asked = set(re.findall(r"\$\{(\w+)", (FOLDER / "compose.yaml").read_text()))
    told = dict(re.findall(r"^(\w+)=(.*)$", (FOLDER / ".env.example").read_text(), re.MULTILINE))

    assert asked == set(told) and set(SECRETS) < asked
    assert [name for name, value in told.items() if not value] == list(SECRETS)


def test_a_filled_in_env_is_not_in_git():
    files = ("infra/mlflow/.env", "infra/mlflow/.env.example")
    ignored = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *files], capture_output=True, text=True
    )
    assert ignored.stdout.splitlines() == [files[0]]


def test_services_are_healthy_before_others_rest_on_them(compose: dict[str, Any]):
    services = compose["services"]

    assert services["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert all(service["healthcheck"]["test"] for service in services.values())
    kept = {volume.split(":")[0] for service in services.values() for volume in service["volumes"]}
    assert set(compose["volumes"]) == {"database", "artifacts"} and set(compose["volumes"]) < kept


def test_no_password_on_a_command_line_or_in_an_address(compose: dict[str, Any]):
    for service in compose["services"].values():
        assert not [word for word in service.get("command", []) for name in SECRETS if name in word]
    for file in ("compose.yaml", "kubernetes.yaml", "auth.ini"):
        assert not re.search(r"//\w+:[^@/\s]+@", (FOLDER / file).read_text())


def test_images_are_pinned_and_the_server_is_of_the_client_s_release(
    compose: dict[str, Any], manifests: dict[tuple[str, str], dict[str, Any]]
):
    workloads = (manifests["Deployment", "mlflow"], manifests["StatefulSet", "postgres"])
    images = {name: service["image"] for name, service in compose["services"].items()}
    in_kubernetes = [each["spec"]["template"]["spec"]["containers"][0] for each in workloads]

    assert images == {container["name"]: container["image"] for container in in_kubernetes}
    locked = re.search(r"^mlflow==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None and images["mlflow"].endswith(f":v{locked[1]}-full")
    assert re.search(r":\d+\.\d+$", images["postgres"])


def test_kubernetes_has_what_compose_has(
    compose: dict[str, Any], manifests: dict[tuple[str, str], dict[str, Any]]
):
    container = manifests["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"][0]
    environment = compose["services"]["mlflow"]["environment"]

    assert {each["name"] for each in container["env"]} == {*environment, "HOME"}
    given, there = (
        [word for word in each if "-allowed-" not in word]
        for each in (compose["services"]["mlflow"]["command"], container["command"])
    )
    assert there == given
    for allowed in (
        r"--allowed-hosts=[^*\s]+:\*(,\S+)*",
        r"--cors-allowed-origins=[^*\s]+",
    ):  # of origins each in full
        assert any(re.fullmatch(allowed, word) for word in container["command"])
    values = re.sub(r"^#.*\n", "", (FOLDER / "auth.ini").read_text(), flags=re.MULTILINE)
    assert manifests["ConfigMap", "mlflow"]["data"]["auth.ini"] == values


def test_secrets_are_references(manifests: dict[tuple[str, str], dict[str, Any]]):
    assert not [name for kind, name in manifests if kind == "Secret"]
    by_reference = {
        (
            variable["valueFrom"]["secretKeyRef"]["name"],
            variable["valueFrom"]["secretKeyRef"]["key"],
        )
        for each in (manifests["Deployment", "mlflow"], manifests["StatefulSet", "postgres"])
        for variable in each["spec"]["template"]["spec"]["containers"][0]["env"]
        if "valueFrom" in variable
    }

    assert by_reference == {("mlflow", name) for name in SECRETS}


def test_manifests_refer_to_one_another(manifests: dict[tuple[str, str], dict[str, Any]]):
    for kind, name in (("Deployment", "mlflow"), ("StatefulSet", "postgres")):
        spec = manifests[kind, name]["spec"]
        labels = spec["template"]["metadata"]["labels"]
        assert (
            spec["selector"]["matchLabels"]
            == labels
            == manifests["Service", name]["spec"]["selector"]
        )
        pod = spec["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        volumes = [
            *pod.get("volumes", []),
            *({"name": c["metadata"]["name"]} for c in spec.get("volumeClaimTemplates", [])),
        ]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
            volume["name"] for volume in volumes
        }
        for volume in volumes:
            if "persistentVolumeClaim" in volume:
                assert (
                    "PersistentVolumeClaim",
                    volume["persistentVolumeClaim"]["claimName"],
                ) in manifests
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in manifests
    assert manifests["StatefulSet", "postgres"]["spec"]["serviceName"] == "postgres"

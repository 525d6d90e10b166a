"""What comes from outside: secrets that get nowhere, pickles that are not run, names and paths that
stay in their folder.
"""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pipeline
from pipeline.core.errors import UserError
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import Inline
from pipeline.launch.prepare import prepare, read_job, write_job
from pipeline.launch.ray_cluster import draw_token, worker_environment
from pipeline.recipe.recipe import read_json, write_json
from pipeline.report.stores import open_store
from pipeline.train.backend.deepspeed import DeepSpeed
from pipeline.train.checkpoint import (
    WEIGHTS,
    CheckpointError,
    Checkpoints,
    CheckpointStore,
    checkpoints,
    find_damage,
    step_folders,
)
from pipeline.train.checkpoint.manifest import facts_of, seal
from pipeline.train.export import _digest
from tests.helpers.interruptions import dies_at
from tests.helpers.processes import run_ranks
from tests.helpers.small import Command, Refused, make_run, small_recipe, train_inline

pytestmark = pytest.mark.timeout(120)
SECRET = "sesame-b41f0c"


@pytest.fixture
def launch(tmp_path: Path) -> tuple[str, ...]:
    recipe = "from tests.helpers.small import small_recipe\n\ndef recipe():\n    return "
    (tmp_path / "small.py").write_text(f"{recipe}small_recipe(stop_after=4)\n")
    return ("launch", str(tmp_path / "small.py"), "--inline", "--runs", str(tmp_path / "runs"))


# ------------------------------------------------------------------------------------------ secrets


def plant(patch: pytest.MonkeyPatch) -> None:
    aws = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    for name in (*aws, "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        patch.setenv(name, SECRET)
    patch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")


def holders(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5, "what was searched is there"
    return [
        str(path) for path in files if SECRET.encode() in path.read_bytes() or SECRET in str(path)
    ]


OF_OUR_OWN = """
import os
from pathlib import Path
from pipeline.launch.cluster import Cluster
from pipeline.launch.ray import Ray
from tests.helpers.nodes import join_without_token
with Ray(Cluster(device="cpu")) as launcher:
    import ray
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for path in session.rglob("*") if path.is_file()]
    token = os.environ.get("RAY_AUTH_TOKEN", "none was drawn")
    holders = [path for path in files if token.encode() in path.read_bytes()]
    said = join_without_token(launcher.resume_options()[1])
    print(said, len(files) > 5, holders, Path("~/.ray").expanduser().exists())
"""


@pytest.mark.distributed
@pytest.mark.full
def test_the_token_of_a_cluster_of_our_own_is_in_no_file(tmp_path: Path) -> None:
    """Ray 2.60 would write it into the user's home, for all users of the machine to read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    with tempfile.TemporaryDirectory() as place:  # short: Ray's sockets lie in it
        ran = subprocess.run(
            [sys.executable, "-c", OF_OUR_OWN],
            env={**kept, "HOME": str(tmp_path), "RAY_TMPDIR": place},
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert ran.stdout.splitlines()[-1:] == ["refused True [] False"], ran.stderr[-2000:]


def test_a_token_that_the_user_names_is_that_of_a_cluster_of_our_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    for name in (None, None, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setattr(os, "environ", {} if name is None else {name: "mine"})
        draw_token()
        drawn.append(dict(os.environ))
    assert [len(each["RAY_AUTH_TOKEN"]) for each in drawn[:2]] == [64, 64] and drawn[0] != drawn[1]
    assert drawn[2:] == [{"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN_PATH": "mine"}]


def test_a_run_and_its_store_hold_no_secret(
    tmp_path: Path,
    own_store: str,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
    launch: tuple[str, ...],
) -> None:
    plant(monkeypatch)
    code, said, error = spiketrain(*launch, "--name", "whole")
    assert code == 0, error
    assert len(open_store(own_store).runs()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(
            "pipeline.train.evaluation.Evaluation.__init__",
            Mock(side_effect=KeyError("the cable fell out")),
        )
        with pytest.raises(KeyError):
            spiketrain(*launch, "--name", "failed")
    assert "KeyError" in (tmp_path / "runs" / "failed" / "journal.jsonl").read_text()
    assert SECRET not in said + error
    assert holders(tmp_path) == []


@pytest.mark.parametrize(
    "password", [f"{SECRET}@{SECRET}", f"{SECRET}/{SECRET}", f"12/{SECRET}"]
)  # as nobody quoted it
def test_the_password_of_a_server_is_not_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
    launch: tuple[str, ...],
    password: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"  # where nobody is
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:{password}@{place}")
    code, said, error = spiketrain(*launch, "--name", "it")
    assert code == 0, error
    assert f"mlflow  http://{place}" in said
    assert f"MLflow at http://{place} has not answered" in said.replace("\n", " ")
    assert SECRET not in said + error
    assert holders(tmp_path) == []
    for words in (("sync", "it"), ("register", "it", "--as", "x")):
        code, said, error = spiketrain(*words, *launch[-2:])
        assert code == 1 and "cannot be used" in error and SECRET not in said + error


def test_a_worker_is_told_settings_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray writes what a worker is told into its logs."""
    plant(monkeypatch)
    settings = {"HF_HOME": "/models", "NCCL_DEBUG": "WARN"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    told = worker_environment(threads=1, loader_threads=1, uses_gpus=False, on_loopback=False)
    assert told.items() >= settings.items() and SECRET not in told.values()


# ------------------------------------------------------------------------------------------ pickles


@dataclass
class Harmful:
    """Leaves a file when it is unpickled."""

    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    yield tmp_path / "harmed"
    assert not (tmp_path / "harmed").exists()


def harmful(file: Path, mark: Path) -> None:
    content = torch.load(file, weights_only=False) if file.exists() else {}
    torch.save({**content, "harm": Harmful(mark)}, file)
    reseal(file)


def harmful_alone(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Harmful(mark)))
    reseal(file)


def reseal(file: Path) -> None:
    """The checkpoint that the file is in, if any."""
    for manifest in [each / "manifest.json" for each in file.parents]:
        if manifest.exists():
            manifest.unlink()
            files = [path for path in manifest.parent.rglob("*") if path.is_file()]
            names = (str(path.relative_to(manifest.parent)) for path in files)
            seal(manifest.parent, facts_of(manifest.parent, names))
            assert find_damage(manifest.parent) is None


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("plain/state.pt", harmful),
        ("plain/average.pt", harmful),
        ("buffers_rank0.pt", harmful),
        ("rule.pt", harmful_alone),
    ],
)
def test_a_pickle_in_a_checkpoint_is_not_run(
    name: str,
    how: Callable[[Path, Path], None],
    tmp_path: Path,
    mark: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = partial(train_inline, tmp_path / "it", small_recipe(stop_after=7, ema_decay=0.9))
    with dies_at(5):
        train()
    newest = step_folders(tmp_path / "it" / "checkpoints")[-1]
    how(newest / name, mark)
    said = f"{newest.name}: must hold data alone; {name} (calls posix.mkdir|cannot be)"
    with pytest.raises(UserError, match=rf"checkpoint .*{said}"):
        train()
    assert newest.is_dir()  # for whoever asks where it came from
    monkeypatch.setattr(checkpoints, "find_code", lambda folder: None)  # the second wall
    with pytest.raises(pickle.UnpicklingError):
        train()


@pytest.mark.distributed
def test_nor_by_deepspeed(tmp_path: Path, mark: Path) -> None:
    run_ranks(tampered_with, 1, tmp_path, tmp_path, mark)


def tampered_with(rank: int, ranks: int, folder: Path, mark: Path) -> None:
    for zero, file in (
        (0, "mp_rank_00_model_states.pt"),
        (1, "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ):
        network = nn.Linear(2, 2)
        backend = DeepSpeed(
            network, lambda net: torch.optim.SGD(net.parameters(), lr=0.1), micro_batch=1, zero=zero
        )
        checkpoints, rule = (
            Checkpoints(CheckpointStore(folder / str(zero)), attempt="a"),
            nn.Module(),
        )
        checkpoints.save(1, backend, rule, {"world_size": 1, "zero": zero, "score": None})
        whole = checkpoints.wait()
        assert whole is not None
        saved = Path(whole.address)
        weight = network.weight.detach().clone()
        network.weight.data.zero_()
        checkpoints.load(saved, backend, rule)
        assert checkpoints.newest() == saved and torch.equal(network.weight, weight)
        harmful(saved / "deepspeed" / "state" / file, mark)
        said = f"must hold data alone; deepspeed/state/{file} calls posix.mkdir"
        with pytest.raises(CheckpointError, match=said):
            checkpoints.newest()
        with pytest.raises(pickle.UnpicklingError):
            checkpoints.load(saved, backend, rule)


def test_weights_that_are_a_pickle_are_refused(
    tmp_path: Path, mark: Path, spiketrain: Command, refused: Refused, launch: tuple[str, ...]
) -> None:
    recipe, runs = launch[1], launch[-2:]
    it = prepare(small_recipe(stop_after=2), Cluster(inline=True), tmp_path / "runs", name="it")
    with Inline() as launcher:
        launcher.run(it, "test")
    for file in (tmp_path / "weights.pt", tmp_path / "weights.safetensors"):
        harmful_alone(file, mark)
        for what in (("it", *runs), (recipe,)):
            assert f"{file.name} must hold weights" in refused(
                "evaluate", *what, "--weights", str(file)
            )
        assert file.name in refused(*launch, "--set", f"init={file}")
    newest = step_folders(tmp_path / "runs" / "it" / "checkpoints")[-1]
    harmful(newest / "plain" / "state.pt", mark)  # which nobody reads for its weights
    evaluate, export = ("evaluate", "it", *runs), ("export", "it", *runs, "--out")
    assert spiketrain(*evaluate)[0] == spiketrain(*export, str(tmp_path / "out"))[0] == 0
    harmful_alone(newest / WEIGHTS, mark)
    for words in (evaluate, (*export, str(tmp_path / "other.safetensors"))):
        assert "must hold weights" in refused(*words)


@pytest.fixture
def saved(tmp_path: Path, refused: Refused) -> Callable[..., None]:
    """Changes parts of a saved recipe, `runs/it`; no command takes it, and all say why."""
    run = tmp_path / "runs" / "it"
    prepare(small_recipe(), Cluster(inline=True), run.parent, name="it")
    value = read_json(run / "recipe.json")

    def refuse(said: str, **parts: Any) -> None:
        write_json(run / "recipe.json", {**value, "recipe": {**value["recipe"], **parts}})
        for words in (("resume",), ("evaluate",), ("export", "--out", str(tmp_path / "out"))):
            assert said in refused(*words, "it", "--runs", str(run.parent))

    return refuse


@pytest.mark.parametrize("where", ["timm.models", "timm.models._helpers"])
def test_a_pickle_that_a_recipe_has_read_is_not_run(
    where: str, tmp_path: Path, mark: Path, saved: Callable[..., None]
) -> None:
    harmful_alone(tmp_path / "weights.pt", mark)
    given = {"checkpoint_path": str(tmp_path / "weights.pt"), "weights_only": False}
    model = {"target": f"{where}.load_state_dict", "kwargs": given}
    said = f"{where}.load_state_dict is not in a trusted package; name its package with --trust"
    saved(said, model=model)
    about = {"format": "spiketrain", "version": "2", "layout": "plain", "time_steps": "3"}
    told = {**about, "model": json.dumps(model)}
    save_file({}, tmp_path / "net.safetensors", {**told, "sha256": _digest(told, {})})
    for there in (tmp_path / "runs" / "it", tmp_path / "net.safetensors"):
        with pytest.raises(ValueError, match=re.escape(said)):
            pipeline.load(there)


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.call", "pipeline.data.write.images.os.system", "builtins.exec"],
)
def test_a_saved_recipe_names_no_code_but_ours(
    target: str, mark: Path, saved: Callable[..., None]
) -> None:
    schedule = {"target": target, "kwargs": {"command": f"touch {mark}"}}
    saved(f"{target} is not in a trusted package", schedule=schedule)


# ---------------------------------------------------------------------------------- names and paths


@pytest.mark.parametrize("name", ["../out", "..", "", "a/b", "/tmp/out"])
def test_a_name_stays_in_the_folder_of_runs(
    name: str, tmp_path: Path, refused: Refused, launch: tuple[str, ...]
) -> None:
    for more in ((), ("--or-resume",), ("--seeds", "2")):
        line = refused(*launch, "--name", name, *more)
        assert line == f"launch: --name must be a name in {tmp_path / 'runs'}; got {name!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["small.py"]


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("suite", "suite must be a valid name of a folder"),
        ("family", "family must be a valid name of a folder"),
    ],
)
@pytest.mark.parametrize("name", ["../out", "..", "/out"])
def test_a_run_from_elsewhere_names_no_folder_elsewhere(
    field: str, rule: str, name: str, tmp_path: Path
) -> None:
    write_job(replace(make_run(tmp_path / "it", small_recipe()), **{field: name}))
    with pytest.raises(ValueError, match=f"{rule}; got '{name}'"):
        read_job(tmp_path / "it")


def test_a_run_from_elsewhere_leads_to_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """Whoever is joined is shown the token, and may run what they like here."""
    plant(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        address = f"127.0.0.1:{elsewhere.getsockname()[1]}"
        prepare(small_recipe(), Cluster(address=address), tmp_path / "runs", name="it")
        assert f"on a Ray cluster; got none (at the launch: {address})" in refused(
            "resume", "it", "--runs", str(tmp_path / "runs")
        )
        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_nothing_here_opens_an_archive_or_a_pickle_without_care() -> None:
    """A tar or a zip can hold names that leave the folder that it is unpacked in: none is
    unpacked.
    """
    files = {file: file.read_text() for file in sorted(Path("pipeline").rglob("*.py"))}
    modules = "tarfile|c?[pP]ickle|shelve|marshal|dill|cloudpickle|joblib"
    calls = r"\w*(?:unpack_archive|extractall)\(|(?<![.\w])(?:eval|exec)\("
    careless = rf"^\s*(?:import|from) (?:{modules})\b.*|{calls}"
    found = [
        f"{file}: {match.strip()}"
        for file, text in files.items()
        for match in re.findall(careless, text, re.MULTILINE)
    ]
    # The name of an error.
    assert found == ["pipeline/core/tensor_file.py: from pickle import UnpicklingError"]
    called = r"\b(torch|np)\.load\(((?:[^()]|\([^()]*\))*)\)"
    loads = [match for text in files.values() for match in re.findall(called, text)]
    safe = {"torch": "weights_only=True", "np": "allow_pickle=False"}
    assert [words for library, words in loads if safe[library] not in words] == []
    assert len(files) > 200 and sum(library == "torch" for library, _ in loads) >= 6


def test_every_package_of_the_lock_has_a_hash() -> None:
    text = Path("requirements.lock").read_text()
    packages = [each for each in re.split(r"\n(?=\S)", text) if not each.startswith("#")]
    assert len(packages) > 150
    for each in packages:
        assert re.match(r"[\w.\[\]-]+==\S+", each) and "--hash=sha256:" in each, each

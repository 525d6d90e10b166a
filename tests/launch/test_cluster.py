"""Where and on how much a run trains: what is refused; and joining a Ray cluster that is there
already, with its token.
"""

import json
import math
import os
import socket
from dataclasses import asdict, fields, replace
from inspect import signature
from typing import Any

import pytest
import ray
from ray.exceptions import AuthenticationError

from pipeline.cli.launch import resume
from pipeline.core.errors import UserError
from pipeline.launch.cluster import OPERATIONAL_FIELDS, Cluster, parse_workers
from pipeline.launch.driver import Inline, launcher_of
from pipeline.launch.ray import Ray
from pipeline.launch.ray_cluster import NODE_SETTINGS, worker_start_timeout


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "cluster: must be an object; got []"),
        ({"hosts": 1}, "cluster: unknown field 'hosts'; it has workers, inline"),
        ({"workers": "many"}, "cluster: workers must be int or tuple[int, ...]; got 'many'"),
        ({"workers": [2, 0]}, "cluster: workers must be whole numbers >= 1; got workers=(2, 0)"),
        ({"workers": [4, 2]}, "cluster: numbers of workers must ascend; got (4, 2)"),
        (
            {"workers": [2, 4], "side_by_side": 2},
            "cluster: --workers must be one number for runs side by side; got 2,4",
        ),
        (
            {"node_loss": "never"},
            "cluster: node_loss must be one of 'fast', 'patient'; got 'never'",
        ),
        *(
            ({name: count}, f"cluster: {name} must be a whole number >= 1; got {name}={count}")
            for name in ("workers", "cpus_per_worker", "loader_threads")
            for count in (0, -1)
        ),
        *(
            (
                {"hang_minutes": minutes},
                (
                    "cluster: hang_minutes must be in 0..10080 (a week; 0 means never); got"
                    f" {minutes:g}"
                ),
            )
            for minutes in (-1.0, 10081.0, 1e9, math.inf, math.nan)
        ),
        (
            {"max_restarts": -1},
            "cluster: max_restarts must be a whole number >= 0; got max_restarts=-1",
        ),
    ],
)
def test_a_damaged_cluster_is_refused_in_one_line(value: Any, said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Cluster.from_json(value)
    assert str(refusal.value).startswith(said)


@pytest.mark.parametrize(
    ("launched", "how", "got"),
    [
        ({"workers": 4, "cpus_per_worker": 2}, {"workers": 2}, "--workers 2"),
        ({"workers": 4, "cpus_per_worker": 2}, {"address": "auto"}, "--address auto"),
        *(
            (launched, how, f"--{name.replace('_', '-')} {value}")
            for name, value in (
                ("cpus_per_worker", 2),
                ("max_restarts", 0),
                ("node_loss", "patient"),
            )
            for launched, how in (
                ({"inline": True, name: value}, None),
                ({"workers": 4}, {"options": {name: value}}),
            )
        ),
    ],
)
def test_what_is_rays_has_no_effect_in_this_process_and_is_refused(
    launched: dict[str, Any], how: dict[str, Any] | None, got: str
) -> None:
    cluster = Cluster(**launched)
    with pytest.raises(
        ValueError,
        match=f"--inline trains one worker in this process, so options of Ray must not be"
        f" given; got {got}$",
    ):
        launcher_of(cluster if how is None else cluster.resumed(**how, inline=True))


@pytest.mark.parametrize("joins", [False, True])
def test_a_token_that_is_not_at_hand_is_said_in_one_line(
    joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray 2.60 raises of it, before it asks anybody, is no OSError and no RuntimeError."""

    def init(**how: Any) -> None:
        raise AuthenticationError(
            "RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /nowhere"
        )

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", {**os.environ})
    said = (
        "ray: the cluster's token must be set; got none: .* is empty: /nowhere; set"
        " RAY_AUTH_TOKEN to its token, or RAY_AUTH_TOKEN_PATH to the token's file"
    )
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"127.0.0.1:{door.getsockname()[1]}" if joins else None
        with pytest.raises(UserError, match=f"^{said}"), Ray(Cluster(address=address)):
            pass


@pytest.mark.parametrize(
    ("cluster", "sizes"),
    [
        (Cluster(), (1,)),
        (Cluster(inline=True), (1,)),
        (Cluster(workers=3, cpus_per_worker=4), (3,)),
        (Cluster(workers=(2, 4, 8), node_loss="patient"), (2, 4, 8)),
    ],
    ids=str,
)
def test_a_cluster_comes_back_from_json(cluster: Cluster, sizes: tuple[int, ...]) -> None:
    assert Cluster.from_json(json.loads(json.dumps(asdict(cluster)))) == cluster
    assert cluster.sizes == sizes


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        *(("4", 4), ("2:4", (2, 3, 4)), ("2,4,8", (2, 4, 8)), ("2:3", (2, 3))),
        *(
            (text, None)
            for text in (
                "3,",
                "4:2",
                "2:2",
                "0:2",
                "1:2:3",
                "8,4",
                "-1",
                "",
                "many",
                "1:1000000000000",
            )
        ),
    ],
)
def test_workers_are_a_number_a_range_or_numbers(
    text: str, workers: int | tuple[int, ...] | None
) -> None:
    if workers is not None:
        assert parse_workers(text) == workers
        return
    with pytest.raises(ValueError, match=f"--workers must be a number, a range .*; got {text}$"):
        parse_workers(text)


def test_a_run_of_one_size_worker_start_timeout_its_places_and_one_of_several_takes_fewer() -> None:
    waits = {
        (loss, sizes): worker_start_timeout(loss, n_sizes=sizes)
        for loss in NODE_SETTINGS
        for sizes in (1, 2)
    }
    assert waits["fast", 1] == {}  # Ray's own minute
    of_several, *patient = (
        float(*waits[each].values()) for each in (("fast", 2), ("patient", 1), ("patient", 2))
    )
    assert of_several < 60 < patient[0] == patient[1]
    assert not NODE_SETTINGS["fast"].keys() & NODE_SETTINGS["patient"].keys()


KEPT: dict[str, Any] = {
    "verify": "full",
    "hang_minutes": 5.0,
    "loader_threads": 2,
    "device": "cpu",
    "checkpoints": "/c",
}
PATIENT = Cluster(workers=4, cpus_per_worker=8, max_restarts=1, node_loss="patient", **KEPT)
HERE = Cluster(inline=True, **KEPT)
SEVERAL = Cluster(workers=2, side_by_side="auto")
# Side by side because somebody said so.
ASKED = Cluster(inline=True, side_by_side="auto")
JOINED = Cluster(workers=4, address="10.0.0.1:6379")


@pytest.mark.parametrize(
    ("launched", "how", "now"),
    [
        # In this process one worker trains, whatever there were, without what is Ray's alone.
        (Cluster(workers=4, address="auto"), {"inline": True}, Cluster(inline=True)),
        (Cluster(workers=4, address="auto"), {"workers": 1, "inline": True}, Cluster(inline=True)),
        (PATIENT, {"inline": True}, HERE),
        # What is not said is kept.
        (PATIENT, {"options": {"cpus_per_worker": 6}}, replace(PATIENT, cpus_per_worker=6)),
        (
            HERE,
            {"workers": 2, "options": {"cpus_per_worker": 3}},
            Cluster(workers=2, cpus_per_worker=3, **KEPT),
        ),
        (HERE, {"options": {"verify": "sampled"}}, replace(HERE, verify="sampled")),
        (
            Cluster(workers=2, cpus_per_worker=3, inline=True, **KEPT),
            {"options": {"verify": "sampled"}},
            replace(HERE, verify="sampled"),
        ),
        # A suite whose runs were as many as there is room for goes on in turn where it must.
        (SEVERAL, {}, SEVERAL),
        (SEVERAL, {"workers": 1}, replace(SEVERAL, workers=1)),
        (SEVERAL, {"workers": (1, 2)}, Cluster(workers=(1, 2))),
        (SEVERAL, {"inline": True}, Cluster(inline=True)),
        (
            SEVERAL,
            {"inline": True, "options": {"side_by_side": 2}},
            Cluster(inline=True, side_by_side=2),
        ),
        (ASKED, {}, ASKED),
        (ASKED, {"inline": True}, ASKED),
        # A cluster is joined by the user's word alone.
        (JOINED, {"address": "b:1"}, Cluster(workers=4, address="b:1")),
        (JOINED, {"address": "local"}, Cluster(workers=4)),
        (Cluster(workers=4), {}, Cluster(workers=4)),
    ],
)
def test_a_resume_keeps_what_it_is_not_told_and_takes_what_it_is(
    launched: Cluster, how: dict[str, Any], now: Cluster
) -> None:
    assert launched.resumed(**how) == now


@pytest.mark.parametrize(
    ("launched", "workers", "said"),
    [
        (
            JOINED,
            2,
            r"--address must be given again for a run that was launched on a Ray cluster; got"
            r" none \(at the launch: 10\.0\.0\.1:6379\); --address local starts",
        ),
        (
            Cluster(workers=2, side_by_side=3),
            (1, 2),
            "must be one number for runs side by side; got 1:2",
        ),
    ],
)
def test_a_resume_that_cannot_be(launched: Cluster, workers: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        launched.resumed(workers=workers)


def test_a_resume_can_be_told_all_that_a_launch_can_but_where_checkpoints_are() -> None:
    assert {each.name for each in fields(Cluster)} == {
        *OPERATIONAL_FIELDS,
        "workers",
        "inline",
        "address",
        "checkpoints",
    }
    assert {*OPERATIONAL_FIELDS, "workers", "inline", "address"} < signature(
        resume
    ).parameters.keys()


def test_cores_and_threads_that_nobody_has_said_are_the_launchers_to_find() -> None:
    settings = Cluster().worker_settings
    assert (settings["threads"], settings["loader_threads"]) == (1, 1)  # on a CPU
    here, under_ray = launcher_of(Cluster(inline=True, device="cpu")), launcher_of(Cluster())
    assert isinstance(here, Inline) and isinstance(under_ray, Ray)
    assert here.loader_threads == under_ray.cluster.loader_threads == "auto"

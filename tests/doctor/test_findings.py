"""What was found of nodes is judged, and what is in the way is said with what to do about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.doctor.card import Card
from pipeline.doctor.checkpoints import Kept
from pipeline.doctor.findings import Finding, of_clocks, of_kept, of_network, of_nodes, of_token
from pipeline.doctor.node import PACKAGES, Node
from pipeline.doctor.stranger import Stranger
from pipeline.launch.base import Silent
from pipeline.measure.driver import Unusable

NODE = Node(
    name="one",
    versions={"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")},
    gpus=(),
    promised_gpus=0,
    unusable=None,
    trains=True,
    sees_runs=True,
    run_lock="held",
    written_bytes_per_s=2e8,
    free_bytes=10**11,
    remembers_absence=None,
    threading_layer="tbb",
    ffcv="ok",
    device="cpu",
    off={"neuron": 1e-7, "1-bit": 3e-7},
    locks={},
)
OTHER = replace(NODE, name="two")


def not_ok(*nodes: Node, needed: float = 1e9) -> list[Finding]:
    return [each for each in of_nodes(nodes, runs="/r", needed_bytes=needed) if each.state != "ok"]


def test_nodes_that_are_well_and_alike() -> None:
    assert not_ok(NODE, OTHER) == []
    assert len([*of_nodes([NODE, OTHER], runs="/r", needed_bytes=1)]) == 2 + 2 * 5


@pytest.mark.parametrize(("nodes", "end"), [((NODE,), "ffcv 1.0"), ((NODE, OTHER), "ffcv 1.0, on 2 nodes alike")])
def test_one_node_is_alike_to_no_other(nodes: tuple[Node, ...], end: str) -> None:
    [versions] = [each.told for each in of_nodes(nodes, runs="/r", needed_bytes=1) if each.check == "versions"]
    assert versions.endswith(end)


@pytest.mark.parametrize(
    ("sick", "check", "state", "told"),
    [
        (replace(OTHER, versions={**NODE.versions, "torch": "2.0"}), "versions", "bad", "torch: one has 1.0, two has 2.0"),
        (replace(OTHER, sees_runs=False), "storage", "bad", "two does not see /r"),
        (
            replace(OTHER, written_bytes_per_s="failed: no quota"),
            "storage",
            "bad",
            "two: writing to /r failed: no quota, 1",
        ),
        (replace(OTHER, free_bytes="failed: ESTALE"), "storage", "bad", "two: writes 200 MB/s to /r, its room failed: ESTALE"),
        (
            replace(OTHER, gpus=(Card(name="H100"), Card(name="failed: RuntimeError: CUDA error"))),
            "gpus",
            "bad",
            "two: a GPU failed: RuntimeError: CUDA",
        ),
        (replace(OTHER, promised_gpus=8), "gpus", "bad", "two: torch finds 0 of 8 GPUs"),
        (
            replace(OTHER, promised_gpus=8, unusable=Unusable("torch is built without CUDA", "install")),
            "gpus",
            "bad",
            "two: torch is built without CUDA",
        ),
        (
            replace(OTHER, gpus=(Card(name="H100"),), promised_gpus=2),
            "gpus",
            "bad",
            "two: torch finds 1 of 2 GPUs",
        ),
        (replace(OTHER, written_bytes_per_s=1e6), "storage", "look", "two: writes 1 MB/s"),
        (replace(OTHER, free_bytes=10**8), "storage", "bad", "0.1 GB are free"),
        (replace(OTHER, run_lock="free"), "storage", "bad", "two: could lock a file in /r that this machine has locked"),
        (replace(OTHER, run_lock="failed: OSError: [Errno 38]"), "storage", "bad", "two: a lock in /r failed: OSError"),
        (replace(OTHER, remembers_absence="/r"), "storage", "look", "two: the NFS at /r may hide a new file for a minute"),
        (replace(OTHER, ffcv="failed: ImportError: libtbb"), "ffcv", "bad", "two: failed: ImportError: libtbb"),
        (replace(OTHER, threading_layer="failed: no layer"), "threads", "look", "no layer"),
        (replace(OTHER, threading_layer="omp"), "threads", "look", "two: numba's threads are not TBB's: omp"),
        (replace(OTHER, off={"neuron": 0.0, "1-bit": 2e-3}), "ops", "bad", "two: 1-bit on cpu is off by 2.0e-03 of what it"),
        (replace(OTHER, off={"neuron": "failed: x", "1-bit": 0.0}), "ops", "bad", "two: neuron on cpu failed: x"),
        (replace(OTHER, locks={"/x/lock": 3600.0}), "locks", "look", "/x/lock is locked for 60 min"),
    ],
)
def test_one_that_is_not(sick: Node, check: str, state: str, told: str) -> None:
    (found,) = not_ok(NODE, sick)
    assert (found.check, found.state) == (check, state) and told in found.told and found.advice


def test_a_disk_that_is_nearly_full_lacks_room_and_no_rights() -> None:
    """And what else there is to say of it is said."""
    full = replace(OTHER, written_bytes_per_s="failed: OSError: [Errno 28]", free_bytes=10**7, run_lock="free")
    room, lock = not_ok(NODE, full)
    assert room.told == "two: writing to /r failed: OSError: [Errno 28], 0.0 GB are free"
    assert room.advice == "checkpoints need 1.0 GB there; make room, or keep fewer" and "has locked" in lock.told


def test_a_lock_that_no_training_waits_for_is_in_the_way_of_none() -> None:
    """As tests/faults/test_stale_lock.py shows."""
    (found,) = not_ok(replace(NODE, locks={"/x/lock": 3600.0}))
    assert found.state == "look" and found.advice.startswith(
        "nobody compiles so long: `rm /x/lock`; our trainings ask for no such"
    )


def test_a_lock_of_just_now_is_somebody_compiling() -> None:
    assert not_ok(replace(NODE, locks={"/x/lock": 5.0})) == []


def test_cards_of_two_kinds() -> None:
    (found,) = not_ok(replace(NODE, gpus=(Card(name="H100"),)), replace(OTHER, gpus=(Card(name="A100"),)))
    assert (found.check, found.state) == ("gpus", "look")


def test_a_node_without_a_card_beside_one_that_has_some() -> None:
    """It may be that its driver was gone as Ray counted them; a head where no worker comes needs none."""
    cards = replace(NODE, gpus=(Card(name="H100"),), promised_gpus=1)
    (found,) = not_ok(cards, OTHER)
    assert (found.check, found.state) == ("gpus", "look") and found.told.endswith("; two: no GPU") and found.advice
    assert not_ok(cards, replace(OTHER, trains=False)) == []


def test_a_card_that_does_less_than_its_like() -> None:
    """On whichever node its like is; of two the faster one is what is usual."""
    well = Card(name="H100", copied_bytes_per_s=50e9, multiplied_per_s=50e12)
    far, hot = replace(well, copied_bytes_per_s=34e9), replace(well, multiplied_per_s=34e12)
    assert not_ok(replace(NODE, gpus=(well, replace(well, copied_bytes_per_s=36e9)))) == []
    first, second = not_ok(replace(NODE, gpus=(well, far)), replace(OTHER, gpus=(hot, well)))
    usual = "usual here are 50.0 GB/s from the host, 50.0 TFLOP/s"
    assert first.told == f"one: GPU 1, H100, does 34.0 GB/s from the host, 50.0 TFLOP/s; {usual}"
    assert second.told == f"two: GPU 0, H100, does 50.0 GB/s from the host, 34.0 TFLOP/s; {usual}"
    assert (first.check, first.state) == (second.check, second.state) == ("gpus", "look") and first.advice
    (alone,) = not_ok(replace(NODE, gpus=(far, well)))
    assert alone.told.startswith("one: GPU 0, ")
    assert not_ok(replace(NODE, gpus=(well, replace(far, name="A100")))) == []  # another kind may do less


def test_where_checkpoints_are_kept() -> None:
    kept = Kept(name="one", free_bytes=3 * 10**9)
    answers = [
        kept,
        replace(kept, free_bytes=None),
        replace(kept, free_bytes=10**9),
        replace(kept, sees=False),
        replace(kept, failed="cannot be written to: PermissionError: Access Denied"),
        Silent("10.0.0.2", "it does not answer in time"),
    ]
    found = [*of_kept(answers, address="s3://b/p", needed_bytes=2e9)]
    assert [each.state for each in found] == ["ok", "ok", "bad", "bad", "bad", "bad"]
    assert {each.check for each in found} == {"storage"} and all(each.advice for each in found[2:])
    assert found[0].told == "one: what was put at s3://b/p was found, read and deleted, 3.0 GB are free"
    assert found[2].advice == "checkpoints need 2.0 GB there; make room, or keep fewer"
    assert found[3].told == "one does not see s3://b/p as this machine does"
    assert found[4].told == "one: s3://b/p cannot be written to: PermissionError: Access Denied"
    assert found[5].told.startswith("10.0.0.2: ") and found[5].told.endswith("it does not answer in time")


def test_clocks() -> None:
    told = {"a": (0.2, 0.01), "b": (-3.0, 0.01), "s": Silent("s", "it does not answer in time"), "c": (3.0, 2.5)}
    near, far, silent, unsure = of_clocks(told)
    assert (near.state, far.state, silent.state, unsure.state) == ("ok", "look", "bad", "ok")
    assert "-3.000 s" in far.told and silent.told == "s: its clock cannot be read: it does not answer in time"


def test_the_network() -> None:
    assert [*of_network([], "")] == []  # one process has nobody to talk to
    (fast,), (slow,), (none,) = of_network([2e9, 3e9], ""), of_network([3e9, 5e7], ""), of_network([], "timed out")
    assert (fast.state, slow.state, none.state) == ("ok", "look", "bad")
    assert "2 processes add up with 0.05 GB/s" in slow.told and none.told.endswith("timed out") and "IFNAME" in none.advice


def test_a_cluster_that_lets_strangers_in() -> None:
    told = {state: of_token(Stranger(outcome=state, said="no route"), "h:1") for state in ("let in", "refused", "unclear")}
    assert {state: found.state for state, found in told.items()} == {"let in": "bad", "refused": "ok", "unclear": "look"}
    assert told["unclear"].told.endswith("could not be told: no route") and told["unclear"].advice

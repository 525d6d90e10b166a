"""What was found is judged: fine, worth a look, or in the way, each with what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.doctor.card import Card
from pipeline.doctor.checkpoints import Kept
from pipeline.doctor.node import Node
from pipeline.doctor.stranger import Stranger
from pipeline.launch.base import Silent

MOST_SKEW_S = 1.0
LEAST_BYTES_PER_S = 50e6
"""to a disk"""
LEAST_SENT_PER_S = 100e6
"""from node to node: the gradients of a ResNet-34, 87 MB, in some two seconds"""
MOST_OFF = 1e-4
"""of the largest number: float32 holds 7 digits, and the sums of the tiny inputs lose one or two"""
OLDEST_LOCK_S = 600.0
TO_WRITE = "make room, where the disk or a quota is full; else see the folder's owner, its rights and its mount"
SICK = 0.7
"""of what is usual among cards of a kind: one that does less is sick, or somebody uses it"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Of one check, of one node or of all."""

    check: str
    state: Literal["ok", "look", "bad"]
    told: str
    advice: str = ""


def of_silent(nodes: Sequence[Silent]) -> Iterator[Finding]:
    for node in nodes:
        advice = "see that it is up and has what the others have installed; `spiketrain doctor` on it tells more"
        yield Finding(check="node", state="bad", told=f"{node.address} cannot be examined: {node.why}", advice=advice)


def of_unwritten(runs: str, why: str) -> Finding:
    told = f"this machine cannot put a file into {runs}: {why}; nothing else was looked at"
    return Finding(check="storage", state="bad", told=told, advice=TO_WRITE)


def of_nodes(nodes: Sequence[Node], *, runs: str, needed_bytes: float) -> Iterator[Finding]:
    if not nodes:
        return
    yield from _versions(nodes)
    yield from _gpus(nodes)
    for node in nodes:
        yield from _storage(node, runs=runs, needed_bytes=needed_bytes)
        yield from _reading(node)
        yield from _ops(node)
        yield from _locks(node)


def of_kept(answers: Sequence[Kept | Silent], *, address: str, needed_bytes: float) -> Iterator[Finding]:
    """Whether checkpoints can be kept at an address, as each node has tried. `needed_bytes`: of room, where that is known."""
    for kept in answers:
        if isinstance(kept, Silent):
            told = f"{kept.address}: whether {address} keeps checkpoints could not be tried: {kept.why}"
            advice = "see that it is up and reaches the store; of another than Amazon's, AWS_ENDPOINT_URL there"
            yield Finding(check="storage", state="bad", told=told, advice=advice)
        elif kept.failed:
            advice = "see the address, its owner and rights; of a store, the keys in the environment there (AWS_ACCESS_KEY_ID)"
            yield Finding(check="storage", state="bad", told=f"{kept.name}: {address} {kept.failed}", advice=advice)
        elif not kept.sees:
            advice = "name storage that all nodes share with --checkpoints"
            told = f"{kept.name} does not see {address} as this machine does"
            yield Finding(check="storage", state="bad", told=told, advice=advice)
        else:
            yield _room(kept, address=address, needed_bytes=needed_bytes)


def _room(kept: Kept, *, address: str, needed_bytes: float) -> Finding:
    told = f"{kept.name}: what was put at {address} was found, read and deleted"
    if kept.free_bytes is None:
        return Finding(check="storage", state="ok", told=told)
    told += f", {kept.free_bytes / 1e9:.1f} GB are free"
    if kept.free_bytes >= needed_bytes:
        return Finding(check="storage", state="ok", told=told)
    advice = f"checkpoints need {needed_bytes / 1e9:.1f} GB there; make room, or keep fewer"
    return Finding(check="storage", state="bad", told=told, advice=advice)


def of_clocks(skews: Mapping[str, tuple[float, float] | Silent]) -> Iterator[Finding]:
    """`skews`: seconds by which a node's clock is ahead of this one, and how uncertain that is."""
    for name, skew in skews.items():
        if isinstance(skew, Silent):
            told = f"{name}: its clock cannot be read: {skew.why}"
            yield Finding(check="clock", state="bad", told=told, advice="see that it is up, and its Ray is not overloaded")
            continue
        ahead, uncertain = skew
        told = f"{name}: {ahead:+.3f} s against this machine, give or take {uncertain:.3f}"
        if abs(ahead) - uncertain > MOST_SKEW_S:
            yield Finding(
                check="clock", state="look", told=told, advice="let NTP or chrony set it; journals mix the clocks of nodes"
            )
        else:
            yield Finding(check="clock", state="ok", told=told)


def of_network(speeds: Sequence[float], error: str) -> Iterator[Finding]:
    """`speeds`: bytes per second of each process that added numbers up with all others; `error`: why they could not."""
    if error:
        advice = (
            "open all ports between the nodes, name the network's interface with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, "
            "and see that no card is in use"
        )
        yield Finding(check="network", state="bad", told=f"processes on all nodes do not come together: {error}", advice=advice)
    elif speeds:
        told = f"{len(speeds)} processes add up with {min(speeds) / 1e9:.2f} GB/s over each link"
        if min(speeds) < LEAST_SENT_PER_S:
            advice = (
                "gradients will be slow: see that nodes talk over their fastest network (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
            )
            yield Finding(check="network", state="look", told=told, advice=advice)
        else:
            yield Finding(check="network", state="ok", told=told)


def of_token(stranger: Stranger, address: str) -> Finding:
    if stranger.outcome == "let in":
        advice = "start Ray with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH: now whoever reaches it runs code as you"
        return Finding(check="auth", state="bad", told=f"the Ray at {address} lets everybody in", advice=advice)
    if stranger.outcome == "unclear":
        told = f"whether the Ray at {address} asks for its token could not be told: {stranger.said}"
        return Finding(check="auth", state="look", told=told, advice="see that RAY_AUTH_MODE=token is set where it is started")
    return Finding(check="auth", state="ok", told=f"the Ray at {address} asks for its token")


def _versions(nodes: Sequence[Node]) -> Iterator[Finding]:
    differing = False
    for package in nodes[0].versions:
        found = [node.versions[package] for node in nodes]
        if len(set(found)) > 1:
            differing = True
            told = f"{package}: " + ", ".join(f"{node.name} has {version}" for node, version in zip(nodes, found, strict=True))
            yield Finding(check="versions", state="bad", told=told, advice="install the same on all: `LOCKED=1 make setup`")
        elif "not installed" in found:
            differing = True
            yield Finding(check="versions", state="bad", told=f"{package} is not installed", advice="`make setup`")
    if not differing:
        told = ", ".join(f"{name} {nodes[0].versions[name]}" for name in ("python", "torch", "ray", "deepspeed", "ffcv"))
        alike = f", on {len(nodes)} nodes alike" if len(nodes) > 1 else ""
        yield Finding(check="versions", state="ok", told=told + alike)


def _gpus(nodes: Sequence[Node]) -> Iterator[Finding]:
    for node in nodes:
        for gpu in node.gpus:
            if gpu.name.startswith("failed"):
                advice = "see nvidia-smi and the kernel's log there; mend the card, or leave the node out"
                yield Finding(check="gpus", state="bad", told=f"{node.name}: a GPU {gpu.name}", advice=advice)
        if node.unusable is not None:
            told, advice = node.unusable
            yield Finding(check="gpus", state="bad", told=f"{node.name}: {told}", advice=advice)
        elif len(node.gpus) < node.promised_gpus:
            told = f"{node.name}: torch finds {len(node.gpus)} of {node.promised_gpus} GPUs"
            advice = (
                "see nvidia-smi and the kernel's log there, and that torch is a build for GPUs; mend it, or leave the node out; "
                "without Ray, CUDA_VISIBLE_DEVICES says which are to be used"
            )
            yield Finding(check="gpus", state="bad", told=told, advice=advice)
    nodes = [node for node in nodes if _has_its_cards(node)]
    if not nodes:
        return
    kinds = {tuple(gpu.name for gpu in node.gpus) for node in nodes if node.gpus or node.trains}
    told = "; ".join(f"{node.name}: {_told(node.gpus)}" for node in nodes)
    if len(kinds) > 1:
        advice = "a ring is as fast as its slowest card, and leaves out nodes without any: train on nodes that are alike"
        yield Finding(check="gpus", state="look", told=told, advice=advice)
    else:
        yield Finding(check="gpus", state="ok", told=told)
    yield from _slow(nodes)


def _has_its_cards(node: Node) -> bool:
    return (
        node.unusable is None
        and len(node.gpus) >= node.promised_gpus
        and not any(gpu.name.startswith("failed") for gpu in node.gpus)
    )


def _told(gpus: Sequence[Card]) -> str:
    if not gpus:
        return "no GPU"
    slowest = _figures(min(gpu.copied_bytes_per_s for gpu in gpus), min(gpu.multiplied_per_s for gpu in gpus))
    return f"{', '.join(gpu.name for gpu in gpus)} ({slowest})"


def _figures(copied: float, multiplied: float) -> str:
    return f"{copied / 1e9:.1f} GB/s from the host, {multiplied / 1e12:.1f} TFLOP/s"


def _slow(nodes: Sequence[Node]) -> Iterator[Finding]:
    """Cards that do less than others of their kind, wherever those are."""
    for kind in sorted({gpu.name for node in nodes for gpu in node.gpus}):
        alike = [(node, index, gpu) for node in nodes for index, gpu in enumerate(node.gpus) if gpu.name == kind]
        # Of two the faster one.
        copied = statistics.median_high(gpu.copied_bytes_per_s for _, _, gpu in alike)
        multiplied = statistics.median_high(gpu.multiplied_per_s for _, _, gpu in alike)
        for node, index, gpu in alike:
            if gpu.copied_bytes_per_s < SICK * copied or gpu.multiplied_per_s < SICK * multiplied:
                mine, usual = _figures(gpu.copied_bytes_per_s, gpu.multiplied_per_s), _figures(copied, multiplied)
                told = f"{node.name}: GPU {index}, {kind}, does {mine}; usual here are {usual}"
                advice = (
                    "a ring is as fast as its slowest card: see that nobody uses it, its power and temperature "
                    "(`nvidia-smi -q -d PERFORMANCE`), and that its link has all lanes (`nvidia-smi -q -d PCIE`)"
                )
                yield Finding(check="gpus", state="look", told=told, advice=advice)


def _storage(node: Node, *, runs: str, needed_bytes: float) -> Iterator[Finding]:
    if not node.sees_runs:
        advice = "mount the same storage at the same path on every node, or name it with --runs"
        yield Finding(check="storage", state="bad", told=f"{node.name} does not see {runs} as this machine does", advice=advice)
        return
    speed, free = node.written_bytes_per_s, node.free_bytes
    wrote = f"writing to {runs} {speed}" if isinstance(speed, str) else f"writes {speed / 1e6:.0f} MB/s to {runs}"
    told = f"{node.name}: {wrote}, {f'its room {free}' if isinstance(free, str) else f'{free / 1e9:.1f} GB are free'}"
    if not isinstance(free, str) and free < needed_bytes:
        advice = f"checkpoints need {needed_bytes / 1e9:.1f} GB there; make room, or keep fewer"
        yield Finding(check="storage", state="bad", told=told, advice=advice)
    elif isinstance(speed, str) or isinstance(free, str):
        yield Finding(check="storage", state="bad", told=told, advice=TO_WRITE)
    elif speed < LEAST_BYTES_PER_S:
        advice = "checkpoints will be slow: save less often, or to a faster folder"
        yield Finding(check="storage", state="look", told=told, advice=advice)
    else:
        yield Finding(check="storage", state="ok", told=told)
    if node.run_lock != "held":
        mine = f"could lock a file in {runs} that this machine has locked"
        saw = mine if node.run_lock == "free" else f"a lock in {runs} {node.run_lock}"
        advice = (
            "two drivers could train one run at once: mount it with locks that all nodes share (Lustre: flock, not localflock; "
            "NFS: neither nolock nor local_lock), or launch and resume from one machine alone"
        )
        yield Finding(check="storage", state="bad", told=f"{node.name}: {saw}", advice=advice)
    if node.remembers_absence is not None:
        told = f"{node.name}: the NFS at {node.remembers_absence} may hide a new file for a minute"
        advice = "mount it with lookupcache=positive, so that who asks a run to stop or to save is heard at once"
        yield Finding(check="storage", state="look", told=told, advice=advice)


def _reading(node: Node) -> Iterator[Finding]:
    if node.ffcv == "ok":
        yield Finding(check="ffcv", state="ok", told=f"{node.name}: images written and read again")
    else:
        yield Finding(
            check="ffcv", state="bad", told=f"{node.name}: {node.ffcv}", advice="infra/setup.sh builds FFCV and what it needs"
        )
    if node.threading_layer == "tbb":
        yield Finding(check="threads", state="ok", told=f"{node.name}: numba's threads are TBB's")
    else:
        advice = "more than one of --loader-threads is refused there: `pip install tbb`, or `infra/setup.sh --system`"
        told = f"{node.name}: numba's threads are not TBB's: {node.threading_layer}"
        yield Finding(check="threads", state="look", told=told, advice=advice)


def _ops(node: Node) -> Iterator[Finding]:
    advice = "trainings would learn something else: `LOCKED=1 make setup`; if it stays, another driver, or another card"
    wrong = {name: off for name, off in node.off.items() if isinstance(off, str) or off > MOST_OFF}
    for name, off in wrong.items():
        told = off if isinstance(off, str) else f"is off by {off:.1e} of what it is to be, more than {MOST_OFF:.0e}"
        yield Finding(check="ops", state="bad", told=f"{node.name}: {name} on {node.device} {told}", advice=advice)
    if not wrong:
        most = max(off for off in node.off.values() if not isinstance(off, str))
        told = f"{', '.join(node.off)} on {node.device} are off by {most:.1e} at most"
        yield Finding(check="ops", state="ok", told=f"{node.name}: {told}")


def _locks(node: Node) -> Iterator[Finding]:
    old = {file: age for file, age in node.locks.items() if age > OLDEST_LOCK_S}
    for file, age in old.items():
        told = f"{node.name}: {file} is locked for {age / 60:.0f} min"
        advice = f"nobody compiles so long: `rm {file}`; our trainings ask for no such extension, but whatever asks for it waits"
        yield Finding(check="locks", state="look", told=told, advice=advice)
    if not old:
        yield Finding(check="locks", state="ok", told=f"{node.name}: no compilation that has been given up")

"""The errors of launchers, and what each worker gets: a GPU, cores, loader threads.

Worker processes import this file, so it needs nothing that only the driver has.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.core.errors import DataError, UserError
from pipeline.measure.gpu_driver import unusable_gpus

Device = Literal["auto", "cpu", "gpu"]
CountOrAuto = int | Literal["auto"]


class LaunchError(RuntimeError):
    """A run that failed, in one line."""


class WorkersEnded(LaunchError):
    """The workers died and are not started again.

    `is_for_the_user`: the cause stays until a user changes something.
    """

    def __init__(self, message: str, *, is_for_the_user: bool = False) -> None:
        super().__init__(message)
        self.is_for_the_user = is_for_the_user


@dataclass(frozen=True)
class NoAnswer:
    """A node that did not answer a request."""

    address: str
    why: str


def takes_gpus(device: Device, workers: int, gpus: int) -> bool:
    """Whether each worker gets a GPU. `auto` takes GPUs if there are any.

    Raises:
        UserError: there are fewer GPUs than workers. Otherwise some workers would silently train
            on CPUs.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return False
    if gpus < workers:
        need = "1 worker needs a GPU" if workers == 1 else f"{workers} workers need as many GPUs"
        fewer = "fewer workers or " if gpus else ""
        raise UserError(
            f"launch: {need}; there {'is' if gpus == 1 else 'are'} {gpus}; take {fewer}--device cpu"
        )
    return True


def refuse_unusable_cards(device: Device) -> None:
    """Raises: UserError if torch cannot use the GPUs of this machine and `device` is not `cpu`."""
    if device != "cpu" and (problem := unusable_gpus()) is not None:
        raise UserError(f"launch: {problem}")


class Share(NamedTuple):
    """The part of its node that one worker gets."""

    cores: int
    loader_threads: int


def share_of(
    nodes: Iterable[Mapping[str, float]],
    *,
    gpus: bool,
    cores: CountOrAuto = "auto",
    loader_threads: CountOrAuto = "auto",
) -> Share:
    """Cores and loader threads of a worker. Numbers from the user are kept.

    One core decodes some hundreds of JPEGs in a second, which leaves a GPU idle most of the time.
    So a worker with a GPU gets the cores of its node divided by the node's GPUs. A worker on a CPU
    gets one core, which keeps runs comparable.

    Args:
        nodes: the resources of each node, as Ray counts them.
    """
    if cores == "auto":
        # The smallest number of cores per GPU over all nodes.
        with_gpu = [node for node in nodes if gpus and node.get("GPU", 0) >= 1]
        cores = max(1, min((int(has.get("CPU", 0) // has["GPU"]) for has in with_gpu), default=1))
    if loader_threads == "auto":
        loader_threads = cores if gpus and _has_tbb() else 1
    return Share(cores, loader_threads)


def _has_tbb() -> bool:
    from pipeline.data.ffcv.tbb import require_tbb  # imports numba, which takes a second

    with suppress(DataError):
        require_tbb()
        return True
    return False

"""MLflow as a mirror of the journal, kept up to date by a thread of the driver or by `sync`.

The training processes never talk to MLflow. A server that is down costs them nothing, and gets what
it missed when it is back.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.track.connect import SQLITE, TrackingError, one_line, tracking_errors
from pipeline.track.delivery import Delivery
from pipeline.track.system import Sampler

__all__ = ["Mirror", "SyncReport", "TrackingError", "sync", "tracking_uri"]

_LATER = "the journal keeps everything, `spiketrain sync` delivers it later"


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """Points (one metric at one step) sent now, and found in MLflow already."""

    delivered: int
    already_there: int


def tracking_uri(runs_dir: str | os.PathLike[str]) -> str:
    """The absolute URI of the MLflow store: MLFLOW_TRACKING_URI, or `mlflow.db` in the folder.

    MLflow resolves a relative one in the working directory, which differs in a Ray worker.
    """
    uri = (
        os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{Path(runs_dir).resolve() / 'mlflow.db'}"
    )
    if uri.startswith(SQLITE) and not uri.startswith(SQLITE + "/"):
        uri = f"{SQLITE}{Path(uri.removeprefix(SQLITE)).resolve()}"
    return uri


def sync(run_dir: str | os.PathLike[str], *, uri: str) -> SyncReport:
    """Deliver to MLflow the events of this run that it does not hold yet.

    Raises:
        TrackingError: no attempt of the run has begun, or MLflow could not be reached or refused.
    """
    delivery = Delivery(Path(run_dir), uri=uri)
    with tracking_errors(uri):
        if not delivery.advance(leaving="unless driven"):
            raise TrackingError(f"{run_dir} has no journal of a run that began; nothing to deliver")
    return SyncReport(delivered=delivery.delivered, already_there=delivery.already_there)


class Mirror:
    """Keeps MLflow in step with a run's journal from a daemon thread, until `close`.

    It raises nothing: failures are retried, each time later, and `warning` is the newest one in one
    line (None: none). A journal that does not exist yet is waited for. `interval` is the seconds
    between readings of the journal, `patience` the longest wait after failures. Meanwhile it
    samples the machine's load (`system`).
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        uri: str,
        interval: float = 2.0,
        patience: float = 30.0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.uri = uri
        self.warning: str | None = None
        self._interval = interval
        self._patience = patience
        self._leaving = threading.Event()
        self._whole = False
        self._sampler = Sampler(self.run_dir)
        # A daemon: a call that hangs in a dead server must not keep the driver from ending.
        self._thread = threading.Thread(target=self._follow, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver the rest and stop within `timeout` seconds; whether MLflow then has everything.

        With a server that is down it returns False soon. A run without an end in its journal is
        marked KILLED.
        """
        self._sampler.close()
        self._leaving.set()
        self._thread.join(timeout)
        return not self._thread.is_alive() and self._whole

    def _follow(self) -> None:
        delivery: Delivery | None = None
        failures = last_tries = 0
        while True:
            leaving = self._leaving.is_set()
            try:
                delivery = delivery or Delivery(self.run_dir, uri=self.uri)
                delivery.advance(leaving=leaving)
            except Exception as error:  # of any kind: the run goes on
                delivery = None
                failures += 1
                self.warning = f"{one_line(self.uri, error)}; {_LATER}"
            else:
                failures = 0
                self.warning = None
            if not leaving:
                self._leaving.wait(
                    min(self._interval * 2 ** min(failures, 10), self._patience)
                    if failures
                    else self._interval
                )
                continue
            last_tries += 1
            if failures == 0 or last_tries == 2:
                self._whole = failures == 0
                return
            time.sleep(0.3)  # another driver may have held the SQLite file

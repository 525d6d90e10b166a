"""Workers whose checkpoints would lie on different disks are refused before they train; one that
shows late is waited for.
"""

import errno
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline.core import files as shared
from pipeline.core.files import Marker
from pipeline.train import assemble, worker
from pipeline.train.backend.collectives import Ranks
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.job import RankInfo
from tests.helpers.processes import refusal, run_ranks
from tests.helpers.small import job_of, make_run, small_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


def _each_on_its_own_disk(rank: int, ranks: int, folder: str) -> str:
    shared.LOOKS, shared.LOOK_S = 3, 0.1
    run = Path(folder) / "run"
    if rank == 0:
        make_run(run, small_recipe(backend="deepspeed"))
    Ranks(rank, ranks).all_gather_object(None)
    job = job_of(run, small_recipe())
    assemble.store_at = lambda address, run, token: CheckpointStore(Path(folder) / f"disk{rank}")
    return refusal(worker.run, job, RankInfo(rank, ranks))


def test_a_folder_of_each_worker_is_refused_in_one_line(tmp_path: Path) -> None:
    first, second = run_ranks(_each_on_its_own_disk, 2, tmp_path, str(tmp_path))
    for rank, said in enumerate((first, second)):
        assert re.fullmatch(
            rf"UserError: checkpoints: all workers must see \S+/disk{rank} as worker 0 on \S+ does;"
            r" worker 1 on \S+ does not: set --checkpoints or --runs to storage .*",
            said,
        )
    assert not [*(tmp_path / "disk0").iterdir()]


def _slow(rank: int, ranks: int, place: str) -> dict[str, Any]:
    shared.LOOK_S = 0.01
    is_in, beat = Marker.is_in, Mock()
    late = Mock(side_effect=[*[False] * 3 * rank, *[True] * 9])
    Marker.is_in = lambda self, folder: late() and is_in(self, folder)
    about: dict[str, Any] = {
        "rank": rank,
        "gather": Ranks(rank, ranks).all_gather_object,
        "beat": beat,
    }
    shared.check_shared(Path(place), **about)
    (Path(place) / "file").touch()
    said = refusal(lambda: shared.check_shared(Path(place) / "file", **about))
    Path.write_text = Mock(side_effect=OSError(errno.ESTALE, "Stale file handle"))
    stale = refusal(lambda: shared.check_shared(Path(place), **about), of=OSError)
    return {"beats": beat.call_count, "said": said, "stale": stale}


def test_one_that_shows_late_is_waited_for_and_storage_that_fails_is_told_to_every_rank(
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    for found in run_ranks(_slow, 2, tmp_path, str(place)):
        assert found == {
            "beats": 3,
            "said": f"UserError: checkpoints: worker 0 must be able to write to {place}/file; got"
            " File exists",
            # It ends the attempt and not the run: Ray starts them again.
            "stale": f"OSError: [Errno {errno.ESTALE}] checkpoints: worker 0 must be able to write"
            f" to {place}; got Stale file handle",
        }
    assert [path.name for path in place.iterdir()] == ["file"]


def test_a_marker_that_a_killed_worker_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{shared.MARKER}1234").write_text("x")
    CheckpointStore(tmp_path).sweep()
    assert not [*tmp_path.iterdir()]

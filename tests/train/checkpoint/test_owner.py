"""Of two drivers that know one place of checkpoints the later has it; the earlier tells nothing
whole, and deletes nothing.
"""

import errno
import uuid
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from pipeline.core import files
from pipeline.core.errors import UserError
from pipeline.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointStore,
    claim,
    owner_of,
    store_at,
)
from pipeline.train.checkpoint import checkpoints as thread
from tests.helpers.few import TRAINER, Counting, backend, content, feedback, save

pytestmark = pytest.mark.timeout(60)

OF_A = {**TRAINER, "run_id": "a" * 32, "study": "s", "run": "first"}


@pytest.fixture(params=["folder", "memory"])
def store_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], CheckpointStore]:
    """The one place, as a run of each name knows it."""
    address = (
        str(tmp_path / "elsewhere")
        if request.param == "folder"
        else f"memory://owned/{uuid.uuid4().hex}"
    )
    return lambda run: store_at(address, tmp_path / run)


def claimed(place: CheckpointStore, run: str = "first") -> CheckpointStore:
    token = claim(place, run=run, run_id="a" * 32, study="s")
    return CheckpointStore(place.url, place.staging, token=token)


def test_a_place_that_is_anothers_is_not_claimed_and_nothing_in_it_is_touched(
    store_of: Callable[[str], CheckpointStore],
) -> None:
    place = store_of("first")
    save(Checkpoints(place, attempt="a"), 1, backend(), Counting(), OF_A)
    there, mine = content(place), {"run": "mine", "run_id": "b" * 32, "study": "s"}
    theirs = r"must belong to run bbbbbbbb \(mine\); it belongs to run aaaaaaaa \(first"
    with pytest.raises(CheckpointError, match=rf"{theirs}\)$"):
        claim(place, **mine)  # a checkpoint tells, no driver has yet
    with pytest.raises(FileNotFoundError):
        place.read("owner.json")
    token = claimed(place).token
    with pytest.raises(CheckpointError, match=rf"{theirs}, driven on \S+ since "):
        claim(place, **mine)
    owner = owner_of(place)
    assert owner is not None and owner.token == token and content(place) == there
    place.write("owner.json", b"[]")
    with pytest.raises(
        CheckpointError,
        match=r"json must name the owner of the store; it is damaged: .*; got \[\]; delete it",
    ):
        claimed(place)


def test_a_full_disk_leaves_the_owner_that_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = CheckpointStore(tmp_path)
    token = claimed(place).token

    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(files, "sync_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        claimed(place)
    owner = owner_of(place)
    assert (
        owner is not None
        and owner.token == token
        and [path.name for path in tmp_path.iterdir()] == ["owner.json"]
    )


@pytest.mark.parametrize("when", ["before its manifest", "with its manifest"])
def test_the_earlier_of_two_drivers_stops_at_its_save_and_tells_nothing_whole(
    store_of: Callable[[str], CheckpointStore], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    first, told = claimed(store_of("first")), list[str]()
    one = Checkpoints(first, attempt="a", keep=1)
    save(one, 1, backend(1), Counting(1), OF_A)

    def taken_over() -> None:
        second = claimed(store_of("second"), "second")
        second.sweep()
        save(Checkpoints(second, attempt="b", keep=3), 2, backend(2), Counting(2), OF_A)

    seal, check = thread.seal, first.check_owner

    def sealed(*given: object) -> None:
        seal(*given)  # type: ignore[arg-type]
        if not told:
            told.append("sealed")
            taken_over()

    def checked() -> None:
        if "step_00000002" in first.names() and not told:  # after its last step
            told.append("finished")
            claimed(store_of("second"), "second")
        check()

    if when == "before its manifest":
        monkeypatch.setattr(thread, "seal", sealed)
    else:
        monkeypatch.setattr(first, "check_owner", checked)
    one.save(2, backend(3), Counting(3), OF_A)
    with pytest.raises(
        UserError,
        match=r"cannot be written after step 2: checkpoints: this driver must own .*second",
    ) as said:
        one.wait()
    assert "\n" not in str(said.value) and one.done() is None
    assert "step_00000001" in store_of("third").names()  # with keep=1 it would have gone
    for change in (
        first.sweep,
        lambda: first.delete("step_00000001"),
        lambda: first.set_aside("step_00000001", "x"),
    ):
        with pytest.raises(CheckpointError, match="this driver must own"):
            change()
    if when == "before its manifest":
        assert feedback(store_of("third")) == 2


def test_what_an_abandoned_attempt_still_uploads_reaches_no_checkpoint_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, put = store_at(f"memory://owned/{uuid.uuid4().hex}", tmp_path), CheckpointStore._put
    late = tmp_path / ".writing-a-step_00000001"
    late.mkdir()
    (late / "model.safetensors").write_bytes(b"late")

    def meanwhile(self: CheckpointStore, file: Path, path: str) -> None:
        monkeypatch.setattr(CheckpointStore, "_put", put)
        save(Checkpoints(place, attempt="b"), 1, backend(2), Counting(2), OF_A)
        put(self, file, path)

    monkeypatch.setattr(CheckpointStore, "_put", meanwhile)
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):  # it is not sealed
        place.finish(late, "step_00000001")
    assert feedback(place) == 2

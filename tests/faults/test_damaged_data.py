"""Runs whose data is damaged, before they start or while they read it; the bits are those of a run told what to leave out."""

from __future__ import annotations

import errno
import importlib
import io
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import disk
from pipeline.data import manifest as manifests
from pipeline.data.beton import Beton
from pipeline.data.care import ONE_IN, Verify
from pipeline.data.damage import Page
from pipeline.data.errors import LoaderError
from pipeline.data.format import JPG, RAW, BetonWriter
from pipeline.data.order import held_out as held_out_of
from pipeline.data.order import permutation
from pipeline.guards.damaged import Damage
from pipeline.job import STOP
from pipeline.launch.cluster import Cluster
from pipeline.launch.inline import Inline
from pipeline.launch.prepare import prepare
from pipeline.random import PAGE, below, bits
from pipeline.recipe import Recipe, spec
from pipeline.refused import Refused
from pipeline.rules.sltt import SLTT
from pipeline.run import compose
from pipeline.run.attempt import Attempt
from pipeline.track.jsonl import read
from pipeline.track.state import state_of
from tests.small import Command, command, job_of, make_run, same_weights, small_recipe

pytestmark = pytest.mark.timeout(120)

SEED = 20261126  # of the pages and steps at which something happens
SIDE, IN_A_PAGE, PAGE_BYTES = 8, 5, 1024  # pixels, images of 3 x 8 x 8 bytes
JPEG_BYTES, JPEG_PAGE_BYTES = 800, 4096
EPOCH, CHECKPOINTS = 8, sorted({*range(0, 25, 3), *range(0, 25, 8)})  # of three epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training images on 13 pages, 20 to evaluate on: written as any data set is, but for the size of a page."""
    return written(tmp_path_factory.mktemp("whole"), lambda image: image.tobytes(), mode=RAW, page_bytes=PAGE_BYTES)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as JPEGs, with bytes behind the end of each: as many on a page."""

    def stored(image: Image.Image) -> bytes:
        image.save(file := io.BytesIO(), "jpeg")
        assert len(file.getvalue()) <= JPEG_BYTES
        return file.getvalue().ljust(JPEG_BYTES, b"\0")

    return written(tmp_path_factory.mktemp("jpegs"), stored, mode=JPG, page_bytes=JPEG_PAGE_BYTES)


def written(folder: Path, stored: Callable[[Image.Image], bytes], *, mode: int, page_bytes: int) -> Path:
    rng = np.random.default_rng(SEED)
    classes, about = [str(number) for number in range(10)], {"mode": mode, "height": SIDE, "width": SIDE}
    for name, count in (("train", 64), ("val", 20)):
        path, content, labels = folder / f"{name}.beton", manifests.ContentHash(classes), [i % 10 for i in range(count)]
        writer = BetonWriter(path, capacity=count, page_bytes=page_bytes)
        for label in labels:
            image = stored(Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)))
            writer.add(image, label=label, **about)
            content.add(image, label=label, **about)
        writer.finish()
        made = manifests.describe(path, name=path.name, content=content.hexdigest(), classes=classes, labels=labels)
        made.write(folder / f"{path.name}{manifests.SUFFIX}")
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "data")


@pytest.fixture
def page() -> int:
    return random.Random(SEED).randrange(12)


def samples_of(page: int) -> tuple[int, int]:
    return page * IN_A_PAGE, (page + 1) * IN_A_PAGE


def flip(data: Path, page: int, *, name: str = "train") -> None:
    """One bit of the page's second sample."""
    path = data / f"{name}.beton"
    at = manifests.read(path).pages_offset + page * PAGE_BYTES + 3 * SIDE * SIDE + 7
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def zero_a_jpeg(data: Path, page: int) -> None:
    """A sector of the page's second sample, from its beginning on."""
    with (data / "train.beton").open("r+b") as file:
        file.seek(manifests.read(data / "train.beton").pages_offset + page * JPEG_PAGE_BYTES + JPEG_BYTES)
        file.write(bytes(512))


def bad_sector(patch: pytest.MonkeyPatch, data: Path, page: int) -> None:
    """Whoever reads the page is told that its medium fails; what is mapped into memory already stays as it is."""
    path, pread = data / "train.beton", os.pread
    sector = manifests.read(path).pages_offset + page * PAGE_BYTES + 7

    def fails(file: int, length: int, offset: int) -> bytes:
        if offset <= sector < offset + length and os.path.samestat(os.fstat(file), path.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, length, offset)

    patch.setattr(os, "pread", fails)
    patch.setattr(disk, "TRY_S", 0.0)


def no_storage(patch: pytest.MonkeyPatch, data: Path, number: int) -> None:
    """Whoever reads the file, wherever, is told that it fails; what is mapped into memory already stays as it is."""
    path, pread = data / "train.beton", os.pread

    def fails(file: int, length: int, offset: int) -> bytes:
        if os.path.samestat(os.fstat(file), path.stat()):
            raise OSError(number, os.strerror(number))
        return pread(file, length, offset)

    patch.setattr(os, "pread", fails)
    patch.setattr(disk, "TRY_S", 0.0)


def recipe(data: Path, **changes: Any) -> Recipe:
    how = {"classes": 10, "size": SIDE, "channels": 1, "crop": "shift", "mean": (0.5,), "std": (0.5,)}
    return small_recipe(data=spec(Beton, folder=str(data), **how), replicas_every=0, **{"max_damaged_pages": 2} | changes)


def train(run: Path, recipe: Recipe, *, verify: Any = "full") -> dict[str, Any] | None:
    job = job_of(run, recipe) if run.exists() else make_run(run, recipe)
    with Inline() as launcher:
        return launcher.run(replace(job, verify=verify), "test")


def counted(summary: dict[str, Any] | None) -> tuple[int, int, int]:
    assert summary is not None
    return summary["damaged_pages"], summary["left_out_samples"], summary["restarts"]


def told(run: Path, whole: Path, pages: list[int], **changes: Any) -> Path:
    """The run on whole files that was told to leave the same samples out."""
    made = recipe(whole, **changes)
    make_run(run, made)
    about = {"file": "as it was told to", "offset": 0, "size": PAGE_BYTES}
    Damage(tuple(Page(number=page, samples=(samples_of(page),), **about) for page in pages)).write(run)
    train(run, made)
    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run / "journal.jsonl") if event["event"] == kind]


def once_checked(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Acts once, after a run has found its files whole and before it reads them."""
    original, acted = compose.find_damage, False

    def find_damage(*words: Any) -> Damage:
        nonlocal acted
        found = original(*words)
        if not acted:
            act()
        acted = True
        return found

    patch.setattr(compose, "find_damage", find_damage)


def test_a_page_that_is_damaged_at_the_start_is_left_out(tmp_path: Path, whole: Path, data: Path, page: int) -> None:
    flip(data, page)
    summary = train(tmp_path / "hit", recipe(data), verify="sampled")
    first, end = samples_of(page)
    [found] = events(tmp_path / "hit", "damaged")
    assert (found["file"], found["page"], found["samples"]) == (str(data / "train.beton"), page, IN_A_PAGE)
    assert (found["step"], found["left_out"]) == (0, [[first, end]])
    assert counted(summary) == (1, IN_A_PAGE, 0)
    assert same_weights(tmp_path / "hit", told(tmp_path / "told", whole, [page]))
    train(tmp_path / "nothing", recipe(whole))
    assert not same_weights(tmp_path / "hit", tmp_path / "nothing")


def test_what_is_damaged_while_it_is_read_is_never_learnt(
    tmp_path: Path, whole: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything was read: the run that was told is the whole oracle."""
    pages = [page, (page + 5) % 12]
    with monkeypatch.context() as patch:
        once_checked(patch, lambda: [flip(data, each) for each in pages] and None)
        summary = train(tmp_path / "hit", recipe(data))
    assert {event["page"] for event in events(tmp_path / "hit", "damaged")} == set(pages)
    assert counted(summary) == (2, 2 * IN_A_PAGE, 1)
    assert events(tmp_path / "hit", "failed") == []
    assert same_weights(tmp_path / "hit", told(tmp_path / "told", whole, pages))


@pytest.mark.parametrize(("when", "restarts"), [("at the start", 0), ("while it is read", 1)])
def test_a_page_on_a_bad_sector_is_left_out(
    tmp_path: Path, whole: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch, when: str, restarts: int
) -> None:
    with monkeypatch.context() as patch:
        if when == "at the start":
            bad_sector(patch, data, page)
        else:
            once_checked(patch, lambda: bad_sector(patch, data, page))
        summary = train(tmp_path / "hit", recipe(data, max_damaged_pages=1, epochs=1))
    [found] = events(tmp_path / "hit", "damaged")
    assert (found["file"], found["page"], found["left_out"]) == (str(data / "train.beton"), page, [[*samples_of(page)]])
    assert counted(summary) == (1, IN_A_PAGE, restarts)
    assert same_weights(tmp_path / "hit", told(tmp_path / "told", whole, [page], epochs=1))


def test_a_page_on_a_bad_sector_is_named_by_a_run_that_may_leave_none_out_and_by_verify(
    tmp_path: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Command = command(monkeypatch, capsys)
    bad_sector(monkeypatch, data, page)
    first, end = samples_of(page)
    named = rf"data: \S+train\.beton: page {page} \(bytes \d+ to \d+, samples {first} to {end - 1}\) "
    named += r"cannot be read \(Input/output error\): damaged"
    with pytest.raises(Refused, match=rf"^{named}; max_damaged_pages=0: restore the file$"):
        train(tmp_path / "hit", recipe(data, max_damaged_pages=0))
    code, _, line = run("verify", str(data))
    assert (code, len(line.splitlines())) == (2, 1) and re.search(named, line)


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_is_away_damages_nothing(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, when: str, number: int
) -> None:
    """Its worker dies, and the next one reads on: nothing is left out, and the bits are those of a run that nobody touched."""
    made = recipe(data, epochs=1)
    with monkeypatch.context() as patch:
        if when == "at the start":
            no_storage(patch, data, number)
        else:
            once_checked(patch, lambda: no_storage(patch, data, number))
        with pytest.raises((OSError, LoaderError), match=os.strerror(number)):
            train(tmp_path / "hit", made)
    assert counted(train(tmp_path / "hit", made)) == (0, 0, int(when == "while it is read"))
    train(tmp_path / "untouched", recipe(whole, epochs=1))
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")


def test_damage_in_the_middle_leads_back_to_the_newest_checkpoint(
    tmp_path: Path, whole: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_in_the_middle(tmp_path, whole, data, lambda: flip(data, page), monkeypatch, verify="full")


def test_the_page_of_an_image_that_cannot_be_decoded_is_compared_and_left_out(
    tmp_path: Path, jpegs: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no draw asks for it."""
    monkeypatch.setitem(ONE_IN, "sampled", 1 << 30)
    data = shutil.copytree(jpegs, tmp_path / "data")
    damaged_in_the_middle(tmp_path, jpegs, data, lambda: zero_a_jpeg(data, page), monkeypatch, verify="sampled")
    [found] = events(tmp_path / "hit", "damaged")
    assert (found["page"], found["left_out"]) == (page, [[*samples_of(page)]])


def damaged_in_the_middle(
    tmp_path: Path, whole: Path, data: Path, damage: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, verify: Verify
) -> None:
    """It has been learnt from by then, and is read again in the third epoch, if not in the second."""
    step, original = random.Random(SEED).randrange(EPOCH, 2 * EPOCH), Attempt._between_batches

    def between(self: Attempt, epoch: int, *, last: bool) -> None:
        original(self, epoch, last=last)
        if self.step == step and not self.parts.damage.pages:
            damage()

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "_between_batches", between)
        train(tmp_path / "hit", recipe(data, epochs=3), verify=verify)
    first, again = [event["step"] for event in events(tmp_path / "hit", "start")]
    assert first == 0 and again >= max(each for each in CHECKPOINTS if each <= step)

    def stopped(self: Attempt, epoch: int, *, last: bool) -> None:
        original(self, epoch, last=last)
        self.stop_asked = self.stop_asked or self.step == again

    made = recipe(whole, epochs=3)
    make_run(tmp_path / "told", made)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "_between_batches", stopped)
        assert train(tmp_path / "told", made) is None
    Damage.read(tmp_path / "hit").write(tmp_path / "told")
    train(tmp_path / "told", made)
    assert [event["step"] for event in events(tmp_path / "told", "start")] == [0, again]
    assert same_weights(tmp_path / "hit", tmp_path / "told")


def test_what_was_left_out_stays_so_where_the_folder_is_lost_and_the_file_mended(
    tmp_path: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost before any step but the last; its checkpoints were kept elsewhere."""
    step, between = random.Random(SEED).randrange(1, 2 * EPOCH), Attempt._between_batches

    def stopped(self: Attempt, epoch: int, *, last: bool) -> None:
        if self.step == step:
            (self.folder / STOP).touch()
        between(self, epoch, last=last)

    flip(data, page)
    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "_between_batches", stopped)
        assert train(tmp_path / "lost", recipe(data)) is None
    make_run(tmp_path / "hit", recipe(data))
    shutil.copytree(tmp_path / "lost" / "checkpoints", tmp_path / "hit" / "checkpoints")
    train(tmp_path / "whole_folder", recipe(data))
    flip(data, page)
    train(tmp_path / "hit", recipe(data))
    assert [event["step"] for event in events(tmp_path / "hit", "start")] == [step]
    assert [event["page"] for event in events(tmp_path / "hit", "damaged")] == [page]
    assert same_weights(tmp_path / "hit", tmp_path / "whole_folder")


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
def test_one_page_too_many_stops_the_run_in_one_line_and_mended_it_goes_on(
    when: str, tmp_path: Path, whole: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, end = samples_of(page)
    said = rf"^data: \S+train\.beton: page {page} \(bytes \d+ to \d+, samples {first} to {end - 1}\) differs from its manifest: "
    said += r"damaged; max_damaged_pages=0: restore the file$"
    made = recipe(data, max_damaged_pages=0)
    with monkeypatch.context() as patch:
        if when == "at the start":
            flip(data, page)
        else:
            once_checked(patch, lambda: flip(data, page))
        with pytest.raises(Refused, match=said):
            train(tmp_path / "hit", made)
    assert state_of(tmp_path / "hit") == "failed" and not Damage.read(tmp_path / "hit").pages
    flip(data, page)
    train(tmp_path / "hit", made)
    train(tmp_path / "nothing", recipe(whole))
    assert same_weights(tmp_path / "hit", tmp_path / "nothing")


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_what_is_evaluated_on_is_never_left_out_and_mended_the_run_goes_on(
    when: str, held_out: float, tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, page = "val", 3
    if held_out:
        _, asked = held_out_of(64, held_out)
        name, page = "train", int(asked[0]) // IN_A_PAGE
    made, untouched = (recipe(folder).override({"data.held_out": held_out}) for folder in (data, whole))
    with monkeypatch.context() as patch:
        if when == "at the start":
            flip(data, page, name=name)
        else:
            once_checked(patch, lambda: flip(data, page, name=name))
        said = rf"{name}\.beton: page {page} .* damaged; samples that are evaluated on are in it: restore the file"
        with pytest.raises(Refused, match=said):
            train(tmp_path / "hit", made)
    assert (events(tmp_path / "hit", "start") == []) is (when == "at the start")
    assert not Damage.read(tmp_path / "hit").pages
    flip(data, page, name=name)
    train(tmp_path / "hit", made)
    train(tmp_path / "untouched", untouched)
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")


def test_each_evaluation_compares_other_pages(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of which the draw for step 0 compares nothing is found by one of twelve evaluations all the same."""
    one_in, samples = 8, np.arange(20)
    monkeypatch.setitem(ONE_IN, "sampled", one_in)
    drawn = samples[below(bits(0, 0, samples, PAGE), one_in) == 0]
    page = min({*range(4)} - {*(drawn // IN_A_PAGE).tolist()})
    with monkeypatch.context() as patch:
        once_checked(patch, lambda: flip(data, page, name="val"))
        with pytest.raises(Refused, match=rf"val\.beton: page {page} .* damaged; samples that are evaluated on are in it"):
            train(tmp_path / "hit", recipe(data, epochs=12), verify="sampled")
    assert events(tmp_path / "hit", "evaluation") != []  # the first one saw others


def test_a_file_that_nobody_reads_may_be_damaged(tmp_path: Path, whole: Path, data: Path) -> None:
    """With a share of the training file held out to evaluate on."""
    flip(data, 3, name="val")
    for name, folder in (("hit", data), ("nothing", whole)):
        train(tmp_path / name, recipe(folder, max_damaged_pages=0, epochs=1).override({"data.held_out": 0.25}))
    assert events(tmp_path / "hit", "damaged") == []
    assert same_weights(tmp_path / "hit", tmp_path / "nothing")


def test_a_truncated_file_is_refused_in_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Command = command(monkeypatch, capsys)
    path = data / "train.beton"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    changes = ("--set", f"data.folder={data}", "--set", "data.size=8")
    code, _, line = run("launch", "recipes/fashion/sltt.py", "--inline", *changes, "--runs", str(tmp_path / "runs"))
    assert (code, len(line.splitlines())) == (2, 1)
    assert f"{path} must have {size} bytes by its manifest; got {size - 100}: truncated" in line
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped into memory: whoever reads beyond its new end is killed without a word."""
    path, original = data / "train.beton", Attempt._micro_batches
    size = path.stat().st_size

    def micro_batches(self: Attempt, source: Any) -> Any:
        yield from original(self, source)
        with path.open("r+b") as file:
            file.truncate(size - 100)  # of the table at its end, which nobody reads by now

    monkeypatch.setattr(Attempt, "_micro_batches", micro_batches)
    with pytest.raises(Refused, match=rf"train\.beton must have {size} bytes by its manifest; got {size - 100}: truncated"):
        train(tmp_path / "hit", recipe(data, epochs=1), verify="sampled")
    assert [event["step"] for event in events(tmp_path / "hit", "step")] != []  # it was whole when it was opened


def test_a_note_that_is_damaged_is_named(tmp_path: Path, data: Path) -> None:
    made = recipe(data)
    make_run(tmp_path / "hit", made)
    (tmp_path / "hit" / "damaged.json").write_text('{"pages": [{"file": "train.beton"}]}')
    with pytest.raises(Refused, match=r"damaged\.json: must hold pages and their samples; got"):
        train(tmp_path / "hit", made)


LAB = """
import os
from pathlib import Path
from pipeline.rules.sltt import SLTT

HERE = Path(__file__).parent

class Flips(SLTT):
    \"\"\"SLTT beside a disk that fails in the first batch.\"\"\"

    def objectives(self, model, x_TB, loss_of, *, step, rows):
        if self.world.rank == 1 and not (HERE / "flipped").exists():
            (HERE / "flipped").touch()
            with open({file!r}, "r+b") as file:
                [byte] = os.pread(file.fileno(), 1, {at})
                os.pwrite(file.fileno(), bytes([byte ^ 4]), {at})
        return super().objectives(model, x_TB, loss_of, step=step, rows=rows)
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_two_workers_leave_the_same_samples_out(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = np.argsort(permutation(64, seed=0, epoch=0))
    page = max(range(12), key=lambda each: places[slice(*samples_of(each))].min())
    size = 2
    assert places[slice(*samples_of(page))].min() // size >= 6  # no worker has read ahead so far when it is damaged
    place = {"file": str(data / "train.beton"), "at": manifests.read(data / "train.beton").pages_offset + page * PAGE_BYTES}
    (tmp_path / "damage_lab.py").write_text(LAB.format(**place))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, runs = command(monkeypatch, capsys), tmp_path / "runs"
    flips = importlib.import_module("damage_lab").Flips
    how = {"backend": "deepspeed", "batch_size": size, "max_damaged_pages": 1}
    cluster = Cluster(workers=2, device="cpu", verify="full")
    prepare(recipe(data, rule=spec(flips), **how), cluster, runs, name="hit", trust=("damage_lab",))
    prepare(recipe(whole, rule=spec(SLTT), **how), cluster, runs, name="told")
    for name in ("hit", "told"):
        code, _, said = run("resume", name, "--runs", str(runs), "--trust", "damage_lab")
        assert code == 0, said
        Damage.read(runs / "hit").write(runs / "told")
    assert [event["page"] for event in events(runs / "hit", "damaged")] == [page]
    assert [len(events(runs / name, "start")) for name in ("hit", "told")] == [2, 1]
    assert same_weights(runs / "hit", runs / "told", trust=["damage_lab"])

"""Runs whose data is damaged, before they start or while they read it, are refused in one line.

Once the file is restored the run goes on, with the bits of a run that nobody touched.
"""

import errno
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import LoaderError, UserError
from pipeline.core.random import PAGE, below, bits
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import JPG, RAW
from pipeline.data.ffcv.page_checks import ONE_IN
from pipeline.data.order import permutation, split_held_out
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe.recipe import Policy, Recipe, spec
from pipeline.track.run_state import state_of
from pipeline.train import assemble
from pipeline.train.trainer import Trainer
from tests.helpers import damage
from tests.helpers.interruptions import between_batches, newest
from tests.helpers.small import (
    Command,
    Refused,
    events,
    job_of,
    make_run,
    same_weights,
    small_recipe,
    steps_of,
)
from tests.helpers.small_pages import write_pages

pytestmark = pytest.mark.timeout(120)

SEED = 20261126  # of the pages and steps at which something happens
SIDE, IN_A_PAGE, PAGE_BYTES = 8, 5, 1024  # pixels, images of 3 x 8 x 8 bytes
JPEG_BYTES, JPEG_PAGE_BYTES = 800, 4096
DAMAGED = random.Random(SEED).randrange(12)  # the page
DIFFERS, UNREADABLE = "differs from its manifest", r"cannot be read \(Input/output error\)"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training images on 13 pages, 20 to evaluate on: written as any data set is, but for the
    size of a page.
    """
    return written(tmp_path_factory.mktemp("whole"), Image.Image.tobytes, RAW, PAGE_BYTES)


def as_jpeg(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "jpeg")
    assert len(file.getvalue()) <= JPEG_BYTES
    return file.getvalue().ljust(JPEG_BYTES, b"\0")


def written(
    folder: Path, stored: Callable[[Image.Image], bytes], mode: int, page_bytes: int
) -> Path:
    rng = np.random.default_rng(SEED)
    about = {"mode": mode, "height": SIDE, "width": SIDE, "classes": [*"0123456789"]}
    for name, count in (("train.beton", 64), ("val.beton", 20)):
        pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
        images = [stored(Image.fromarray(each)) for each in pixels]
        write_pages(
            folder / name,
            images,
            page_bytes=page_bytes,
            labels=[i % 10 for i in range(count)],
            **about,
        )
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "data")


def store_of(data: Path, page: int, *, name: str = "train", page_bytes: int = PAGE_BYTES) -> int:
    return manifests.read(data / f"{name}.beton").pages_offset + page * page_bytes


def flip(data: Path, page: int = DAMAGED, *, name: str = "train") -> None:
    """One bit of the page's second sample."""
    damage.flip(data / f"{name}.beton", store_of(data, page, name=name) + 3 * SIDE * SIDE + 7)


def bad_sector(patch: pytest.MonkeyPatch, data: Path) -> None:
    sector = store_of(data, DAMAGED) + 7
    damage.fail_reads(
        patch,
        data / "train.beton",
        where=lambda offset, length: offset <= sector < offset + length,
    )


def recipe(data: Path, **changes: Any) -> Recipe:
    how = {"classes": 10, "size": SIDE, "channels": 1, "crop": "shift", "mean": (0.5,)}
    return small_recipe(
        data=spec(Beton, folder=str(data), **how, std=(0.5,)),
        policy=Policy(replicas_every=0),
        **changes,
    )


def train(run: Path, recipe: Recipe, *, verify: Any = "full") -> dict[str, Any] | None:
    job = job_of(run, recipe) if run.exists() else make_run(run, recipe)
    with Inline() as launcher:
        return launcher.run(replace(job, verify=verify), "test")


def assert_goes_on(run: Path, damaged: Recipe, whole: Path) -> dict[str, Any]:
    summary, made = train(run, damaged), damaged.override({"data.folder": str(whole)})
    name = hashlib.sha256(json.dumps(made.to_json()).encode()).hexdigest()
    if not (untouched := whole.with_name(name)).exists():  # trained once for all tests
        train(untouched, made)
    assert same_weights(run, untouched)
    assert summary is not None
    return summary


def break_at(when: str, patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Act at the start, or once after a run has found its files whole and before it reads them."""
    original, has_acted = assemble.check_data, threading.Event()

    def check_data(*words: Any, **named: Any) -> None:
        original(*words, **named)
        if not has_acted.is_set():
            has_acted.set()
            act()

    if when == "at the start":
        act()
    else:
        patch.setattr(assemble, "check_data", check_data)


def named(page: int = DAMAGED, fault: str = DIFFERS, *, name: str = "train") -> str:
    """The line that refuses a page, as a pattern."""
    first, end = page * IN_A_PAGE, (page + 1) * IN_A_PAGE
    samples = rf"page {page} \(bytes \d+ to \d+, samples {first} to {end - 1}\)"
    return (
        rf"data: \S+{name}\.beton is damaged: {samples} {fault}; restore the file or write the data"
        r" again( \(worker \d\))?$"
    )


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize(
    ("how", "name", "held_out", "page"),
    [
        ("flipped", "train", 0.0, DAMAGED),
        pytest.param("bad sector", "train", 0.0, DAMAGED, marks=pytest.mark.full),
        ("of the evaluation set", "val", 0.0, 3),
        pytest.param(
            "held out",
            *("train", 0.25, int(split_held_out(64, 0.25)["val"][0]) // IN_A_PAGE),
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_damaged_page_stops_the_run_in_one_line_and_restored_it_goes_on(
    when: str,
    how: str,
    name: str,
    held_out: float,
    page: int,
    tmp_path: Path,
    whole: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is never learnt from: with `verify="full"` a page is compared before its samples are
    used.
    """
    run, fault = tmp_path / "hit", UNREADABLE if how == "bad sector" else DIFFERS
    made = recipe(data).override({"data.held_out": held_out})
    with monkeypatch.context() as patch:
        spoil = partial(bad_sector, patch, data)
        if fault == DIFFERS:
            spoil = partial(flip, data, page, name=name)
        break_at(when, patch, spoil)
        with pytest.raises(UserError, match=f"^{named(page, fault, name=name)}"):
            train(run, made)
    assert (events(run, "start") == []) is (when == "at the start")
    assert state_of(run) == "failed"
    if fault == DIFFERS:
        spoil()  # the bit is as it was
    assert_goes_on(run, made, whole)


@pytest.mark.parametrize(("how", "fault"), [("flipped", DIFFERS), ("bad sector", UNREADABLE)])
def test_verify_and_launch_name_the_page(
    how: str,
    fault: str,
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Refused,
) -> None:
    if how == "bad sector":
        bad_sector(monkeypatch, data)
    else:
        flip(data)
    launch = ("launch", "recipes/fashion/sltt.py", "--inline", "--set", f"data.folder={data}")
    where = ("--set", "data.size=8", "--set", "batch_size=8", "--runs", str(tmp_path / "runs"))
    for words in (("verify", str(data)), (*launch, *where, "--verify", "full")):
        assert re.search(named(DAMAGED, fault), refused(*words))


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_is_away_damages_nothing(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, when: str, number: int
) -> None:
    made, file = recipe(data, epochs=1), data / "train.beton"
    with monkeypatch.context() as patch:
        break_at(when, patch, lambda: damage.fail_reads(patch, file, number=number))
        with pytest.raises((OSError, LoaderError), match=os.strerror(number)):
            train(tmp_path / "hit", made)
    assert assert_goes_on(tmp_path / "hit", made, whole)["restarts"] == int(
        when == "while it is read"
    )


@pytest.mark.parametrize("verify", ["full", "sampled"])
def test_damage_in_the_middle_is_refused_and_restored_the_run_goes_on_at_the_newest_checkpoint(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """It has been learnt from by then, and is read again in the third epoch, if not in the second.
    The page of an image that cannot be decoded is compared where no draw asks for it, too.
    """
    run, data = tmp_path / "hit", tmp_path / "data"
    step, made = random.Random(SEED).randrange(8, 16), recipe(data, epochs=3)
    if verify == "full":
        shutil.copytree(whole, data)
        start, count = store_of(data, DAMAGED) + 3 * SIDE * SIDE, 1
    else:
        data.mkdir()
        written(data, as_jpeg, JPG, JPEG_PAGE_BYTES)
        start, count = store_of(data, DAMAGED, page_bytes=JPEG_PAGE_BYTES) + JPEG_BYTES, 512
        monkeypatch.setitem(ONE_IN, "sampled", 1 << 30)
    shutil.copytree(data, tmp_path / "kept")

    def damaged(_: Trainer) -> None:
        """From the beginning of the page's second sample on: a sector of a JPEG."""
        with (data / "train.beton").open("r+b") as file:
            file.seek(start)
            file.write(bytes(count))

    with monkeypatch.context() as patch:
        between_batches(patch, damaged, step=step)
        with pytest.raises(UserError, match=f"^{named()}"):
            train(run, made, verify=verify)
    shutil.copytree(tmp_path / "kept", data, dirs_exist_ok=True)
    assert_goes_on(run, made, tmp_path / "kept")
    first, again = steps_of(run, "start")
    assert first == 0 and again >= newest(step)


def test_each_evaluation_compares_other_pages(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of which the draw for step 0 compares nothing is found by one of twelve evaluations
    all the same.
    """
    one_in, samples = 8, np.arange(20)
    drawn = samples[below(bits(0, 0, samples, PAGE), one_in) == 0]
    page = min({*range(4)} - {*(drawn // IN_A_PAGE).tolist()})
    monkeypatch.setitem(ONE_IN, "sampled", one_in)
    break_at("while it is read", monkeypatch, lambda: flip(data, page, name="val"))
    with pytest.raises(UserError, match=named(page, name="val")):
        train(tmp_path / "hit", recipe(data, epochs=12), verify="sampled")
    assert events(tmp_path / "hit", "evaluation") != []  # the first one saw others


def test_a_file_that_nobody_reads_may_be_damaged(tmp_path: Path, whole: Path, data: Path) -> None:
    flip(data, 3, name="val")
    assert_goes_on(
        tmp_path / "hit", recipe(data, epochs=1).override({"data.held_out": 0.25}), whole
    )


def test_a_truncated_file_is_refused_in_one_line(
    tmp_path: Path, data: Path, refused: Refused
) -> None:
    path, runs = data / "train.beton", tmp_path / "runs"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    changes = ("--set", f"data.folder={data}", "--set", "data.size=8")
    line = refused(
        *("launch", "recipes/fashion/sltt.py", "--inline", *changes, "--runs", str(runs))
    )
    assert f"{path} must have {size} bytes by its manifest; got {size - 100}: truncated" in line
    assert not runs.exists()


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped into memory: whoever reads beyond its new end is killed without a word."""
    path, original = data / "train.beton", Trainer._micro_batches
    size = path.stat().st_size

    def micro_batches(self: Trainer, source: Any) -> Any:
        yield from original(self, source)
        os.truncate(path, size - 100)  # of the table at its end, which nobody reads by now

    monkeypatch.setattr(Trainer, "_micro_batches", micro_batches)
    with pytest.raises(
        UserError,
        match=rf"train\.beton must have {size} bytes by its manifest; got {size - 100}: truncated",
    ):
        train(tmp_path / "hit", recipe(data, epochs=1), verify="sampled")
    assert events(tmp_path / "hit", "step") != []  # it was whole when it was opened


LAB = """
import os
from pathlib import Path
from pipeline.rules.sltt import SLTT
from tests.helpers.damage import flip

HERE = Path(__file__).parent

class Flips(SLTT):
    \"\"\"SLTT beside a disk that fails in the first batch.\"\"\"

    def loss_terms(self, model, x_TB, loss_fn, *, step, rows):
        if self.world.rank == 1 and not (HERE / "flipped").exists():
            (HERE / "flipped").touch()
            flip(HERE / "data" / "train.beton", {at})
        return super().loss_terms(model, x_TB, loss_fn, step=step, rows=rows)
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("own_store")
def test_a_page_that_one_of_two_workers_meets_ends_the_run_in_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    places, size = np.argsort(permutation(64, seed=0, epoch=0))[:60].reshape(12, IN_A_PAGE), 2
    page = int(places.min(1).argmax())
    # No worker has read ahead so far when it is damaged.
    assert places[page].min() // size >= 6
    (tmp_path / "damage_lab.py").write_text(LAB.format(at=store_of(data, page)))
    monkeypatch.syspath_prepend(tmp_path)
    runs = tmp_path / "runs"
    made = recipe(
        data,
        rule=spec(importlib.import_module("damage_lab").Flips),
        backend="deepspeed",
        batch_size=size,
    )
    prepare(
        made,
        Cluster(workers=2, device="cpu", verify="full"),
        runs,
        name="hit",
        trust=("damage_lab",),
    )
    code, _, said = spiketrain("resume", "hit", "--runs", str(runs), "--trust", "damage_lab")
    assert code == 2
    assert re.search(named(page), said.strip().splitlines()[-1])
    assert steps_of(runs / "hit", "start") == [0]

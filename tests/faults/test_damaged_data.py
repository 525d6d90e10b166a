"""Runs whose data is damaged, before they start or while they read it, are refused in one line.

Once the file is restored the run goes on, with the bits of a run that nobody touched.
"""

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

from pipeline.core.errors import LoaderError, UserError
from pipeline.core.random import PAGE, below, bits
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import JPG, RAW, BetonWriter
from pipeline.data.ffcv.page_checks import ONE_IN, Verify
from pipeline.data.order import held_out as held_out_of
from pipeline.data.order import permutation
from pipeline.launch.cluster import Cluster
from pipeline.launch.in_process import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe.recipe import Policy, Recipe, spec
from pipeline.track.state import state_of
from pipeline.train import assemble
from pipeline.train.trainer import Trainer
from tests.helpers import damage
from tests.helpers.interruptions import between_batches
from tests.helpers.small import (
    Command,
    events,
    job_of,
    make_run,
    same_weights,
    small_recipe,
    steps_of,
)

pytestmark = pytest.mark.timeout(120)

SEED = 20261126  # of the pages and steps at which something happens
SIDE, IN_A_PAGE, PAGE_BYTES = 8, 5, 1024  # pixels, images of 3 x 8 x 8 bytes
JPEG_BYTES, JPEG_PAGE_BYTES = 800, 4096
EPOCH, CHECKPOINTS = 8, sorted({*range(0, 25, 3), *range(0, 25, 8)})  # of three epochs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 training images on 13 pages, 20 to evaluate on: written as any data set is, but for the
    size of a page.
    """
    return written(
        tmp_path_factory.mktemp("whole"),
        lambda image: image.tobytes(),
        mode=RAW,
        page_bytes=PAGE_BYTES,
    )


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as JPEGs, with bytes behind the end of each: as many on a page."""

    def stored(image: Image.Image) -> bytes:
        image.save(file := io.BytesIO(), "jpeg")
        assert len(file.getvalue()) <= JPEG_BYTES
        return file.getvalue().ljust(JPEG_BYTES, b"\0")

    return written(tmp_path_factory.mktemp("jpegs"), stored, mode=JPG, page_bytes=JPEG_PAGE_BYTES)


def written(
    folder: Path, stored: Callable[[Image.Image], bytes], *, mode: int, page_bytes: int
) -> Path:
    rng = np.random.default_rng(SEED)
    classes, about = (
        [str(number) for number in range(10)],
        {"mode": mode, "height": SIDE, "width": SIDE},
    )
    for name, count in (("train", 64), ("val", 20)):
        path, content, labels = (
            folder / f"{name}.beton",
            manifests.ContentHash(classes),
            [i % 10 for i in range(count)],
        )
        writer = BetonWriter(path, capacity=count, page_bytes=page_bytes)
        for label in labels:
            image = stored(Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)))
            writer.add(image, label=label, **about)
            content.add(image, label=label, **about)
        writer.finish()
        made = manifests.describe(
            path, name=path.name, content=content.hexdigest(), classes=classes, labels=labels
        )
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
    damage.flip(path, manifests.read(path).pages_offset + page * PAGE_BYTES + 3 * SIDE * SIDE + 7)


def zero_a_jpeg(data: Path, page: int) -> None:
    """A sector of the page's second sample, from its beginning on."""
    with (data / "train.beton").open("r+b") as file:
        file.seek(
            manifests.read(data / "train.beton").pages_offset + page * JPEG_PAGE_BYTES + JPEG_BYTES
        )
        file.write(bytes(512))


def bad_sector(patch: pytest.MonkeyPatch, data: Path, page: int) -> None:
    path = data / "train.beton"
    sector = manifests.read(path).pages_offset + page * PAGE_BYTES + 7
    damage.fail_reads(patch, path, where=lambda offset, length: offset <= sector < offset + length)


def recipe(data: Path, **changes: Any) -> Recipe:
    how = {
        "classes": 10,
        "size": SIDE,
        "channels": 1,
        "crop": "shift",
        "mean": (0.5,),
        "std": (0.5,),
    }
    return small_recipe(
        data=spec(Beton, folder=str(data), **how), policy=Policy(replicas_every=0), **changes
    )


def train(run: Path, recipe: Recipe, *, verify: Any = "full") -> dict[str, Any] | None:
    job = job_of(run, recipe) if run.exists() else make_run(run, recipe)
    with Inline() as launcher:
        return launcher.run(replace(job, verify=verify), "test")


def once_checked(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Acts once, after a run has found its files whole and before it reads them."""
    original, acted = assemble.check_data, False

    def check_data(*words: Any, **named: Any) -> None:
        nonlocal acted
        original(*words, **named)
        if not acted:
            act()
        acted = True

    patch.setattr(assemble, "check_data", check_data)


def named(page: int, fault: str = "differs from its manifest", *, name: str = "train") -> str:
    """The line that refuses a page, as a pattern."""
    first, end = samples_of(page)
    samples = rf"page {page} \(bytes \d+ to \d+, samples {first} to {end - 1}\)"
    return (
        rf"data: \S+{name}\.beton: {samples} {fault}: damaged; restore the file or write the data"
        r" again( \(worker \d\))?$"
    )


UNREADABLE = r"cannot be read \(Input/output error\)"


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize("how", ["flipped", "bad sector", "of the evaluation set", "held out"])
def test_a_damaged_page_stops_the_run_in_one_line_and_restored_it_goes_on(
    when: str,
    how: str,
    tmp_path: Path,
    whole: Path,
    data: Path,
    page: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is never learnt from: with `verify="full"` a page is compared before its samples are
    used.
    """
    name, share, fault = "train", 0.0, "differs from its manifest"
    if how == "of the evaluation set":
        name, page = "val", 3
    if how == "held out":
        share, page = 0.25, int(held_out_of(64, 0.25)[1][0]) // IN_A_PAGE
    if how == "bad sector":
        fault = UNREADABLE
    made, untouched = (
        recipe(folder).override({"data.held_out": share}) for folder in (data, whole)
    )

    def break_page(patch: pytest.MonkeyPatch) -> None:
        bad_sector(patch, data, page) if how == "bad sector" else flip(data, page, name=name)

    with monkeypatch.context() as patch:
        if when == "at the start":
            break_page(patch)
        else:
            once_checked(patch, lambda: break_page(patch))
        with pytest.raises(UserError, match=f"^{named(page, fault, name=name)}"):
            train(tmp_path / "hit", made)
    assert (events(tmp_path / "hit", "start") == []) is (when == "at the start")
    assert state_of(tmp_path / "hit") == "failed"
    if how != "bad sector":
        flip(data, page, name=name)
    train(tmp_path / "hit", made)
    train(tmp_path / "untouched", untouched)
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")


@pytest.mark.parametrize("how", ["flipped", "bad sector"])
def test_verify_names_the_page(
    how: str,
    data: Path,
    page: int,
    monkeypatch: pytest.MonkeyPatch,
    spiketrain: Command,
) -> None:
    if how == "bad sector":
        bad_sector(monkeypatch, data, page)
    else:
        flip(data, page)
    code, _, line = spiketrain("verify", str(data))
    assert (code, len(line.splitlines())) == (2, 1)
    assert re.search(
        named(page, UNREADABLE if how == "bad sector" else "differs from its manifest"),
        line.strip(),
    )


@pytest.mark.parametrize("when", ["at the start", "while it is read"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_is_away_damages_nothing(
    tmp_path: Path, whole: Path, data: Path, monkeypatch: pytest.MonkeyPatch, when: str, number: int
) -> None:
    """Its worker dies, and the next one reads on; the bits are those of a run that nobody
    touched.
    """
    made = recipe(data, epochs=1)
    with monkeypatch.context() as patch:
        if when == "at the start":
            damage.fail_reads(patch, data / "train.beton", number=number)
        else:
            once_checked(
                patch, lambda: damage.fail_reads(patch, data / "train.beton", number=number)
            )
        with pytest.raises((OSError, LoaderError), match=os.strerror(number)):
            train(tmp_path / "hit", made)
    summary = train(tmp_path / "hit", made)
    assert summary is not None and summary["restarts"] == int(when == "while it is read")
    train(tmp_path / "untouched", recipe(whole, epochs=1))
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")


def test_damage_in_the_middle_is_refused_and_restored_the_run_goes_on_at_the_newest_checkpoint(
    tmp_path: Path, whole: Path, data: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been learnt from by then, and is read again in the third epoch, if not in the
    second.
    """
    step = damaged_in_the_middle(
        tmp_path, data, lambda: flip(data, page), page, monkeypatch, verify="full"
    )
    flip(data, page)
    train(tmp_path / "hit", recipe(data, epochs=3))
    first, again = steps_of(tmp_path / "hit", "start")
    assert first == 0 and again >= max(each for each in CHECKPOINTS if each <= step)
    train(tmp_path / "untouched", recipe(whole, epochs=3))
    assert same_weights(tmp_path / "hit", tmp_path / "untouched")


def test_the_page_of_an_image_that_cannot_be_decoded_is_compared_and_named(
    tmp_path: Path, jpegs: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no draw asks for it."""
    monkeypatch.setitem(ONE_IN, "sampled", 1 << 30)
    data = shutil.copytree(jpegs, tmp_path / "data")
    damaged_in_the_middle(
        tmp_path, data, lambda: zero_a_jpeg(data, page), page, monkeypatch, verify="sampled"
    )


def damaged_in_the_middle(
    tmp_path: Path,
    data: Path,
    act: Callable[[], None],
    page: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    verify: Verify,
) -> int:
    """UserError after the step that is returned."""
    step = random.Random(SEED).randrange(EPOCH, 2 * EPOCH)
    with monkeypatch.context() as patch:
        between_batches(patch, lambda _: act(), step=step)
        with pytest.raises(UserError, match=f"^{named(page)}"):
            train(tmp_path / "hit", recipe(data, epochs=3), verify=verify)
    return step


def test_each_evaluation_compares_other_pages(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page of which the draw for step 0 compares nothing is found by one of twelve evaluations
    all the same.
    """
    one_in, samples = 8, np.arange(20)
    monkeypatch.setitem(ONE_IN, "sampled", one_in)
    drawn = samples[below(bits(0, 0, samples, PAGE), one_in) == 0]
    page = min({*range(4)} - {*(drawn // IN_A_PAGE).tolist()})
    with monkeypatch.context() as patch:
        once_checked(patch, lambda: flip(data, page, name="val"))
        with pytest.raises(UserError, match=named(page, name="val")):
            train(tmp_path / "hit", recipe(data, epochs=12), verify="sampled")
    assert events(tmp_path / "hit", "evaluation") != []  # the first one saw others


def test_a_file_that_nobody_reads_may_be_damaged(tmp_path: Path, whole: Path, data: Path) -> None:
    """With a share of the training file held out to evaluate on."""
    flip(data, 3, name="val")
    for name, folder in (("hit", data), ("nothing", whole)):
        train(tmp_path / name, recipe(folder, epochs=1).override({"data.held_out": 0.25}))
    assert same_weights(tmp_path / "hit", tmp_path / "nothing")


def test_a_truncated_file_is_refused_in_one_line(
    tmp_path: Path, data: Path, spiketrain: Command
) -> None:
    path = data / "train.beton"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    changes = ("--set", f"data.folder={data}", "--set", "data.size=8")
    code, _, line = spiketrain(
        "launch", "recipes/fashion/sltt.py", "--inline", *changes, "--runs", str(tmp_path / "runs")
    )
    assert (code, len(line.splitlines())) == (2, 1)
    assert f"{path} must have {size} bytes by its manifest; got {size - 100}: truncated" in line
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is mapped into memory: whoever reads beyond its new end is killed without a word."""
    path, original = data / "train.beton", Trainer._micro_batches
    size = path.stat().st_size

    def micro_batches(self: Trainer, source: Any) -> Any:
        yield from original(self, source)
        with path.open("r+b") as file:
            file.truncate(size - 100)  # of the table at its end, which nobody reads by now

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

HERE = Path(__file__).parent

class Flips(SLTT):
    \"\"\"SLTT beside a disk that fails in the first batch.\"\"\"

    def loss_terms(self, model, x_TB, loss_of, *, step, rows):
        if self.world.rank == 1 and not (HERE / "flipped").exists():
            (HERE / "flipped").touch()
            with open({file!r}, "r+b") as file:
                [byte] = os.pread(file.fileno(), 1, {at})
                os.pwrite(file.fileno(), bytes([byte ^ 4]), {at})
        return super().loss_terms(model, x_TB, loss_of, step=step, rows=rows)
"""


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("own_store")
def test_a_page_that_one_of_two_workers_meets_ends_the_run_in_one_line(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, spiketrain: Command
) -> None:
    places = np.argsort(permutation(64, seed=0, epoch=0))
    page = max(range(12), key=lambda each: places[slice(*samples_of(each))].min())
    size = 2
    assert (
        places[slice(*samples_of(page))].min() // size >= 6
    )  # no worker has read ahead so far when it is damaged
    place = {
        "file": str(data / "train.beton"),
        "at": manifests.read(data / "train.beton").pages_offset + page * PAGE_BYTES,
    }
    (tmp_path / "damage_lab.py").write_text(LAB.format(**place))
    monkeypatch.syspath_prepend(tmp_path)
    runs = tmp_path / "runs"
    flips = importlib.import_module("damage_lab").Flips
    cluster = Cluster(workers=2, device="cpu", verify="full")
    made = recipe(data, rule=spec(flips), backend="deepspeed", batch_size=size)
    prepare(made, cluster, runs, name="hit", trust=("damage_lab",))
    code, _, said = spiketrain("resume", "hit", "--runs", str(runs), "--trust", "damage_lab")
    assert code == 2
    assert re.search(named(page), said.strip().splitlines()[-1])
    assert steps_of(runs / "hit", "start") == [0]

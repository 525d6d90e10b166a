"""The compiled crop, mirror and normalisation against plain Python."""

import numpy as np
import pytest
from PIL import Image

from pipeline.core.random import CUTOUT_X, CUTOUT_Y, FLIP, SHIFT_X, SHIFT_Y, below, bits
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.augment import crop_box, level_table, ratio_table
from tests.helpers.views import AREA, MEAN, RATIO, STD, crop_by_hand, epoch_of, normalised, resized


def test_crop_equals_plain_python():
    rng, ratios = np.random.default_rng(0), ratio_table(RATIO)
    boxes = []
    for index in range(1500):
        h, w, epoch = (int(each) for each in rng.integers(1, 600, 3))
        box = crop_box(
            h, w, np.uint64(9), np.uint64(epoch), np.uint64(index), np.array(AREA), ratios
        )
        assert tuple(box) == crop_by_hand(h, w, 9, epoch, index)
        top, left, height, width = box
        assert (
            0 <= top <= h - height and 0 <= left <= w - width
        )  # beyond the image FFCV aborts the process
        if 0.8 < h / w < 1.25:
            boxes.append(height * width / (h * w))
    assert (
        len(boxes) > 100 and min(boxes) < 0.12 and max(boxes) > 0.9 and 0.45 < np.mean(boxes) < 0.6
    )


@pytest.mark.parametrize(("h", "w"), [(4000, 3), (3, 4000)])
def test_crop_of_a_strip_falls_back_to_its_centre(h, w):
    ratios = ratio_table(RATIO)
    boxes = {
        tuple(
            crop_box(h, w, np.uint64(0), np.uint64(0), np.uint64(i), np.array((0.5, 1.0)), ratios)
        )
        for i in range(20)
    }
    assert boxes == {crop_by_hand(h, w, 0, 0, 0, (0.5, 1.0), (ratios[0], ratios[-1]))}


def test_random_resized_crop_and_flip_of_images(raw):
    folder, pictures = raw
    flipped = 0
    for epoch in (0, 3):
        for i, x in epoch_of(Beton(folder, classes=2, size=24, mean=MEAN, std=STD), "train", epoch):
            h, w, _ = pictures[i].shape
            expected = resized(pictures[i], crop_by_hand(h, w, 21, epoch, i), 24)
            mirror = int(below(bits(21, epoch, i, FLIP), 2))
            flipped += mirror
            assert np.array_equal(x, normalised(expected[:, ::-1] if mirror else expected))
    assert 35 < flipped < 80


def pillow_bicubic(pixels, box, size):
    """The rows first, then the columns, which Pillow 13.0 does for most sizes alone."""
    top, left, height, width = box
    crop = Image.fromarray(pixels).crop((left, top, left + width, top + height))
    for shape in ((size, height), (size, size)):
        crop = crop.resize(shape, Image.Resampling.BICUBIC)
    return np.asarray(crop)


@pytest.mark.full  # which compiles for 8 s
def test_bicubic_crops_are_those_of_pillow(raw):
    """Crops that shrink and crops that grow, to the level."""
    folder, pictures = raw
    data = Beton(
        folder,
        classes=2,
        size=90,
        mean=MEAN,
        std=STD,
        resize="bicubic",
        area=(0.01, 1),
        flip="never",
    )
    growing = 0
    for i, x in epoch_of(data, "train", 2):
        h, w, _ = pictures[i].shape
        box = crop_by_hand(h, w, 21, 2, i, area=(0.01, 1))
        growing += box[2] < 90
        assert np.array_equal(x, normalised(pillow_bicubic(pictures[i], box, 90)))
    assert 10 < growing < 50


@pytest.mark.parametrize(("length", "before", "after"), [(8, 4, 4), (9, 4, 5), (24, 12, 12)])
def test_cutout_sets_a_clipped_square_to_the_mean(raw, length, before, after):
    """As DeVries and Taylor's code has it for even lengths, of the draws of CUTOUT_Y and _X."""
    how = {"classes": 2, "size": 24, "mean": MEAN, "std": STD}
    plain, cut = (
        dict(epoch_of(Beton(raw[0], **how, cutout=each), "train", 3)) for each in (0, length)
    )
    clipped = 0
    for i in plain:
        mask_SS = np.ones((24, 24), np.float32)
        y, x = (int(below(bits(21, 3, i, draw), 24)) for draw in (CUTOUT_Y, CUTOUT_X))
        (top, left), (bottom, right) = (np.clip((y + by, x + by), 0, 24) for by in (-before, after))
        mask_SS[top:bottom, left:right] = 0
        clipped += (mask_SS == 0).sum() < length * length
        assert np.array_equal(cut[i], plain[i] * mask_SS)
    assert 10 < clipped <= len(plain)


def test_the_copies_of_a_sample_are_views_of_their_own(raw):
    """Three views of each of a batch's samples, each keyed by (seed, epoch + copy 2^32, sample);
    resumed, and over two ranks.
    """
    folder, pictures = raw
    data = Beton(folder, classes=2, size=24, mean=MEAN, std=STD, repeats=3, flip="never")
    views = {}
    for rank in range(2):
        loader = data.train(seed=21, batch_size=12, micro_batch=3, rank=rank, world=2)
        with loader.epoch(4, start=12) as batches:
            for number, batch in enumerate(batches):
                for b, (i, x) in enumerate(zip(batch.index.tolist(), batch.x.numpy(), strict=True)):
                    copy = ((number % 2 * 2 + rank) * 3 + b) // 4
                    h, w, _ = pictures[i].shape
                    expected = resized(pictures[i], crop_by_hand(h, w, 21, 4 + (copy << 32), i), 24)
                    assert np.array_equal(x, normalised(expected))
                    views.setdefault(i, set()).add(x.tobytes())
                    assert int(batch.target[b]) == int(i >= 31)
    assert len(views) == (61 // 12 - 1) * 4 and all(len(each) == 3 for each in views.values())


def test_evaluation_takes_the_central_square(raw, photo_folder):
    folder, _ = raw
    paths = [
        path
        for kind in ("china", "flower")
        for path in sorted((photo_folder / "val" / kind).iterdir())
    ]
    for i, x in epoch_of(Beton(folder, classes=2, size=24, mean=MEAN, std=STD), "val"):
        picture = np.asarray(Image.open(paths[i]).convert("RGB"))
        side = int(min(picture.shape[:2]) * 224 / 256)
        box = ((picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2, side, side)
        assert np.array_equal(x, normalised(resized(picture, box, 24)))


@pytest.mark.parametrize(
    ("size", "channels", "flip"),
    [(28, 1, "random"), (32, 1, "never"), (24, 3, "never"), (32, 3, "random")],
)
def test_shift_moves_a_window_over_black(fashion, small_fashion, size, channels, flip):
    pictures = np.frombuffer(
        (small_fashion / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16
    ).reshape(-1, 28, 28)
    mean, std = MEAN[:channels], STD[:channels]
    data = Beton(
        fashion,
        classes=10,
        size=size,
        channels=channels,
        crop="shift",
        flip=flip,
        mean=mean,
        std=std,
    )
    canvas, table = np.pad(pictures, ((0, 0), (20, 20), (20, 20))), level_table(mean, std)
    for i, x in epoch_of(data, "train", 2):
        down, right = (int(below(bits(21, 2, i, draw), 9)) - 4 for draw in (SHIFT_Y, SHIFT_X))
        top, left = 20 + (28 - size) // 2 + down, 20 + (28 - size) // 2 + right
        window = canvas[i, top : top + size, left : left + size]
        if flip == "random" and below(bits(21, 2, i, FLIP), 2):
            window = window[:, ::-1]
        assert x.shape == (channels, size, size) and all(
            np.array_equal(x[c], table[c][window]) for c in range(channels)
        )


def test_evaluation_of_a_shift_is_centred(fashion, small_fashion):
    pictures = np.frombuffer(
        (small_fashion / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16
    ).reshape(-1, 28, 28)
    for i, x in epoch_of(
        Beton(fashion, classes=10, size=32, channels=1, crop="shift", mean=(0.0,), std=(1.0,)),
        "val",
    ):
        assert np.array_equal(x[0], np.pad(pictures[i], 2) / np.float32(255))


def test_one_channel_is_luma(raw):
    folder, pictures = raw
    data = Beton(
        folder, classes=2, size=24, channels=1, crop="centre", flip="never", mean=(0.0,), std=(1.0,)
    )
    for i, x in epoch_of(data, "train"):
        side = int(min(pictures[i].shape[:2]) * 224 / 256)
        box = ((pictures[i].shape[0] - side) // 2, (pictures[i].shape[1] - side) // 2, side, side)
        grey = np.asarray(Image.fromarray(resized(pictures[i], box, 24)).convert("L"))
        assert np.array_equal(x[0], grey / np.float32(255))


@pytest.mark.full
def test_evaluation_has_no_strong_augmentation(raw):
    folder, _ = raw
    strong = {"colour": 9.0, "erase": 1.0, "cutout": 9}
    how = {"classes": 2, "size": 24, "mean": MEAN, "std": STD}
    plain, changed = (dict(epoch_of(Beton(folder, **how, **more), "val")) for more in ({}, strong))
    assert all(np.array_equal(plain[i], changed[i]) for i in plain)

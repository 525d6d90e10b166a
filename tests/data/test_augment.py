"""The compiled crop, mirror and normalisation against plain Python."""

import math

import numpy as np
import pytest

pytest.importorskip("ffcv")

from ffcv.libffcv import resize_crop
from PIL import Image

from pipeline.data.augment import functions, lookup, ratio_table
from pipeline.data.beton import Beton
from pipeline.data.random import CROP, FLIP, SHIFT_X, SHIFT_Y, below, bits

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def crop_by_hand(h, w, seed, epoch, index, area=AREA, ratio=RATIO):
    """(top, left, height, width) as the docstrings have it, in Python's own numbers."""
    for attempt in range(10):
        draw = [int(bits(seed, epoch, index, CROP + 4 * attempt + i)) for i in range(4)]
        pixels = h * w * (area[0] + (area[1] - area[0]) * ((draw[0] >> 11) * 2.0**-53))
        aspect = round(math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * ((draw[1] >> 52) + 0.5) / 4096), 6)
        width, height = math.floor(math.sqrt(pixels * aspect) + 0.5), math.floor(math.sqrt(pixels / aspect) + 0.5)
        if 0 < width <= w and 0 < height <= h:
            return (draw[2] >> 32) * (h - height + 1) >> 32, (draw[3] >> 32) * (w - width + 1) >> 32, height, width
    height = max(1, math.floor(w / ratio[0] + 0.5)) if w < ratio[0] * h else h
    width = max(1, math.floor(h * ratio[1] + 0.5)) if w > ratio[1] * h else w
    return (h - height) // 2, (w - width) // 2, height, width


def test_crop_equals_plain_python():
    rng, crop_box, ratios = np.random.default_rng(0), functions().crop_box, ratio_table(RATIO)
    boxes = []
    for index in range(1500):
        h, w, epoch = (int(each) for each in rng.integers(1, 600, 3))
        box = crop_box(h, w, np.uint64(9), np.uint64(epoch), np.uint64(index), np.array(AREA), ratios)
        assert tuple(box) == crop_by_hand(h, w, 9, epoch, index)
        top, left, height, width = box
        assert 0 <= top <= h - height and 0 <= left <= w - width  # beyond the image FFCV aborts the process
        if 0.8 < h / w < 1.25:
            boxes.append(height * width / (h * w))
    assert len(boxes) > 100 and min(boxes) < 0.12 and max(boxes) > 0.9 and 0.45 < np.mean(boxes) < 0.6


@pytest.mark.parametrize(("h", "w"), [(4000, 3), (3, 4000)])
def test_crop_of_a_strip_falls_back_to_its_centre(h, w):
    crop_box, ratios = functions().crop_box, ratio_table(RATIO)
    boxes = {tuple(crop_box(h, w, np.uint64(0), np.uint64(0), np.uint64(i), np.array((0.5, 1.0)), ratios)) for i in range(20)}
    assert boxes == {crop_by_hand(h, w, 0, 0, 0, (0.5, 1.0), (ratios[0], ratios[-1]))}


@pytest.fixture(scope="module")
def raw(photo_folder, tmp_path_factory):
    """The photographs stored raw, and their pixels in order: a folder and a list of uint8 [h,w,3]."""
    from pipeline.data.write import write_folder

    out = tmp_path_factory.mktemp("raw")
    write_folder(photo_folder, out, mode="raw")
    paths = [path for kind in ("china", "flower") for path in sorted((photo_folder / "train" / kind).iterdir())]
    return out, [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def epoch_of(data, name, epoch=0):
    sizes = {"micro_batch": 8, "threads": 1}
    loader = data.val(**sizes) if name == "val" else data.train(seed=21, batch_size=8, **sizes)
    with loader.epoch(epoch) as batches:
        return [(int(i), x.numpy()) for batch in batches for i, x in zip(batch.index, batch.x, strict=True)]


def normalised(pixels_hw3):
    table = lookup(MEAN, STD)
    return np.stack([table[c][pixels_hw3[..., c]] for c in range(3)])


def resized(pixels, box, size):
    out = np.empty((size, size, 3), np.uint8)
    top, left, height, width = box
    resize_crop(np.ascontiguousarray(pixels), top, top + height, left, left + width, out)
    return out


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


def test_the_copies_of_a_sample_are_views_of_their_own(raw):
    """Three views of each of a batch's samples, each keyed by (seed, epoch + copy 2^32, sample); resumed, and over two ranks."""
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
    paths = [path for kind in ("china", "flower") for path in sorted((photo_folder / "val" / kind).iterdir())]
    for i, x in epoch_of(Beton(folder, classes=2, size=24, mean=MEAN, std=STD), "val"):
        picture = np.asarray(Image.open(paths[i]).convert("RGB"))
        side = int(min(picture.shape[:2]) * 224 / 256)
        box = ((picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2, side, side)
        assert np.array_equal(x, normalised(resized(picture, box, 24)))


@pytest.mark.parametrize(("size", "channels", "flip"), [(28, 1, "random"), (32, 1, "never"), (24, 3, "never"), (32, 3, "random")])
def test_shift_moves_a_window_over_black(fashion, small_fashion, size, channels, flip):
    pictures = np.frombuffer((small_fashion / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    mean, std = MEAN[:channels], STD[:channels]
    data = Beton(fashion, classes=10, size=size, channels=channels, crop="shift", flip=flip, mean=mean, std=std)
    canvas, table = np.pad(pictures, ((0, 0), (20, 20), (20, 20))), lookup(mean, std)
    for i, x in epoch_of(data, "train", 2):
        down, right = (int(below(bits(21, 2, i, draw), 9)) - 4 for draw in (SHIFT_Y, SHIFT_X))
        top, left = 20 + (28 - size) // 2 + down, 20 + (28 - size) // 2 + right
        window = canvas[i, top : top + size, left : left + size]
        if flip == "random" and below(bits(21, 2, i, FLIP), 2):
            window = window[:, ::-1]
        assert x.shape == (channels, size, size) and all(np.array_equal(x[c], table[c][window]) for c in range(channels))


def test_evaluation_of_a_shift_is_centred(fashion, small_fashion):
    pictures = np.frombuffer((small_fashion / "t10k-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 28, 28)
    for i, x in epoch_of(Beton(fashion, classes=10, size=32, channels=1, crop="shift", mean=(0.0,), std=(1.0,)), "val"):
        assert np.array_equal(x[0], np.pad(pictures[i], 2) / np.float32(255))


def test_one_channel_is_luma(raw):
    folder, pictures = raw
    data = Beton(folder, classes=2, size=24, channels=1, crop="centre", flip="never", mean=(0.0,), std=(1.0,))
    for i, x in epoch_of(data, "train"):
        side = int(min(pictures[i].shape[:2]) * 224 / 256)
        box = ((pictures[i].shape[0] - side) // 2, (pictures[i].shape[1] - side) // 2, side, side)
        grey = np.asarray(Image.fromarray(resized(pictures[i], box, 24)).convert("L"))
        assert np.array_equal(x[0], grey / np.float32(255))

"""Pictures as people have them: what is readable is stored, the rest is listed with the reason."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images

from pipeline.data.base import DataError
from pipeline.data.datasets.beton import Beton
from pipeline.data.ffcv.format import read_tables
from pipeline.data.ffcv.page_checks import verify
from pipeline.data.write.images import folder_sets, write_folder
from tests.helpers.loaders import read

PHOTO = Image.fromarray(load_sample_images().images[0][100:292, 150:438]).resize((96, 64))
GREY = np.asarray(PHOTO.convert("L"))


def saved(picture: Image.Image = PHOTO, format: str = "JPEG", **options: Any) -> bytes:
    picture.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


def lying(orientation: int, format: str) -> bytes:
    exif = PHOTO.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(PHOTO.transpose(Image.Transpose.ROTATE_90), format, exif=exif)


def with_stray_bytes() -> bytes:
    content = saved(quality=94)
    scan = content.index(b"\xff\xda")
    return content[:scan] + b"stray" + content[scan:]


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


NO_PICTURE, HIDDEN = "it is no picture that Pillow can read", "hidden"
COPY = saved(quality=93)
# Each file, and how it is stored ("as it is" or "jpg"), or the beginning of the reason why not.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "plain.jpg": (saved, "as it is"),
    "copy.jpg": (lambda: COPY, "as it is"),
    "named otherwise.jpeg": (lambda: COPY, "as it is"),
    "progressive.jpg": (lambda: saved(progressive=True), "as it is"),
    "grey.jpg": (lambda: saved(PHOTO.convert("L")), "as it is"),
    "UPPER.JPG": (lambda: saved(quality=92), "as it is"),
    "Ünï çode 名前.jpg": (lambda: saved(quality=91), "as it is"),
    "below/and below/日本.jpg": (lambda: saved(quality=90), "as it is"),
    "a JPEG.png": (lambda: saved(quality=89), "as it is"),
    "a JPEG.txt": (lambda: saved(quality=88), "as it is"),
    "no ending": (lambda: saved(quality=87), "as it is"),
    "no such orientation.jpg": (lambda: saved(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), "as it is"),
    "a PNG.jpg": (lambda: saved(format="PNG"), "jpg"),
    "cmyk.jpg": (lambda: saved(PHOTO.convert("CMYK")), "jpg"),
    "stray bytes.jpg": (with_stray_bytes, "jpg"),
    "palette.png": (lambda: saved(PHOTO.convert("P"), "PNG"), "jpg"),
    "still.gif": (lambda: saved(format="GIF"), "jpg"),
    "moving.gif": (
        lambda: saved(format="GIF", save_all=True, append_images=[noise(64, 96)]),
        "jpg",
    ),
    "transparent.png": (lambda: saved(PHOTO.convert("RGBA"), "PNG"), "jpg"),
    "grey and transparent.png": (lambda: saved(PHOTO.convert("LA"), "PNG"), "jpg"),
    "16 bits.png": (lambda: saved(Image.fromarray(GREY * np.uint16(257)), "PNG"), "jpg"),
    "16 bits.tif": (lambda: saved(Image.fromarray(GREY * np.uint16(257)), "TIFF"), "jpg"),
    "web.webp": (lambda: saved(format="WEBP"), "jpg"),
    "window.bmp": (lambda: saved(format="BMP"), "jpg"),
    "lying.jpg": (lambda: lying(6, "JPEG"), "jpg"),
    "lying.png": (lambda: lying(6, "PNG"), "jpg"),
    "lying.tiff": (lambda: lying(6, "TIFF"), "jpg"),
    "large.jpg": (lambda: saved(PHOTO.resize((6000, 4000))), "as it is"),
    "of a pixel.png": (lambda: saved(PHOTO.resize((1, 1)), "PNG"), "jpg"),
    "floats.tif": (lambda: saved(PHOTO.convert("F"), "TIFF"), "pixels of 8 or 16 bits are needed"),
    "32 bits.tif": (
        lambda: saved(Image.fromarray(GREY * np.int32(1 << 20)), "TIFF"),
        "pixels of at most 16 bits are needed; got levels up to 2",
    ),
    "beyond a page.jpg": (
        lambda: saved(noise(2200, 2200), quality=100, subsampling=0),
        "write: a stored image must fit a page of 8388608 bytes; got ",
    ),
    "truncated.jpg": (lambda: saved()[:700], "OSError: image file is truncated"),
    "empty.jpg": (lambda: b"", NO_PICTURE),
    "text.jpg": (lambda: b"no picture", NO_PICTURE),
    "phone.heic": (lambda: b"\0\0\0\x18ftypheic", NO_PICTURE),
    ".hidden.jpg": (saved, HIDDEN),
    ".thumbnails/small.jpg": (saved, HIDDEN),
    "notes.txt": (lambda: b"no picture", NO_PICTURE),
}
LINKS = {  # to the folder `elsewhere` beside the class folders, which has plain.jpg
    "link.jpg": ("plain.jpg", "as it is"),
    "broken link.jpg": ("nothing.jpg", "no file"),
    "linked folder": (".", "a link to a folder"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The class folder `many` with all files, and `one` with a picture and a copy of `many`'s."""
    root = tmp_path_factory.mktemp("pictures")
    contents = {f"many/{name}": make() for name, (make, _) in FILES.items()}
    contents |= {"one/copy of another class.jpg": COPY, "one/0.jpg": saved(quality=80)}
    for name, content in (contents | {"beside.txt": b"", ".elsewhere/plain.jpg": saved()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name, (target, _) in LINKS.items():
        (root / "many" / name).symlink_to(root / ".elsewhere" / target)
    return root


@pytest.fixture(scope="module")
def out(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    write_folder(pictures, out, val=0.1, max_unreadable=0.9)
    return out


def stored_pictures(pictures: Path, out: Path) -> Iterator[tuple[str, Image.Image]]:
    """The path of each stored picture below `pictures`, and what is stored."""
    for manifest, source in zip(verify(out), folder_sets(pictures, 0.1), strict=True):
        tables, content = read_tables(out / manifest.file), (out / manifest.file).read_bytes()
        skipped = {each["image"] for each in manifest.skipped}
        items = [item for item in source.items if str(item) not in skipped]
        for item, address, size in zip(items, tables.addresses, tables.sizes, strict=True):
            stored = io.BytesIO(content[int(address) : int(address) + int(size)])
            yield str(Path(str(item)).relative_to(pictures)), Image.open(stored)


def test_what_is_readable_is_stored_and_the_rest_is_listed(pictures: Path, out: Path) -> None:
    manifests = verify(out)
    expected = {name: how for files in (FILES, LINKS) for name, (_, how) in files.items()}
    expected[".thumbnails"] = expected.pop(".thumbnails/small.jpg")
    assert len(expected) > 40
    kinds = sum((Counter(each.stored) for each in manifests), Counter[str]())
    count = Counter(expected.values())
    # `one` has two JPEGs
    assert kinds == {"as it is": count["as it is"] + 2, "jpg": count["jpg"], "rotated": 3}
    refused = {name: how for name, how in expected.items() if how not in ("as it is", "jpg")}
    reasons = {
        (name := str(Path(entry["image"]).relative_to(pictures / "many"))): entry["reason"][
            : len(refused.get(name, ""))
        ]
        for manifest in manifests
        for entry in (*manifest.skipped, *manifest.left_out)
        if Path(entry["image"]).parent != pictures
    }
    assert reasons == refused
    beside = {Path(entry["image"]).name for entry in manifests[0].left_out} - refused.keys()
    assert beside == {".elsewhere", "beside.txt"}
    assert manifests[0].classes == ["many", "one"] and manifests[0].options["exif"] == "apply"


def test_each_stored_picture_shows_the_photo(pictures: Path, out: Path) -> None:
    for name, picture in stored_pictures(pictures, out):
        if name == "many/of a pixel.png":
            assert picture.size == (1, 1)
            continue
        is_grey = any(word in name for word in ("grey", "16 bits"))
        expected = np.asarray(PHOTO.convert("L").convert("RGB") if is_grey else PHOTO, np.float64)
        found = np.asarray(picture.convert("RGB").resize(PHOTO.size), np.float64)
        assert picture.width * PHOTO.height == picture.height * PHOTO.width, name
        assert np.abs(found - expected).mean() < 15, name
    loader = Beton(out, classes=2, size=32).train(seed=0, batch_size=4, micro_batch=4)
    assert len(read(loader)) == loader.samples // 4


def test_orientation_is_ignored_if_asked_for(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for format in ("jpeg", "png", "tiff"):
            (tmp_path / part / "a" / f"0.{format}").write_bytes(lying(6, format))
    for manifest in write_folder(tmp_path, tmp_path / "out", exif="ignore"):
        assert manifest.stored == {"as it is": 1, "jpg": 2, "not rotated": 2}
        records = read_tables(tmp_path / "out" / manifest.file).records
        assert records["width"].tolist() == [64, 64, 96]  # Pillow rotates the TIFF


def class_folders(root: Path, *, is_reversed: bool = False) -> Path:
    """Four classes: 40, 25, 4 and 2 different images, five of `a` twice, five also in `b`."""
    for label, numbers in {
        "a": [*range(40), *range(5)],
        "b": [*range(5), *range(40, 60)],
        "c": range(100, 104),
        "d": range(200, 202),
    }.items():
        (root / label).mkdir(parents=True)
        for place, number in enumerate(numbers):
            name = f"{50 - place if is_reversed else place}.jpg"
            (root / label / name).write_text(str(number))
    return root


def numbers_of(sources: list[Any]) -> list[list[tuple[int, str]]]:
    return [[(each.label, each.image.read_text()) for each in part.items] for part in sources]


@pytest.mark.parametrize("val", [0.1, 0.3, 0.9])
def test_a_split_is_stratified_and_keeps_copies_together(tmp_path: Path, val: float) -> None:
    folders = (class_folders(tmp_path / str(way), is_reversed=way) for way in (False, True))
    one, other = (numbers_of(folder_sets(folder, val)) for folder in folders)
    assert [sorted(part) for part in one] == [sorted(part) for part in other]
    train, evaluation = ({number for _, number in part} for part in one)
    assert not train & evaluation and len(one[0]) + len(one[1]) == 76
    for label, total in enumerate((40, 25, 4, 2)):
        chosen = {number for each, number in one[1] if each == label}
        assert len(chosen) == min(max(1, round(val * total)), total - 1)


@pytest.mark.parametrize(
    ("change", "val", "said"),
    [
        ("", 1.0, r"val must be a share in 0\.\.1, both excluded, .* got 1\.0"),
        ("", None, r"train must be a folder of class folders; .* use --val 0\.1"),
        (
            "alone/0.jpg",
            0.1,
            "class 'alone' must hold 2 or more different images to be split; got 1",
        ),
        ("train/0.jpg val/0.jpg", 0.1, "it has no effect on the folders train and val; got 0.1"),
        ("alone/0.txt", 0.1, "class folder .*alone must hold images; it has none"),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, change: str, val: float | None, said: str
) -> None:
    root = class_folders(tmp_path / "pictures")
    for name in change.split():
        (root / name).parent.mkdir()
        (root / name).write_text("one")
    with pytest.raises(DataError, match=said):
        write_folder(root, tmp_path / "out", val=val)

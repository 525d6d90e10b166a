"""`spiketrain write` and `verify`: write data sets as FFCV files, and check them."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.options import DATA, Commands, example, number_option
from pipeline.core.printing import new_console
from pipeline.core.stages import say_stage
from pipeline.core.units import counted

if TYPE_CHECKING:
    from pipeline.data.ffcv.manifest import Manifest

EventSource = Annotated[
    str | None,
    typer.Option(
        "--source",
        help=(
            "published sets: folder that tonic downloads to; saccades: fashion, or folder of"
            " Fashion-MNIST's four files"
        ),
    ),
]
Resize = Annotated[
    Literal["sum", "area"] | None,
    typer.Option(
        "--resize", help="published sets: merge pixels by the sum of their counts, or by the mean"
    ),
]
FramesBy = Annotated[
    Literal["time", "number"],
    typer.Option(
        "--frames-by", help="slices with equal durations, or with equal numbers of events"
    ),
]
Slices = Annotated[
    int | None,
    typer.Option(
        "--slices", min=1, help="frames per recording; T of a recipe must divide this number"
    ),
]
commands = Commands()
write = Commands(
    no_args_is_help=True,
    help="Write a data set as FFCV files.",
    epilog=example("spiketrain write fashion --out data/fashion"),
)
commands.add_typer(write, name="write", rich_help_panel=DATA)

Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="folder for train.beton and val.beton")
]
OnExisting = Annotated[
    Literal["refuse", "replace", "keep"],
    typer.Option("--existing", help="what happens to existing files; keep: verify and keep them"),
]
Writers = Annotated[int, typer.Option("--workers", min=1, help="processes that write")]
MaxUnreadable = Annotated[
    float,
    number_option("--max-unreadable", help="share of each set that may be unreadable and skipped"),
]


@write.command("fashion", epilog=example("spiketrain write fashion --out data/fashion"))
def write_fashion(
    out: Out,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            help="folder of the four idx files; default: Debian's package, or a download",
        ),
    ] = None,
    workers: Writers = 1,
    existing: OnExisting = "refuse",
) -> None:
    """Fashion-MNIST: 60,000 training and 10,000 test images, 28 x 28, 10 classes."""
    from pipeline.data.write.images import write_fashion as write_files

    run_writer(
        "fashion", partial(write_files, out, workers=workers, source=source, existing=existing)
    )


@write.command(
    "folder",
    epilog=example(
        "spiketrain write folder --source pictures --out data/pictures --max-resolution 256"
    ),
)
def write_folder(
    source: Annotated[
        Path,
        typer.Option(
            "--source", help="folder with train/CLASS and val/CLASS; with --val: with CLASS"
        ),
    ],
    out: Out,
    mode: Annotated[
        Literal["jpg", "raw", "mixed"], typer.Option("--mode", help="how pixels are stored")
    ] = "jpg",
    max_resolution: Annotated[
        int | None, typer.Option("--max-resolution", min=1, help="longest side in pixels")
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            "--quality", min=1, max=100, help="quality of JPEGs that Pillow encodes; default: 90"
        ),
    ] = None,
    workers: Writers = 1,
    existing: OnExisting = "refuse",
    exif: Annotated[
        Literal["apply", "ignore"],
        typer.Option("--exif", help="rotate by the EXIF orientation, or ignore it as torchvision"),
    ] = "apply",
    val: Annotated[
        float | None,
        number_option(
            "--val", help="split SOURCE/CLASS: share of each class for evaluation, by content"
        ),
    ] = None,
    max_unreadable: MaxUnreadable = 0.0,
) -> None:
    """Pictures in a folder for each class."""
    from pipeline.data.write.images import write_folder as write_files

    writer = partial(
        write_files,
        source,
        out,
        mode=mode,
        max_resolution=max_resolution,
        quality=quality,
        workers=workers,
        exif=exif,
        val=val,
        max_unreadable=max_unreadable,
        existing=existing,
    )
    run_writer(source.name, writer)


@write.command("events", epilog=example("spiketrain write events moving --out data/moving"))
def write_events(
    name: Annotated[
        Literal["moving", "flashes", "saccades", "nmnist", "cifar10dvs", "gesture", "ncaltech101"],
        typer.Argument(
            metavar="SET",
            show_choices=False,
            help="moving, flashes, saccades, nmnist, cifar10dvs, gesture or ncaltech101",
        ),
    ],
    out: Out,
    source: EventSource = None,
    slices: Slices = None,
    frames_by: FramesBy = "time",
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="pixels per side; default: 34 or the sensor")
    ] = None,
    resize: Resize = None,
    counts: Annotated[
        Literal["uint8", "int16"], typer.Option("--counts", help="how a count is stored")
    ] = "uint8",
    overflow: Annotated[
        Literal["refuse", "saturate"],
        typer.Option("--overflow", help="handling of counts that are too large"),
    ] = "refuse",
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="generated training recordings")
    ] = None,
    val_samples: Annotated[
        int | None, typer.Option("--val-samples", min=1, help="generated evaluation recordings")
    ] = None,
    gap: Annotated[
        int | None,
        typer.Option(
            "--gap", min=1, help="flashes: slices from the first to the second; default: 4"
        ),
    ] = None,
    workers: Writers = 1,
    existing: OnExisting = "refuse",
    max_unreadable: MaxUnreadable = 0.0,
) -> None:
    """Recordings of event cameras: moving shapes, flashes, saccades over Fashion-MNIST, or a
    published set.

    tonic downloads the published sets: nmnist, cifar10dvs, gesture, ncaltech101.
    """
    from pipeline.data.write.events import write_events as write_files

    options = {
        "source": source,
        "slices": slices,
        "size": size,
        "resize": resize,
        "samples": samples,
        "val_samples": val_samples,
        "gap": gap,
    }
    writer = partial(
        write_files,
        name,
        out,
        frames_by=frames_by,
        counts=counts,
        overflow=overflow,
        workers=workers,
        max_unreadable=max_unreadable,
        existing=existing,
        **{key: value for key, value in options.items() if value is not None},
    )
    run_writer(name, writer)


@write.command(
    "stamps",
    epilog=example("spiketrain write stamps --out data/stamps-0 --size 160 --split 0 --workers 2"),
)
def write_stamps(
    out: Out,
    size: Annotated[int, typer.Option("--size", help="pixels per side")] = 160,
    split: Annotated[
        int,
        typer.Option(
            "--split",
            help="which quarter of the pictures is for evaluation: 0, 1 or 2; 3: to tune settings",
        ),
    ] = 0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="training scenes")] = 5200,
    val_samples: Annotated[
        int, typer.Option("--val-samples", min=1, help="evaluation scenes")
    ] = 1040,
    smallest: Annotated[
        float,
        number_option(
            "--smallest", help="minimum of an object's longer side, as a share of the scene's side"
        ),
    ] = 0.5,
    content_seed: Annotated[
        int, typer.Option("--content-seed", min=0, help="selects the scenes, not the split")
    ] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="folder of the packages' pictures; default: /usr/share"),
    ] = None,
    mode: Annotated[
        Literal["jpg", "raw"], typer.Option("--mode", help="how pixels are stored")
    ] = "jpg",
    quality: Annotated[
        int | None, typer.Option("--quality", min=1, max=100, help="quality of JPEGs; default: 90")
    ] = None,
    workers: Writers = 1,
    existing: OnExisting = "refuse",
) -> None:
    """Scenes: one of 300 objects, in 13 classes, on a photograph. Evaluation shows other objects.

    The pictures come from Debian packages: apt install tuxpaint-stamps-default mate-backgrounds
    plasma-workspace-wallpapers.
    """
    from pipeline.data.write.stamps import write_stamps as write_files

    writer = partial(
        write_files,
        out,
        size=size,
        split=split,
        samples=samples,
        val_samples=val_samples,
        smallest=smallest,
        content_seed=content_seed,
        source=source,
        mode=mode,
        quality=quality,
        workers=workers,
        existing=existing,
    )
    run_writer("stamps", writer)


@commands.command(rich_help_panel=DATA, epilog=example("spiketrain verify data/fashion"))
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="a .beton file, or a folder of them")
    ],
) -> None:
    """Check every byte of FFCV files against their manifests."""
    from pipeline.data.ffcv.page_checks import verify as verify_files

    say_stage(f"reading every byte of {path}")
    for manifest in verify_files(path):
        print(f"{manifest.file}: {_size(manifest)}, content {manifest.content[:16]}: verified")


def _size(manifest: "Manifest") -> str:
    return f"{counted(manifest.samples, 'sample')}, {counted(len(manifest.classes), 'class')}"


def run_writer(name: str, write: Callable[..., list["Manifest"]]) -> None:
    """Write files with a progress bar on a terminal, and print how many samples each has.

    Samples that are skipped, left out, or too many of which are unreadable are listed on stderr.

    Args:
        write: writes the files. It is called with the keyword `progress`.
    """
    from pipeline.data.write.writer import TooManyUnreadable

    console = new_console(stderr=True)
    try:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as progress:
            task = progress.add_task(f"write {name}", total=None)
            manifests = write(
                progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
    except TooManyUnreadable as error:
        _list_entries("unreadable", error.unreadable)
        raise
    for manifest in manifests:
        print(f"{manifest.file}: {_size(manifest)}, {len(manifest.skipped)} skipped", flush=True)
        _list_entries("skipped", manifest.skipped)
        _list_entries("left out", manifest.left_out)
        if not_rotated := manifest.stored.get("not rotated"):
            print(
                f"  not rotated {counted(not_rotated, 'picture')} of {manifest.file}: EXIF"
                " orientation is not applied",
                file=sys.stderr,
            )


def _list_entries(label: str, entries: list[dict[str, str]]) -> None:
    for each in entries:
        print(f"  {label} {each['image']}: {each['reason']}", file=sys.stderr)

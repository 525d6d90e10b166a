"""How long a worker compares every page of its data with the checksums, as one on each machine does
at every start.

Command:  python -m benchmarks.pages [FOLDER] [--times 11]
Result:   data/fashion, 186 MB: 0.023 s (0.022 to 0.026), 0.13 s per GB; commit 45dee44e4d14, 2
          cores of an Intel Xeon, nothing else running

The files are in the page cache, where a run that starts again finds them if memory has room for
them; else it takes as long as the storage does.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.overhead import timed
from pipeline.core.code_version import commit
from pipeline.data.ffcv.page_checks import check_file
from pipeline.measure.memory import device_here, hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/fashion"))
    parser.add_argument("--times", type=int, default=11)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.beton"))
    if not files:
        parser.error(f"FOLDER must hold .beton files; got {arguments.folder}")
    size = sum(file.stat().st_size for file in files)

    def compare() -> None:
        for file in files:
            check_file(file)

    compare()  # from now on they are in the page cache
    seconds = [timed(compare) for _ in range(arguments.times)]
    machine = hardware(device_here())
    took = statistics.median(seconds)
    print(
        f"{arguments.folder}, {size / 1e6:.0f} MB: {took:.3f} s ({min(seconds):.3f} to"
        f" {max(seconds):.3f}), {took / size * 1e9:.2f} s per GB; median of {arguments.times};"
        f" commit {commit()}, {machine['cores']} cores of {machine['cpu']}"
    )


if __name__ == "__main__":
    main()

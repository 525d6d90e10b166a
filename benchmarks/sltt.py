"""What SLTT's slices cost: time of SLTT and SLTT-1 against the faster BPTT, on the network of the
Fashion-MNIST claims.

Command:  python -m benchmarks.sltt [--starts 5] [--workers 1] [--images N]
          (data/fashion must have been written)
Result:   of 256 images on one worker, beside the claims (turns.json): SLTT 0.964 (0.959 to 0.970)
          and SLTT-1 0.471 (0.465 to 0.476) of the faster BPTT, behind DeepSpeed; 2 cores of an AMD
          EPYC, torch 2.13, commit a6afb978df11. Of 128 images on each of two workers there: 1.003
          (0.963 to 1.042) and 0.495 (0.486 to 0.504), commit 466330c020e4 (before garbage was
          collected ahead of each turn 1.031 and, another time, 1.023). In plain torch, before:
          0.968 (0.947 to 0.988) and 0.514 (0.505 to 0.523), commit 89a26320ca94; before neurons and
          pools took less time, on one core, 1.006 (0.979 to 1.032) and 0.535 (0.519 to 0.552),
          commit 862ae618abfb. By the median of 60 batches of one start, on an Intel Xeon: 0.992 and
          0.517 (commit 4032ee417d7f)

Rules alternate on one batch of images of a worker of that study, in as many processes as there are
workers (forecast/rule_timing.py). Each of several starts has one round for each rule, so drift of
the machine affects all rules equally. Timed are forward, loss and backward of all T steps. SLTT
calls everything T times, and the fixed cost of a call does not shrink with the number of images:
`--images` sets how many each worker holds. The exit code is 1 when SLTT takes longer than the
faster BPTT.
"""

import argparse
import sys
from dataclasses import asdict, replace

from pipeline.core.code_version import commit
from pipeline.core.printing import new_console
from pipeline.forecast.rule_timing import STARTS, measure_interleaved
from pipeline.measure.memory import device_here, hardware
from pipeline.report.claims import print_claims, share_of_k
from recipes.compare.claims_base import time_in_turn
from recipes.compare.claims_fashion import BATCH, RULES, T
from recipes.fashion.base import fashion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--starts", type=int, default=STARTS, help="2 or more")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--images",
        type=int,
        help="of a batch, that each worker holds; without it its part of the study's",
    )
    arguments = parser.parse_args()
    images = BATCH // arguments.workers if arguments.images is None else arguments.images
    recipe = replace(fashion(), time_steps=T, batch_size=images * arguments.workers)
    rules = [RULES[name] for name in ("bptt", "bptt-stepped", "sltt", "sltt-1")]
    found = measure_interleaved(recipe, rules, workers=arguments.workers, starts=arguments.starts)
    turns = {label: asdict(times) for label, times in found.items()}
    sltt = time_in_turn("SLTT", turns, "SLTT", bound=1.0, published="")
    print_claims(
        [sltt, time_in_turn("SLTT-1", turns, "SLTT-1", bound=share_of_k(T, 1), published="")],
        new_console(),
    )
    machine = hardware(device_here())
    print(
        f"T = {T}, {images} images each; commit {commit()}, {machine['cpu']}, torch"
        f" {machine['torch']}"
    )
    sys.exit(not sltt.holds)


if __name__ == "__main__":
    main()

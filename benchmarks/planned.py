"""What `spiketrain plan` predicts of this machine, against what `launch` then measures: saved
bytes, and seconds of a step.

Command:  python -m benchmarks.planned [--workers 2] [--steps 300]
          (data/fashion, data/stamps-0 and data/moving must have been written)
Result:   commit a6afb978df11, 2 cores of an AMD EPYC, torch 2.13.0: saved bytes exact in all five;
          seconds of a step

    VGG, SLTT           53.8 ms planned,   58.1 measured    -7.4 %;   planned after it    -6.7 %
    QKFormer, BPTT     160.9              145.9            +10.3 %                       +10.5 %
    feedback, IDE       30.8               29.7             +4.0 %                        +3.2 %
    rates, DSR         134.8              127.7             +5.6 %                        +4.6 %
    recordings, SLTT    55.9               62.9            -11.2 %                        -4.9 %

At 89a26320ca94, when that machine was faster: -3.0, -6.8, -1.3, -11.7, -15.6 %.
Before neurons and pools became faster, at 862ae618abfb: -0.1, -4.6, -3.5, -3.5, +9.5 %. On an Intel
Xeon: -7.4, +6.5, -24.3, -3.4, -10.9 % at ec331f07da8b. On 2026-11-28, when a step of IDE took 38 to
65 ms there: -23.0, +3.7, -8.8, +3.9, -10.9 % at 3ec7d575fab8; with the engine's own step in the
plan -5.2, +7.0, -22.5, +26.0, +11.1 % at 9779fdce236c, of which DSR's is too much.

The plans above timed small batches on one process, and measured separately how workers slow each
other down. Plans now time two small batches of each rule in as many processes as workers. Under the
load of other programs, at 06de4c1e1d09: VGG -8.1 % (planned after it +5.1), IDE +51.9 % (+20.2).

Five recipes of different families, each trained by its own rule on this machine. The plan is made
before the launch, which decides. The error of a plan made after it shows how far the machine
drifted.
Nothing else should run. Exits with 1 where saved bytes differ, or seconds by more than 25 %.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.core.code_version import commit
from pipeline.forecast.plan import Cluster, Plan, plan
from pipeline.launch.cluster import Cluster as Launched
from pipeline.launch.driver import launch_run
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe import Recipe
from pipeline.report.results import Run, read_run
from recipes.events.moving_sltt import recipe as moving_sltt
from recipes.fashion.dsr_if import recipe as fashion_dsr_if
from recipes.fashion.ide import recipe as fashion_ide
from recipes.fashion.sltt import recipe as fashion_sltt
from recipes.stamps.qkformer_bptt import recipe as stamps_qkformer_bptt

SECONDS = 0.25
RECIPES: dict[str, Callable[[], Recipe]] = {
    "VGG, SLTT": fashion_sltt,
    "QKFormer, BPTT": stamps_qkformer_bptt,
    "feedback, IDE": fashion_ide,
    "rates, DSR": fashion_dsr_if,
    "recordings, SLTT": moving_sltt,
}


def errors(planned: Plan, run: Run) -> dict[str, dict[str, float]]:
    """Saved bytes and the seconds of a step as planned and as measured, and the relative error."""
    [rule] = planned.rules
    batch_size = rule.images_per_s * rule.step_s
    pairs = {
        "saved_bytes": (rule.saved_bytes, run.numbers["peak_saved_bytes"]),
        "step_s": (rule.step_s, batch_size / run.numbers["images_per_s"]),
    }
    return {
        name: {"planned": expected, "measured": measured, "error": expected / measured - 1}
        for name, (expected, measured) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    machine, is_near = hardware(device_here()), True
    print(
        f"{arguments.workers} workers, {arguments.steps} steps; commit {commit()},"
        f" {machine['cpu']}, torch {machine['torch']}"
    )
    for name, made in RECIPES.items():
        recipe = made().override({"stop_after": arguments.steps, "evaluation.samples": 64})
        before = plan(recipe, Cluster(workers=arguments.workers), rules=())
        with tempfile.TemporaryDirectory() as runs:
            launched = Launched(
                workers=arguments.workers, inline=False, address=None, device="auto"
            )
            run = launch_run(recipe, launched, Path(runs))
            after = plan(recipe, Cluster(workers=arguments.workers), rules=())
            trained = read_run(run)
            off, later = errors(before, trained), errors(after, trained)["step_s"]
        saved, step = off["saved_bytes"], off["step_s"]
        is_near &= saved["error"] == 0 and abs(step["error"]) <= SECONDS
        print(
            f"{name:<18} {saved['planned'] / 1e6:8.4g} MB planned, {saved['measured'] / 1e6:8.4g}"
            f" measured {saved['error']:+7.1%}; {step['planned'] * 1e3:6.4g} ms planned,"
            f" {step['measured'] * 1e3:6.4g} measured {step['error']:+7.1%}; planned after it"
            f" {later['planned'] * 1e3:6.4g} ms, {later['error']:+.1%}",
            flush=True,
        )
    sys.exit(not is_near)


if __name__ == "__main__":
    main()

"""The time of a batch by `pipeline.compare`, against what `launch` then measures.

Command:  python -m benchmarks.compared [--only NAME]
          (needs SpikingJelly, snnTorch and norse: pip install '.[dev]')
Result:   docs/LOG.md

Four wrapped networks under SLTT, T = 4 (tests/helpers/foreign.py): SpikingJelly's SEW-ResNet-18 and
Spikformer, a convolutional network of snnTorch, and a chain of norse. Each is compared on random
images in a new process with one thread, as a worker on a CPU has, and then launched with one worker
under Ray. The time is that of forward and backward, which is what `compare` prints. Batches are so
large that Ray's own processes, and DeepSpeed's calls at each time step, take a small part of it.
Nothing else should run. Exits with 1 where bytes differ, or times by more than 25 %.
"""

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from pipeline import compare, wrap
from pipeline.core.code_version import commit
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import launch_run
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe import Recipe, spec
from pipeline.recipe.recipe import Checkpointing
from pipeline.report.results import read_run
from pipeline.rules.sltt import SLTT
from tests.helpers.foreign import CASES, CLASSES, Case
from tests.helpers.small import small_recipe

SHARE = 0.25
# batch size and steps
SIZES = {
    "sew_resnet18": (8, 60),
    "spikformer_ti": (8, 60),
    "snntorch": (32, 200),
    "norse": (256, 300),
}


def recipe_of(case: Case) -> Recipe:
    """One epoch, without checkpoints or evaluations before its end."""
    batch, steps = SIZES[case.name]
    data = small_recipe().data.with_(classes=CLASSES, shape=case.shape, samples=steps * batch)
    return small_recipe(
        model=spec(wrap, network=spec(case.build), norm="step"),
        rule=spec(SLTT),
        data=data,
        time_steps=4,
        batch_size=batch,
        epochs=1,
        log_every=10,
        checkpoints=Checkpointing(every=steps),
        backend="deepspeed",
    )


def compared(recipe: Recipe) -> tuple[float, int]:
    """Seconds and saved bytes of a batch. In a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_BCHW = torch.rand(recipe.batch_size, *recipe.data.kwargs["shape"])
    target_B = torch.randint(CLASSES, (recipe.batch_size,))
    network = recipe.model.build()
    found = compare(network, x_BCHW, target_B, steps=recipe.time_steps, rules=[SLTT()])
    cost = found.cost("SLTT")
    assert cost is not None
    return cost.compute_s, cost.peak_saved_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", choices=[case.name for case in CASES])
    arguments = parser.parse_args()
    machine, is_near = hardware(device_here()), True
    print(f"commit {commit()}, {machine['cpu']}, torch {machine['torch']}", flush=True)
    for case in CASES:
        if arguments.only not in (None, case.name):
            continue
        recipe = recipe_of(case)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            seconds, saved_bytes = process.submit(compared, recipe).result()
        with tempfile.TemporaryDirectory() as runs:
            run = read_run(launch_run(recipe, Cluster(), Path(runs), trust=("tests",)))
            summary = run.summary or {}
        measured_s = summary["steady_forward_s"] + summary["steady_backward_s"]
        error = seconds / measured_s - 1
        is_near &= saved_bytes == summary["peak_saved_bytes"] and abs(error) <= SHARE
        print(
            f"{case.name:<14} batch {recipe.batch_size:>3} {saved_bytes / 1e6:8.4g} MB compared,"
            f" {summary['peak_saved_bytes'] / 1e6:8.4g} launched; {seconds * 1e3:6.4g} ms compared,"
            f" {measured_s * 1e3:6.4g} launched {error:+7.1%}; whole step"
            f" {recipe.batch_size / summary['images_per_s'] * 1e3:6.4g} ms",
            flush=True,
        )
    sys.exit(not is_near)


if __name__ == "__main__":
    main()

"""What the whole pipeline costs over a bare PyTorch loop, measured side by side in one process.

Command:  python -m benchmarks.overhead [--rule sltt|bptt] [--steps 200]
Result:   SLTT +4.7 % (100.0 ms against 95.5), BPTT +3.2 % (79.7 ms against 77.3), medians of 200
          steps; commit e543c42da387, 2 cores of an AMD EPYC, torch 2.13. With backend="plain" in
          place of DeepSpeed SLTT has +2.1 %: half of it is the engine's forward, backward and step,
          which an online rule calls T times.

One Ray worker with one torch thread trains by the product's loop: FFCV file, DeepSpeed ZeRO-0,
meters, journal, and MLflow from the driver. Between every two of its steps the same process trains
a second copy of the network by the loop that anybody would write around the same rule, on batches
that were read before. Medians of both are compared, so that drift of the machine falls on both
alike. Batch size is tuned beforehand until a bare step takes about 100 ms.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.code_version import commit
from pipeline.core.printing import new_console
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import drive
from pipeline.launch.prepare import prepare
from pipeline.launch.ray import Ray
from pipeline.measure.memory import device_here, hardware
from pipeline.recipe import Recipe, spec
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.train.assemble import TrainContext
from pipeline.train.job import Job, RankInfo
from pipeline.train.trainer import Trainer
from pipeline.train.worker import run
from recipes.fashion.base import fashion

STEP_S = 0.1
WARM_UP = 20
PRE_READ = 16
RULES = {"sltt": SLTT, "bptt": BPTT}


class Bare:
    """The loop that anybody would write around the rule, which is the product's: no backend, no
    meters, no loader, no guard.
    """

    def __init__(
        self,
        network: nn.Module,
        rule_name: str,
        batches: Sequence[tuple[Tensor, Tensor]],
        steps: int,
    ) -> None:
        self.network, self.steps, self.count = network, steps, itertools.count()
        self.rule: Rule = RULES[rule_name]()
        self.rule.attach(network)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, nesterov=True)
        self.batches = itertools.cycle(batches)

    def step(self) -> None:
        x_BCHW, target_B = next(self.batches)
        x_TB, about = (
            repeat(x_BCHW, self.steps),
            {"step": next(self.count), "rows": range(len(target_B))},
        )
        for objective in self.rule.loss_terms(
            self.network, x_TB, partial(F.cross_entropy, target=target_B), **about
        ):
            if objective.backward is not None:
                objective.backward.backward()
        self.rule.end_of_batch()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def follow(self, network: nn.Module) -> None:
        """Take over the other loop's weights, so that both compute on the same numbers; not
        timed.
        """
        self.network.load_state_dict(network.state_dict())


class Interleaved(Trainer):
    """The product's attempt at a run, with one bare step between every two of its own."""

    def __init__(self, context: TrainContext, *, rule_name: str, out: str) -> None:
        super().__init__(context)
        network = copy.deepcopy(self.recipe.model.build())
        with closing(context.loaders.train(0)) as train_set, train_set.epoch(0) as loader:
            read = [(batch.x, batch.target) for batch in itertools.islice(loader, PRE_READ)]
        self.bare = Bare(network, rule_name, read, self.recipe.time_steps)
        self.out = Path(out)
        self.ours_s: list[float] = []
        self.bare_s: list[float] = []

    def _train_batch(self, source: Iterator[Any]) -> None:
        began = time.perf_counter()
        super()._train_batch(source)
        self.batch_s = time.perf_counter() - began

    def _between_batches(self, epoch: int, *, last: bool) -> None:
        began = time.perf_counter()
        super()._between_batches(epoch, last=last)
        self.ours_s.append(self.batch_s + time.perf_counter() - began)
        self.bare.follow(self.backend.network)
        began = time.perf_counter()
        self.bare.step()
        self.bare_s.append(time.perf_counter() - began)
        if last:
            self.out.write_text(json.dumps({"ours_s": self.ours_s, "bare_s": self.bare_s}))


def work(job: Job, place: RankInfo, *, rule_name: str, out: str) -> dict[str, Any] | None:
    return run(job, place, trainer_of=partial(Interleaved, rule_name=rule_name, out=out))


def tuned_batch(recipe: Recipe, rule_name: str) -> int:
    """The batch size whose bare step takes about 100 ms on one thread."""
    torch.set_num_threads(1)

    def seconds(size: int) -> float:
        batch = torch.randn(size, 1, 28, 28), torch.randint(10, (size,))
        bare = Bare(recipe.model.build(), rule_name, [batch], recipe.time_steps)
        return statistics.median(timed(bare.step) for _ in range(7))

    size = 64
    for _ in range(4):
        size = max(8, round(size * STEP_S / seconds(size) / 8) * 8)
    return size


def timed(act: Any) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rule", choices=sorted(RULES), default="sltt")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    study = fashion()
    recipe = replace(
        study,
        name="overhead",
        rule=spec(RULES[arguments.rule]),
        stop_after=WARM_UP + arguments.steps,
        evaluation=replace(study.evaluation, samples=64),
    )
    recipe = replace(recipe, batch_size=tuned_batch(recipe, arguments.rule))
    with tempfile.TemporaryDirectory() as folder:
        runs, out = Path(folder), Path(folder) / "seconds.json"
        job = prepare(recipe, Cluster(), runs)
        measured = partial(work, rule_name=arguments.rule, out=str(out))
        with Ray(Cluster(), measured) as launcher:
            drive(job, launcher, new_console())
        seconds = json.loads(out.read_text())
    ours, bare = (torch.tensor(seconds[key][WARM_UP:]) for key in ("ours_s", "bare_s"))
    report(recipe, arguments.rule, ours, bare)


def report(recipe: Recipe, rule_name: str, ours: Tensor, bare: Tensor) -> None:
    overhead = float(ours.median() / bare.median()) - 1
    machine = hardware(device_here())
    print(
        f"{rule_name.upper()}, T = {recipe.time_steps}, batch {recipe.batch_size}, {len(ours)}"
        f" interleaved steps: pipeline {float(ours.median()) * 1e3:.1f} ms, bare"
        f" {float(bare.median()) * 1e3:.1f} ms, overhead {overhead:+.1%} (commit {commit()},"
        f" {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']})"
    )


if __name__ == "__main__":
    main()

"""Two DeepSpeed ranks against plain torch on the joint batch, for each rule, ZeRO stage, clipping
and accumulation.
"""

# T time, B batch, C channels, H W pixels, K classes

import itertools
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline.rules.base import Rule, World
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Conv2d
from pipeline.train.backend.deepspeed import DeepSpeed, config, import_deepspeed
from pipeline.train.objective import CrossEntropy
from tests.helpers.captured import write_captured
from tests.helpers.processes import run_ranks
from tests.helpers.silent import micro_batches, train

pytestmark = pytest.mark.distributed

TIME, BATCH, RANKS, STEPS, LR, MOMENTUM = 4, 16, 2, 2, 0.2, 0.9
RULES = {"BPTT": BPTT, "SLTT": SLTT, "SLTT-2": lambda: SLTT(k=2, rescale=True)}
STAGES = (0, 1, 2)


class Watched(LIF):
    """Remembers how near a membrane came to the threshold: a spike that rounding could flip would
    void the comparison.
    """

    nearest = float("inf")

    def charged(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        u_B = super().charged(x_B, v_B)
        Watched.nearest = min(Watched.nearest, float((u_B.detach() - self.threshold).abs().min()))
        return u_B


class Flatten(nn.Module):
    def forward(self, x_TBCHW: Tensor) -> Tensor:
        return x_TBCHW.flatten(2)


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = [BatchNorm(6, between="world")] if norm else []
    return nn.Sequential(
        Conv2d(2, 6, 3, padding=1, weights="standardized"),
        *middle,
        Watched(0.5),
        Conv2d(6, 4, 3, stride=2, padding=1),
        Watched(0.5, threshold=0.3),
        Flatten(),
        # A layer of torch's own: DeepSpeed 0.19.8 would reduce the gradients of these (not of
        # subclasses) in bf16.
        nn.Linear(4 * 3 * 3, 5),
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randn(TIME, BATCH, 2, 6, 6, generator=draw), torch.randint(
        5, (BATCH,), generator=draw
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def reference(rule: Rule, clip: float, *, norm: bool = False) -> nn.Module:
    """Plain torch on the joint batch in one process: no loop, no backend, no shares."""
    model = network(norm=norm)
    for module in model.modules():  # the joint batch in one process has nobody to synchronise with
        if isinstance(module, BatchNorm):
            module.between = "rank"
    rule.attach(model, world=World(seed=7))
    optimizer = sgd(model)
    for step in range(STEPS):
        x_TB, target_B = batch(step)
        for objective in rule.loss_terms(model, x_TB, CrossEntropy()(target_B), step=step):
            if objective.backward is not None:
                objective.backward.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def ours(
    rule: Rule,
    rank: int,
    *,
    zero: int,
    clip: float,
    accumulation: int,
    norm: bool = False,
    precision: str = "fp32",
) -> nn.Module:
    """The product's own loop and backend on this rank's rows."""
    model = network(norm=norm)
    rule.attach(model, world=World(seed=7, rank=rank, size=RANKS))
    micro = BATCH // RANKS // accumulation
    backend = DeepSpeed(
        model, sgd, micro_batch=micro, zero=zero, clip_norm=clip, precision=precision
    )

    split = {"rank": rank, "ranks": RANKS, "accumulation": accumulation}
    train(rule, backend, ((step, micro_batches(*batch(step), **split)) for step in range(STEPS)))
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    return max(
        float((a - b).abs().max())
        for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


# -------------------------------------------------------------------------------------- fp32, exact


def _fp32(rank: int, ranks: int) -> dict[tuple[Any, ...], float]:
    found = {}
    for name, clip in itertools.product(RULES, (0.0, 0.05)):
        Watched.nearest = float("inf")
        expected = reference(RULES[name](), clip)
        assert 1e-5 < Watched.nearest < float("inf"), (
            "a membrane stands within 1e-5 of threshold: choose another seed for the network"
        )
        for zero, accumulation in itertools.product(STAGES, (1, 2)):
            found[name, clip, zero, accumulation] = distance(
                ours(RULES[name](), rank, zero=zero, clip=clip, accumulation=accumulation), expected
            )
    return found


def test_two_ranks_equal_plain_torch_on_the_joint_batch(tmp_path: Path) -> None:
    found = run_ranks(_fp32, RANKS, tmp_path)
    assert len(found[0]) == len(RULES) * 2 * len(STAGES) * 2
    wrong = {case: gap for result in found for case, gap in result.items() if not gap <= 1e-6}
    assert not wrong


def _normed(rank: int, ranks: int) -> dict[tuple[str, int], float]:
    found = {}
    for name in RULES:
        expected = reference(RULES[name](), 0.0, norm=True)
        for zero in STAGES:
            found[name, zero] = distance(
                ours(RULES[name](), rank, zero=zero, clip=0.0, accumulation=1, norm=True), expected
            )
    return found


def test_two_ranks_equal_the_joint_batch_with_synchronised_batch_norm(tmp_path: Path) -> None:
    for result in run_ranks(_normed, RANKS, tmp_path):
        assert {case: gap for case, gap in result.items() if not gap <= 1e-6} == {}


# --------------------------------------------------------------------------------------------- bf16


def _split_by_hand(rule: Rule, rank: int, clip: float) -> nn.Module:
    """Plain torch split the same way: bf16 forward, fp32 gradients summed over ranks."""
    model = network()
    rule.attach(model, world=World(seed=7, rank=rank, size=RANKS))
    optimizer = sgd(model)
    half = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    for step in range(STEPS):
        x_TB, target_B = batch(step)
        for objective in rule.loss_terms(
            Bf16(model), x_TB[:, half], CrossEntropy()(target_B[half]), step=step
        ):
            if objective.backward is not None:
                (objective.backward / RANKS).backward()
        for p in model.parameters():
            assert p.grad is not None
            distributed.all_reduce(p.grad)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


class Bf16(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_TB: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(x_TB)


def _bf16(rank: int, ranks: int) -> dict[tuple[Any, ...], float]:
    found = {}
    for name, clip in itertools.product(RULES, (0.0, 0.05)):
        expected = _split_by_hand(RULES[name](), rank, clip)
        found[name, "far from fp32"] = distance(expected, reference(RULES[name](), clip))
        for zero in STAGES:
            found[name, clip, zero] = distance(
                ours(RULES[name](), rank, zero=zero, clip=clip, accumulation=1, precision="bf16"),
                expected,
            )
    return found


def test_bf16_equals_plain_torch_split_the_same_way(tmp_path: Path) -> None:
    for result in run_ranks(_bf16, RANKS, tmp_path):
        far = {case: gap for case, gap in result.items() if case[1] == "far from fp32"}
        assert min(far.values()) > 1e-5, "bf16 was not in use"
        # 1e-8 here; gradients reduced in bf16, as DeepSpeed does unless told otherwise, would be
        # 1e-4 away.
        assert {
            case: gap for case, gap in result.items() if case not in far and not gap <= 1e-6
        } == {}


# ------------------------------------------------------------------------ what the settings are for


NOISY = """
import sys, threading
from pipeline.train.backend.deepspeed import import_deepspeed as it

class Noisy:
    def find_spec(self, name, *about):
        if name == "deepspeed":
            print("[WARNING] no nvcc")
            other = threading.Thread(target=print, args=("of-another-thread",))
            other.start()
            other.join()

sys.meta_path.insert(0, Noisy())
it()
print("mlflow" in sys.modules)
import mlflow, deepspeed
it()
print(mlflow.__version__ > "3", sys.modules["mlflow"] is mlflow)
"""


def test_it_is_imported_without_mlflow_and_without_a_line_on_stdout() -> None:
    """MLflow is a second of every worker's start; afterwards whoever wants it may have it.

    0.19.8 prints warnings at its import on a machine with a GPU and no nvcc: stdout is for the JSON
    of a command. What other threads print meanwhile is not touched.
    """
    done = subprocess.run(
        [sys.executable, "-c", NOISY], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.split() == ["of-another-thread", "False", "True", "True"], done.stdout
    assert "[WARNING] no nvcc\n" in done.stderr


def _default_settings(rank: int, ranks: int) -> dict[tuple[str, int], float]:
    """SLTT under the configuration that most tutorials write."""
    deepspeed = import_deepspeed()
    found = {}
    for zero in STAGES:
        for mode in ("default", "ours"):
            model = network()
            rule = SLTT()
            rule.attach(model, world=World(seed=7, rank=rank, size=RANKS))
            settings = config(
                micro_batch=BATCH // RANKS, workers=RANKS, parameters=10_000, zero=zero
            )
            if mode == "default":
                del settings["managed_gradient_accumulation"]
            engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=settings)
            half = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
            for step in range(STEPS):
                x_TB, target_B = batch(step)
                for objective in rule.loss_terms(
                    engine, x_TB[:, half], CrossEntropy()(target_B[half]), step=step
                ):
                    engine.backward(objective.backward)
                engine.step()
            found[mode, zero] = distance(model, reference(SLTT(), 0.0))
    return found


def test_deepspeeds_default_drops_gradients_of_slTT_in_silence(tmp_path: Path) -> None:
    for found in run_ranks(_default_settings, RANKS, tmp_path):
        assert found["default", 1] > 1e-2
        assert found["default", 2] > 1e-2
        assert max(found["ours", zero] for zero in STAGES) <= 1e-6


def _resumed(rank: int, ranks: int, folder: str) -> dict[int, bool]:
    """Four steps without a break against two, a checkpoint, another engine, and two more."""
    found = {}
    for zero in STAGES:

        def engine_of(model: nn.Module, zero: int = zero) -> DeepSpeed:
            return DeepSpeed(model, sgd, micro_batch=BATCH // RANKS, zero=zero, clip_norm=0.05)

        def steps(backend: DeepSpeed, model: nn.Module, first: int, last: int) -> None:
            rule = SLTT()
            rule.attach(model, world=World(seed=7, rank=rank, size=RANKS))
            batches = (
                (step, micro_batches(*batch(step), rank=rank, ranks=RANKS))
                for step in range(first, last)
            )
            train(rule, backend, batches)
            rule.release()

        whole, first, second = network(), network(), network()
        steps(engine_of(whole), whole, 0, 4)
        before = engine_of(first)
        steps(before, first, 0, 2)
        captured = before.capture()
        steps(before, first, 2, 3)  # moves on while the copy is written
        write_captured(captured, Path(folder) / str(zero))
        distributed.barrier()
        after = engine_of(second)
        after.load(Path(folder) / str(zero))
        steps(after, second, 2, 4)
        parts = [
            name for name in captured if "optim_states" in name
        ]  # each rank's own, beside the weights of rank 0
        assert [f"_rank_{rank}_" in name for name in parts] == [True] * (zero > 0)
        assert len(captured) == len(parts) + (rank == 0)
        found[zero] = distance(whole, second) == 0.0
    return found


def test_a_checkpoint_resumes_to_the_same_bits_at_every_stage(tmp_path: Path) -> None:
    assert (
        run_ranks(_resumed, RANKS, tmp_path, str(tmp_path / "saved"))
        == [dict.fromkeys(STAGES, True)] * RANKS
    )


def test_clipping_is_off_unless_the_recipe_says_otherwise() -> None:
    assert config(micro_batch=4, workers=2, parameters=9)["gradient_clipping"] == 0.0
    assert config(micro_batch=4, workers=2, parameters=9, clip_norm=0.5)["gradient_clipping"] == 0.5


def test_a_bucket_is_no_larger_than_the_network() -> None:
    def bucket(parameters: int) -> int:
        return config(micro_batch=4, workers=2, parameters=parameters)["zero_optimization"][
            "reduce_bucket_size"
        ]

    assert (bucket(9), bucket(10**10)) == (9, 500_000_000)


def _scalar() -> str:
    model = network()
    model.gain = nn.Parameter(torch.ones(()))
    try:
        DeepSpeed(model, sgd, micro_batch=1)
    except ValueError as error:
        return str(error)
    return "accepted"


def _patience() -> list[timedelta]:
    """Of the group of all workers, and of the one that gradients are reduced in."""
    of_all: Any = distributed.group.WORLD
    distributed.distributed_c10d._set_pg_timeout(timedelta(hours=7), of_all)
    reduces: Any = DeepSpeed(network(), sgd, micro_batch=1)._engine.data_parallel_group
    assert reduces is not of_all
    return [group._get_backend(torch.device("cpu")).options._timeout for group in (of_all, reduces)]


def _built(rank: int, ranks: int) -> tuple[str, list[timedelta]]:
    return _scalar(), _patience()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[timedelta]]:
    """What came of two networks, in a process of their own."""
    [found] = run_ranks(_built, 1, tmp_path_factory.mktemp("built"))
    return found


def test_a_scalar_parameter_is_refused_by_name(built: tuple[str, list[timedelta]]) -> None:
    assert built[0].endswith("got gain: use shape (1,)")


def test_gradients_wait_for_a_worker_as_long_as_anything_else(
    built: tuple[str, list[timedelta]],
) -> None:
    """Torch's default for a new group gives up long before a watchdog that has more patience."""
    assert built[1] == [timedelta(hours=7)] * 2


@pytest.mark.parametrize(
    ("zero", "clip", "computed"), [(0, 0.0, True), (1, 0.0, False), (2, 0.0, False), (2, 0.5, True)]
)
def test_the_norm_of_gradients_is_computed_only_to_clip_them(
    zero: int, clip: float, computed: bool
) -> None:
    """DeepSpeed (0.19.8) refuses the setting at stage 0, where it computes none but to clip."""
    settings = config(micro_batch=4, workers=2, parameters=9, zero=zero, clip_norm=clip)[
        "zero_optimization"
    ]
    assert settings.get("compute_grad_norm", True) is computed

"""Meters against a batch whose loss, hits and bytes are known."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from pipeline.forecast.step_counts import KernelLog
from pipeline.measure.constants import PARTS, REST
from pipeline.measure.meters import Meters, Quantity, Totals
from pipeline.rules.base import LossTerm, Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.neuron import LIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear, Weights
from pipeline.train.backend.plain import Plain
from pipeline.train.loop import MicroBatch
from tests.helpers.silent import train
from tests.measure.conftest import Host


def same(value: Tensor) -> Tensor:
    return value


@pytest.fixture
def meters(host: Host) -> Meters:
    return Meters(nn.Linear(2, 2), batch_size=4, device=torch.device("cpu"), memory_every=3)


def run_batch(meters: Meters, host: Host, step: int, *, right: int = 3) -> None:
    """Two micro-batches of two samples, each in two shares and with a wait of 1 s, and a move of
    the weights that takes 3 s.
    """
    with meters.batch(step):
        for index in range(2):
            with meters.part("data_wait"):
                host.sleep(1)
            target_B = torch.tensor([0, 1])
            answer_B = [
                target if index * 2 + target < right else 1 - target for target in target_B.tolist()
            ]
            logits_BK = torch.eye(2)[answer_B] / 2
            for backward in (torch.tensor(1.0), None):
                meters.add(LossTerm(backward, torch.tensor(0.5 + index), logits_BK))
            meters.end_of_micro_batch(target_B, 0.5)
        with meters.part("optimizer"):
            host.sleep(3)


def test_loss_hits_and_time_of_known_batches(meters: Meters, host: Host) -> None:
    for step in range(2):
        run_batch(meters, host, step)
    seconds = dict.fromkeys((*PARTS, REST), 0.0) | {"data_wait": 2, "optimizer": 3, "step": 5}
    assert meters.take(same) == {
        "loss": pytest.approx(0.5 * (0.5 + 0.5) + 0.5 * (1.5 + 1.5)),
        "top1": 0.75,
        "images_per_s": 4 / 5,
        **{f"{name}_s": value for name, value in seconds.items()},
    }
    assert meters.totals.backward_calls == 4
    run_batch(meters, host, 2, right=4)
    assert meters.take(same)["top1"] == 1.0  # the window began anew


def test_each_loss_is_weighed_with_the_share_of_its_micro_batch(meters: Meters) -> None:
    with meters.batch(0):
        for losses, share in (([1.0], 0.25), ([0.5, 2.0, 0.25], 0.75)):
            for loss in losses:
                meters.add(LossTerm(None, torch.tensor(loss), torch.zeros(2, 2)))
            meters.end_of_micro_batch(torch.tensor([0, 1]), share)
    assert meters.take(same)["loss"] == 0.25 * 1.0 + 0.75 * 2.75


def test_a_part_has_the_seconds_of_what_makes_the_next_one_alone(
    meters: Meters, host: Host
) -> None:
    """And a teacher's seconds are its own."""
    for step in range(2):
        with meters.batch(step):
            for _ in meters.each("forward", (host.sleep(2) for _ in range(2))):
                host.sleep(1)
            with meters.part("teacher"):
                host.sleep(5)
    taken = meters.take(same)
    names = ("forward_s", "teacher_s", "rest_s", "step_s")
    assert [taken[name] for name in names] == [4, 5, 2, 11]
    assert meters.totals.seconds["teacher"] == 5  # of the second batch


def test_the_first_batch_and_those_that_count_memory_are_no_measure_of_speed(
    meters: Meters, host: Host
) -> None:
    for step in range(6):
        run_batch(meters, host, step)
    meters.take(same)
    totals = meters.totals
    # 0 compiles, 1 and 4 count memory, 2 counts operations
    assert (totals.batches, totals.steady_samples) == (6, 4 * 2)
    assert (totals.steady_s, totals.train_s) == (2 * 5, 5 * 5)
    assert totals.mean_steady_s("optimizer") == 3


def test_what_the_first_batch_waits_for_is_no_parts(meters: Meters, host: Host) -> None:
    """Of two equal runs the second finds everything compiled; nothing in their totals says which
    went first.
    """
    with meters.batch(0), meters.part("data_wait"):
        host.sleep(100)
    assert meters.take(same)["data_wait_s"] == 100  # shown as it trains
    run_batch(meters, host, 1)
    meters.take(same)
    totals = meters.totals
    assert (totals.seconds["data_wait"], totals.train_s) == (2, 5)
    assert (totals.timed_batches, totals.batches) == (1, 2)


def test_a_first_batch_that_is_skipped_is_start_up_too(meters: Meters, host: Host) -> None:
    run_batch(meters, host, 0)
    meters.drop(0)
    run_batch(meters, host, 1)
    assert meters.take(same)["loss"] == pytest.approx(0.5 * (0.5 + 0.5) + 0.5 * (1.5 + 1.5))
    assert meters.totals.seconds["skipped"] == 0


def bytes_of_training(rule: Rule, *, weights: Weights = "plain") -> tuple[int, int]:
    """Saved and beside them, of 5 samples at T = 6 on 6 inputs, 8 neurons and 3 outputs, in
    fp32.
    """
    network = nn.Sequential(Linear(6, 8, weights=weights), LIF(), Linear(8, 3, weights=weights))
    rule.attach(network)
    meters = Meters(network, batch_size=5, device=torch.device("cpu"))
    backend = Plain(network, lambda network: torch.optim.SGD(network.parameters(), lr=0.1))
    batch = MicroBatch(torch.rand(6, 5, 6), torch.zeros(5, dtype=torch.long), range(5), 1.0)
    train(rule, backend, [(step, [batch]) for step in range(2)], meters)
    assert meters.totals.peak_saved_bytes is not None and meters.totals.state_bytes is not None
    return meters.totals.peak_saved_bytes, meters.totals.state_bytes


INPUT, NEURONS = 5 * 6 * 4, 5 * 8 * 4
# of a step: the logarithms of its softmax, its targets, and the sum of their weights
LOSS = 5 * 3 * 4 + 5 * 8 + 4
# the input, the membrane above threshold, and what the second synapse multiplies
STEP = INPUT + 2 * NEURONS + LOSS


@pytest.mark.parametrize(
    ("rule", "saved", "beside"),
    [
        (SLTT, STEP, 0),
        (lambda: SLTT(k=1), STEP, 0),
        (OTTT, STEP, 0),  # its trace is what the second synapse saves
        (lambda: OTTT(readout="plain"), STEP, 0),
        (lambda: OTTT(update="step"), STEP, 0),
        (
            lambda: OTTT(chunk=2),
            2 * STEP - 40,
            2 * NEURONS,
        ),  # one storage of targets; what the trace goes on from is a copy
        (BPTT, 6 * STEP - 5 * 40, NEURONS),
    ],
)
def test_states_are_counted_beside_what_backward_keeps(
    rule: Callable[[], Rule], saved: int, beside: int
) -> None:
    """At single steps the membrane is stored before its reset, which the backward keeps, too. In
    larger slices it is a tensor of its own.
    """
    assert bytes_of_training(rule()) == (saved, beside)


def test_of_weights_that_slices_share_backward_keeps_those_of_the_second_synapse() -> None:
    """The first one's carry no error down. Their gradients are in nobody's backward."""
    first, second = 8 * 6 * 4, 3 * 8 * 4
    made_with = 2 * (8 + 3) * 4 + (8 + 3) * 4  # mean, scale and gain of each filter
    # the last one has no gradient to collect
    for rule, collected in ((SLTT(), first + second), (OTTT(), first + second), (SLTT(k=1), 0)):
        expected = STEP + made_with + second, first + collected
        assert bytes_of_training(rule, weights="standardized") == expected


def test_of_a_batch_that_is_skipped_its_seconds_alone_are_kept_and_the_next_is_counted_in_its_place(
    host: Host,
) -> None:
    """Batch 1, where bytes are due, and 3, where operations are due, are dropped: bytes are counted
    on 2, too, operations on 4. The memory of a dropped batch was in use.
    """
    network = nn.Sequential(Linear(2, 2, bias=False), LIF())
    meters = Meters(network, batch_size=4, device=torch.device("cpu"))
    totals, seen = meters.totals, []
    for step, samples in enumerate((2, 9, 4, 9, 6, 2)):
        with meters.batch(step), fresh_state(network):
            logits_BK = network(torch.zeros(1, samples, 2)).mean(0)
            meters.add(LossTerm(logits_BK.sum(), torch.tensor(0.0), logits_BK.detach()))
            if step in (1, 3):
                host.sleep(5)
            meters.end_of_micro_batch(torch.zeros(samples, dtype=torch.long), 1.0)
        if step in (1, 3):
            meters.drop(step)
        counted = totals.peak_saved_bytes is not None, totals.state_bytes, totals.operation_samples
        seen.append((*counted, totals.backward_calls, totals.batches))
    membranes = 9 * 2 * 4
    assert seen == [
        (False, None, 0, 1, 1),
        (True, membranes, 0, 1, 1),
        (True, membranes, 0, 2, 2),
        (True, membranes, 0, 2, 2),
        (True, membranes, 6, 3, 3),
        (True, membranes, 6, 4, 4),
    ]
    assert totals.steady_batches == 0
    meters.take(same)
    assert totals.seconds["skipped"] == 2 * 5
    assert totals.steady_batches == 1 and totals.train_s == 0


def test_operations_of_the_rule_alone_are_counted_on_the_third_batch_by_the_sample() -> None:
    """Neither a teacher's products nor an optimizer's; and an instrument of somebody else looks
    away there, too.
    """
    network, x_BC = nn.Linear(2, 2, bias=False), torch.tensor([[2.0, 3.0], [0.0, 5.0]])
    meters, kernel_log = Meters(network, batch_size=2, device=torch.device("cpu")), KernelLog()
    for step in range(4):
        if step == 3:
            meters.watch(kernel_log)
        with meters.batch(step):
            with meters.part("teacher"):
                network(x_BC)
            logits_BK = network(x_BC)
            logits_BK.square().sum().backward()
            meters.add(LossTerm(None, torch.tensor(0.0), logits_BK.detach()))
            meters.end_of_micro_batch(torch.tensor([0, 1]), 1.0)
            with meters.part("optimizer"):
                torch.mm(x_BC, x_BC)
    work = {"multiplications": 3.0, "additions": 3.0, "dense": 4.0}
    assert meters.totals.operation_samples == 2
    assert meters.totals.operations_per_sample() == {"forward": work, "weights": work}
    assert [each.flops for each in kernel_log.operations if each.flops] == [16, 16]
    # as a checkpoint keeps it
    assert Totals(**json.loads(json.dumps(asdict(meters.totals)))) == meters.totals


def test_operations_are_counted_at_the_same_steps_whatever_attempt_makes_them() -> None:
    """Three attempts, of steps 0 and 1, of 2 to 4, and of 5 to 1004; a network that has learnt
    spikes otherwise.
    """
    at: list[int] = []
    for steps in (range(2), range(2, 5), range(5, 1005)):
        meters = Meters(nn.Linear(1, 1), batch_size=1, device=torch.device("cpu"))
        for batch, step in enumerate(steps):
            if what := meters._quantity_to_count(batch, step):
                at += [step] if what == "operations" else []
                del meters._due[what]
    assert at == [2, 1002]


@pytest.mark.parametrize(
    ("memory_every", "operations_every", "counted"),
    [
        (1, None, [None, "bytes", "bytes", "bytes"]),
        (None, 1, [None, None, "operations", "operations"]),
        (1, 1, [None, "bytes", "bytes", "operations"]),  # which has waited for bytes
    ],
)
def test_what_waits_longest_is_counted_next(
    memory_every: int | None, operations_every: int | None, counted: list[Quantity | None]
) -> None:
    meters = Meters(
        nn.Linear(1, 1),
        batch_size=1,
        device=torch.device("cpu"),
        memory_every=memory_every,
        operations_every=operations_every,
    )
    for batch, quantity in enumerate(counted):
        assert meters._quantity_to_count(batch, batch) == quantity
        meters._due.pop(quantity, None)  # type: ignore[call-overload]


@pytest.mark.parametrize("of", ["rss", "reserved"])
@pytest.mark.parametrize("above", [0, 1])
def test_what_is_free_is_given_back_where_it_would_be_told_as_trainings(
    meters: Meters, monkeypatch: pytest.MonkeyPatch, of: str, above: int
) -> None:
    """Of the host and of a card, each by its own peak."""
    bytes_now = {"rss": 5_000_000, "reserved": 20_000_000}
    given_back: list[str] = []
    for name, act in {
        "rss_bytes": lambda: bytes_now["rss"],
        "torch.cuda.memory_reserved": lambda _: bytes_now["reserved"],
        "peaks": lambda _: {f"peak_{each}_bytes": value for each, value in bytes_now.items()},
        "reset_peak_device_bytes": lambda _: None,
        "release_freed_memory": lambda: given_back.append("rss"),
        "torch.cuda.empty_cache": lambda: given_back.append("reserved"),
    }.items():
        monkeypatch.setattr(f"pipeline.measure.meters.{name}", act)
    meters.device = torch.device("cuda")
    meters.note_peaks()
    bytes_now[of] += above
    meters.forget_peaks()
    assert given_back == [of] * above


def test_an_evaluation_has_peaks_of_its_own(meters: Meters) -> None:
    totals = meters.totals
    meters.forget_peaks()
    with meters.evaluating() as note:
        block = bytearray(b"x") * (200 << 20)
        del block
        note()
        # as an instrument does, once every answer is there
        counting = bytearray(b"x") * (400 << 20)
        del counting
    meters.note_peaks()
    more = totals.evaluation_peak_rss_bytes - totals.peak_rss_bytes
    assert 150 << 20 < more < 350 << 20
    # no device
    assert totals.evaluation_peak_device_bytes == totals.evaluation_peak_reserved_bytes == 0
    highest = totals.evaluation_peak_rss_bytes
    with meters.evaluating() as note:
        note()
    assert totals.evaluation_peak_rss_bytes == highest  # of all evaluations


def test_what_training_keeps_free_for_itself_is_no_peak_of_an_evaluation() -> None:
    """In a process that keeps what it freed, as those that train do."""
    told = subprocess.run(
        [sys.executable, "-c", KEPT_FREE], capture_output=True, text=True, check=True
    ).stdout.split()
    training, evaluation = map(int, told)
    assert evaluation < training - (150 << 20)


KEPT_FREE = """
import torch
from pipeline.core.torch_settings import keep_freed_memory
assert keep_freed_memory()
from pipeline.measure.meters import Meters
meters = Meters(torch.nn.Linear(1, 1), batch_size=1, device=torch.device("cpu"))
blocks = [torch.ones(1 << 18) for _ in range(200)]  # a MB each, from the heap
del blocks
with meters.evaluating() as note:
    note()
print(meters.totals.peak_rss_bytes, meters.totals.evaluation_peak_rss_bytes)
"""


def test_totals_over_ranks_take_the_largest_peak(meters: Meters) -> None:
    peaks = {"peak_saved_bytes": 5, "state_bytes": 7, "evaluation_peak_rss_bytes": 9}
    for given, expected in ((peaks, [6, 8, 10]), ({}, [None, None, 1])):
        meters.totals = Totals(**given, steady_batches=3)
        found = meters.totals_over_ranks(lambda peaks: peaks + 1 * (peaks >= 0), lambda mean: mean)
        assert [getattr(found, name) for name in peaks] == expected
        assert found.peak_rss_bytes > 1e6 and found.steady_batches == 3

"""Operations of training against counts by hand, of each rule on Linear(6 -> 8), neurons,
Linear(8 -> 3); and pairs against loops over every pair.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.measure.meters import Meters
from pipeline.measure.operations import Operations, Work, has_one_magnitude
from pipeline.rules import spide
from pipeline.rules.base import Rule
from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT, selected_steps
from pipeline.rules.spide import SPIDE
from pipeline.spiking.binary import binarize
from pipeline.spiking.equilibrium import Equilibrium, Linearized
from pipeline.spiking.neuron import IF, LIF
from pipeline.spiking.op_scope import current_scope
from pipeline.spiking.rate import RateIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import batch, cross_entropy, drawn, learn
from tests.helpers.traces import traces_of

# T time, B batch; N hidden neurons, K classes


T, B, I, N, K = 4, 5, 6, 8, 3


def two_layers(neuron: nn.Module, **readout: Any) -> nn.Sequential:
    first, last = drawn(nn.Sequential(Linear(I, N), Linear(N, K, **readout)), seed=8)
    return nn.Sequential(first, neuron, last).double()


class Seen:
    """What passed the modules of a network while it learnt: spikes, and the errors that came back
    to synapses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)
        self.errors: dict[str, list[Tensor]] = defaultdict(list)
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _, __, out, name=name: self._note(self.outputs[name], out)
            )
            if isinstance(module, Linear):
                module.register_full_backward_hook(
                    lambda _, __, g, name=name: self._note(self.errors[name], g[0])
                )

    def _note(self, noted: list[Tensor], value: Tensor) -> None:
        if current_scope() is None:  # a solver runs the same modules for itself
            noted.append(value.detach())


def learnt(
    rule: Rule,
    model: nn.Module,
    *,
    steps: int = T,
    batches: int = 1,
    before: int = 0,
    rate: float = 0.0,
) -> tuple[Operations, Seen, Tensor]:
    """`batches` of training under `rule`, counted, after `before` that are not; at `rate`, if the
    rule moves at every step.
    """
    x_TBI, target_B = batch(steps, size=B)
    rule.attach(model, over_time=rule.over_time_choices[0])
    for step in range(before):
        learn(rule.loss_terms(model, x_TBI, cross_entropy(target_B), step=step))
        rule.end_of_batch()
    seen, operations = Seen(model), Operations(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with operations:
        for step in range(before, before + batches):
            for objective in rule.loss_terms(model, x_TBI, cross_entropy(target_B), step=step):
                if objective.backward is not None:
                    objective.backward.backward()
                if rule.update == "step" and rate:
                    optimizer.step()
            rule.end_of_batch()
    return operations, seen, x_TBI


def live(*values: Tensor) -> int:
    return sum(int(value.count_nonzero()) for value in values)


def found(operations: Operations) -> dict[str, tuple[int, int]]:
    return {
        purpose: (work.multiplications, work.additions) for purpose, work in operations.work.items()
    }


# --------------------------------------------------------------------------------------- in numbers


def test_one_neuron_in_numbers() -> None:
    """Two inputs (3, 2), a third of 0, one neuron that fires at both of two steps, one output:
    every operation written out.
    """
    first, second = Linear(3, 1, bias=False), Linear(1, 1, bias=False)
    model = nn.Sequential(first, LIF(decay=0.5), second).double()
    with torch.no_grad():  # u = 1.25, then 1.375: psi = .75, .625
        first.weight.copy_(torch.tensor([[0.5, -0.125, 7.0]]))
        second.weight.fill_(2.0)
    x_TB = torch.tensor([3.0, 2.0, 0.0]).expand(2, 1, 3).double().contiguous()
    with Operations(model) as operations, fresh_state(model):
        model(x_TB).sum().backward()
    assert operations.work == {
        # .5 * 3 and -.125 * 2 at each step; the spike adds 2 at each step
        "forward": Work(4, 6, 8),
        "error": Work(0, 2, 2),  # the error is 1 at each step, so the weight is added
        # g * 3 and g * 2 at each step; the spike adds the error of 1 at each step
        "weights": Work(4, 6, 8),
    }


# ---------------------------------------------------------------------------------------- each rule


def forward_of(seen: Seen, x_TBI: Tensor) -> tuple[int, int]:
    return live(x_TBI) * N, live(x_TBI) * N + live(*seen.outputs["1"]) * K


def feed_forward(
    seen: Seen, x_TBI: Tensor, steps: Sequence[int] = range(T)
) -> dict[str, tuple[int, int]]:
    """What rules cost that hand errors down through the synapses, at these steps."""
    s_TBN, g_TBN, e_TBK = (
        torch.cat(values) for values in (seen.outputs["1"], seen.errors["0"], seen.errors["2"])
    )
    assert len(g_TBN) == len(e_TBK) == len(steps) and live(e_TBK) == len(steps) * B * K
    assert 0 < live(g_TBN) < g_TBN.numel() and 0 < live(s_TBN) < s_TBN.numel()
    return {
        "forward": forward_of(seen, x_TBI),
        "error": (live(e_TBK) * N, live(e_TBK) * N),
        "weights": (live(g_TBN) * I, live(g_TBN) * I + live(s_TBN[list(steps)]) * K),
    }


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (BPTT(), "plain"),
        (SLTT(), "plain"),
        (SLTT(chunk=2), "plain"),
        (BPTT(truncate=2), "plain"),
        (SLTT(), "standardized"),
    ],
    ids=lambda value: getattr(value, "label", value),
)
def test_rules_that_hand_errors_down(rule: Rule, weights: str) -> None:
    operations, seen, x_TBI = learnt(rule, two_layers(LIF(), weights=weights))
    assert found(operations) == feed_forward(seen, x_TBI)


def test_recomputation_is_a_second_forward() -> None:
    operations, seen, x_TBI = learnt(BPTT(recompute=True), two_layers(LIF()))
    half = {name: values[: len(values) // 2] for name, values in seen.outputs.items()}
    seen.outputs = half if len(seen.outputs["1"]) > T else seen.outputs
    expected = feed_forward(seen, x_TBI)
    assert found(operations) == {**expected, "recomputation": expected["forward"]}


@pytest.mark.parametrize("k", [1, 2])
def test_sltt_k_works_backward_k_times_whatever_t(k: int) -> None:
    backward = set()
    for steps in (4, 8, 16):
        rule = SLTT(k)
        operations, seen, x_TBI = learnt(rule, two_layers(LIF()), steps=steps)
        chosen = list(selected_steps(steps, k, seed=rule.world.seed, step=0))
        assert len(chosen) == k
        assert found(operations) == feed_forward(seen, x_TBI, chosen)
        backward.add(operations.work["error"].multiplications)
    assert len(backward) == 1


@pytest.mark.parametrize(
    "rule", [OTTT(), OTTT(update="step"), OPZO(feedback="random")], ids=lambda rule: rule.label
)
def test_ottt_and_dfa_multiply_traces(rule: Rule) -> None:
    """DFA pays for a matrix that it does not learn."""
    operations, seen, x_TBI = learnt(rule, two_layers(LIF()), rate=1e-3)
    traces_TBN, g = traces_of(torch.cat(seen.outputs["1"]), 0.5), live(*seen.errors["0"]) * I
    # the trace of the first step is its spikes
    weights = (g + live(traces_TBN[1:]) * K, g + live(traces_TBN) * K)
    if isinstance(rule, OPZO):
        expected = {"forward": forward_of(seen, x_TBI), "feedback": (T * B * N * K,) * 2}
    else:
        expected = feed_forward(seen, x_TBI)
    assert found(operations) == {**expected, "weights": weights}


@pytest.mark.parametrize(
    ("feedback", "before", "products"),
    [("momentum", 1, 2), ("single_point", 0, 0)],  # M e and z o^T; element by element
)
def test_opzo_pays_for_its_feedback_and_hands_nothing_down(
    feedback: Any, before: int, products: int
) -> None:
    operations, seen, _ = learnt(OPZO(feedback=feedback), two_layers(LIF()), before=before)
    g, product = live(*seen.errors["0"]) * I, T * B * N * K
    forward = T * B * I * N + product  # noise on the spikes makes them real
    expected = {"forward": (forward,) * 2, "weights": (g + product,) * 2}
    if products:
        expected["feedback"] = (products * product,) * 2
    assert found(operations) == expected


def test_dsr_takes_means_over_time() -> None:
    operations, seen, x_TBI = learnt(DSR(), two_layers(RateIF(threshold=3.0)))
    rates = (0, T * B * N)  # IF's weights are all 1 / T
    assert found(operations) == {**feed_forward(seen, x_TBI), "rates": rates}


def feedback_network() -> nn.Sequential:
    equilibrium = Equilibrium(
        inject=Linear(I, N), feedback=Linear(N, N, bias=False), neurons=[IF(threshold=4.0)]
    )
    return drawn(nn.Sequential(equilibrium, Linear(N, K)), seed=8)


def at_rest(seen: Seen) -> tuple[dict[str, tuple[int, int]], int]:
    """What IDE and SPIDE share: forward, error, weights; and the product of the feedback with
    a[T].
    """
    s_TBN, e_BK = torch.cat(seen.outputs["0.neurons.0"]), torch.cat(seen.errors["1"])
    g_BN = torch.cat(seen.errors["0.inject"])
    a = live(s_TBN.mean(0))
    inject = (T + 1) * B * I * N  # each frame, and their mean
    assert 0 < live(s_TBN[:-1]) < s_TBN.numel() and 0 < live(g_BN) < g_BN.numel()
    again = int(((g_BN != 0).sum(-1) * (s_TBN.mean(0, keepdim=True) != 0).sum(-1)).sum())
    return {
        "forward": (inject + a * (N + K), inject + a * (N + K) + live(s_TBN[:-1]) * N),
        "error": (live(e_BK) * N, live(e_BK) * N),
        "weights": (a * K + live(g_BN) * I + again, a * K + live(g_BN) * I + again),
    }, a * N


def test_ide_pays_for_its_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    transposed = Linearized.transposed

    def noted(self: Linearized, layer: int, d_B: Tensor) -> Tensor:
        asked.append(d_B.detach())
        return transposed(self, layer, d_B)

    monkeypatch.setattr(Linearized, "transposed", noted)
    operations, seen, _ = learnt(IDE(solver="fixed_point"), feedback_network())
    expected, linearized = at_rest(seen)
    assert len(asked) > 3
    solver = linearized + live(*asked) * N
    assert found(operations) == {**expected, "solver": (solver, solver)}


def test_spides_second_phase_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted: list[int] = []
    event_driven = spide._event_driven

    def noted(weight: Tensor, gain_BM: Tensor) -> Any:
        handed = event_driven(weight, gain_BM)

        def transposed(u_BN: Tensor, s_BM: Tensor) -> None:
            emitted.append(live(gain_BM * s_BM))
            handed(u_BN, s_BM)

        return transposed

    monkeypatch.setattr(spide, "_event_driven", noted)
    operations, seen, _ = learnt(SPIDE(steps=20, scale=4.0), feedback_network())
    expected, linearized = at_rest(seen)
    assert len(emitted) == 20 and sum(emitted) > 0
    assert found(operations) == {
        **expected,
        "solver": (linearized, linearized + sum(emitted) * N),
    }


def test_hlop_pays_for_its_lateral_neurons_and_its_projection() -> None:
    rule = HLOP(SLTT(), rows=((2, 3),), inner_iterations=1)
    model = two_layers(LIF())
    operations, seen, x_TBI = learnt(rule, model)
    s_TBN = torch.cat(seen.outputs["1"])
    heard, spiked = T * B * I * I, int(s_TBN.count_nonzero(-1).square().sum())
    second_NN = torch.einsum("tbi,tbj->ij", s_TBN, s_TBN)
    learning = 2 * (I * I + 2 * 2 * I) + 3 * (live(second_NN) + 2 * 3 * N)
    learning += 2 * (2 * 2 * I + 3 * 3 * N)  # inner products of the rows, twice, for both synapses
    lateral = (heard + learning, heard + spiked + learning)
    assert found(operations) == {**feed_forward(seen, x_TBI), "lateral": lateral}

    rule.start_task(model, 1)
    x_TBI, target_B = batch(T, size=B)
    with Operations(model) as operations:
        learn(rule.loss_terms(model, x_TBI, cross_entropy(target_B), step=1))
    projected = T * (2 * N * I * 2 + 2 * K * N * 3)  # g H^T and H, at each step, for both weights
    lateral = operations.work["lateral"]
    assert lateral.dense == heard + T * B * N * N + projected


# ------------------------------------------------------------------------------- what else is there


def binary() -> nn.Sequential:
    network = two_layers(LIF())
    binarize(network[2], "scaled")  # type: ignore[arg-type]
    return network


@pytest.mark.parametrize(
    ("rule", "network", "has_one_magnitude"),
    [
        (BPTT(), two_layers(LIF()), False),
        (BPTT(), binary(), True),
        (HLOP(SLTT(), rows=((2, 3),), error="sign_symmetric"), two_layers(LIF()), True),
        (HLOP(SLTT(), rows=((2, 3),), error="feedback"), two_layers(LIF()), False),
    ],
    ids=["plain", "1-bit", "signs", "fixed"],
)
def test_an_error_behind_weights_of_one_magnitude_is_added(
    rule: Rule, network: nn.Sequential, has_one_magnitude: bool
) -> None:
    operations, _, _ = learnt(rule, network)
    pairs = T * B * N * K
    assert operations.work["error"] == Work(0 if has_one_magnitude else pairs, pairs, pairs)


def test_attention_in_a_backward_is_error() -> None:
    q = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    k = (torch.rand(2, 4, 3, dtype=torch.float64) > 0.5).double().requires_grad_()
    with Operations(nn.Identity()) as operations:
        (q @ k).square().sum().backward()
    assert operations.work["forward"] == Work(0, 3 * live(k), 72)
    assert operations.work["error"].dense == 144


def test_products_that_torch_makes_inside_one_operation_are_named() -> None:
    """Nothing is counted or named in a pause."""
    q, model = torch.rand(1, 2, 4, 8, requires_grad=True), two_layers(LIF())
    with Operations(model) as operations:
        with operations.paused(), fresh_state(model):
            nn.LSTM(3, 3)(torch.rand(2, 1, 3))
            model(batch(T, size=B)[0])
        assert not operations.not_counted and not operations.work
        F.scaled_dot_product_attention(q, q, q).sum().backward()
        (q @ q.transpose(2, 3)).sum().backward()
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert operations.not_counted == {fused, f"{fused}_backward"}
    assert sum(work.dense for work in operations.work.values()) == 3 * 2 * 4 * 4 * 8
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.rand(1, 4, 8)
    with torch.no_grad(), Operations(layer) as operations:
        layer(x, x, x)
    assert operations.not_counted  # whichever way torch takes


def test_what_a_network_makes_uncounted_is_in_the_summary_of_a_batch() -> None:
    network = nn.LSTM(3, 3)
    meters = Meters(network, batch_size=1, device=torch.device("cpu"), operations_every=3)
    for step in range(3):
        with meters.batch(step):
            network(torch.rand(2, 1, 3))
    assert meters.totals.not_counted == ["mkldnn_rnn_layer"]


def test_nothing_is_counted_twice_in_inference_mode() -> None:
    model = two_layers(LIF()).eval()
    x_TBI, _ = batch(T, size=B)
    modes: list[Callable[[], Any]] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    counts: set[Work] = set()
    for mode in modes:
        with mode(), Operations(model) as operations, fresh_state(model):
            model(x_TBI)
        counts.add(operations.work["forward"])
    [work] = counts
    assert work.dense == T * B * (I * N + N * K)


def sparse(*shape: int, seed: int = 0) -> Tensor:
    """Integers, a third of them 0."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def met(pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Of all pairs, those without a 0; and all."""
    return sum(bool(a != 0) and bool(b != 0) for a, b in pairs), len(pairs)


def counted(act: Callable[[], Any], *weights: Tensor) -> dict[str, tuple[int, int]]:
    """By purpose: pairs without a 0, and all pairs."""
    network = nn.ParameterList(weights)
    with Operations(network) as operations:
        act()
    return {purpose: (work.additions, work.dense) for purpose, work in operations.work.items()}


@pytest.mark.parametrize("shape", [(), (2,)])
def test_products_of_matrices(shape: tuple[int, ...]) -> None:
    a, b = sparse(*shape, 4, 5), sparse(*shape, 5, 3, seed=1)
    every = [
        (a[*m, n, i], b[*m, i, o])
        for *m, n, i, o in itertools.product(*map(range, (*shape, 4, 5, 3)))
    ]
    assert counted(lambda: a @ b) == {"forward": met(every)}
    assert 0 < met(every)[0] < met(every)[1]


def test_more_rows_than_a_float_counts() -> None:
    rows = 2**24 + 3  # the next float is 2^24 + 4
    assert counted(lambda: torch.ones(rows, 1) @ torch.ones(1, 1)) == {"forward": (rows, rows)}


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "transposed", "more"),
    [
        *(
            (*sizes, transposed, 0)
            for sizes in [(1, 1, 1, 1), (2, 1, 1, 2), (1, 0, 2, 1), (3, 2, 1, 4), (2, 0, 1, 1)]
            for transposed in (False, True)
        ),
        (2, 1, 1, 1, True, 1),
    ],
)
def test_the_three_products_of_a_convolution(
    stride: int, padding: int, dilation: int, groups: int, transposed: bool, more: int
) -> None:
    """A transposed convolution is the error of a convolution from its outputs to its inputs."""
    weight, how = nn.Parameter(sparse(8, 4 // groups, 3, 2)), (stride, padding)
    x = sparse(2, 8 if transposed else 4, 7, 6, seed=1).requires_grad_()

    def convolve() -> Tensor:
        if transposed:
            return F.conv_transpose2d(x, weight, None, *how, more, groups, dilation)
        return F.conv2d(x, weight, None, *how, dilation, groups)

    g = sparse(*convolve().shape, seed=2)
    outer, inner = (x, g) if transposed else (g, x)  # of 8 channels, and of 4
    triples = []  # (output, input, weight) of every pair inside the image
    places = itertools.product(*map(range, (2, 8, *outer.shape[2:], 4 // groups, 3, 2)))
    for n, o, p, q, c, h, w in places:
        row, column = p * stride + h * dilation - padding, q * stride + w * dilation - padding
        if 0 <= row < inner.shape[2] and 0 <= column < inner.shape[3]:
            channel = o // (8 // groups) * (4 // groups) + c
            pair = outer[n, o, p, q], inner[n, channel, row, column]
            triples.append((*(pair[::-1] if transposed else pair), weight[o, c, h, w]))

    expected = {
        "forward": met([(x, w) for _, x, w in triples]),
        "error": met([(g, w) for g, _, w in triples]),
        "weights": met([(g, x) for g, x, _ in triples]),
    }
    assert counted(lambda: convolve().backward(g), weight) == expected
    x.requires_grad_(False)  # as of a first layer
    del expected["error"]
    assert counted(lambda: convolve().backward(g), weight) == expected


def test_even_is_one_magnitude_in_each_row() -> None:
    assert has_one_magnitude(torch.tensor([[0.0, 1.0, 1.0], [-0.3, 0.3, 0.0]]))
    assert not has_one_magnitude(torch.tensor([[0.0, 1.0, 2.0], [0.3, 0.3, 0.0]]))
    assert has_one_magnitude(torch.zeros(2, 0)) and has_one_magnitude(torch.zeros(2, 3))
    assert has_one_magnitude(torch.tensor([[1.0], [-1.0], [0.0]])) and not has_one_magnitude(
        torch.tensor([[2.0], [1.0]])
    )


@pytest.mark.parametrize("where", [0, 1500, 9999])
@pytest.mark.parametrize("rows", [1, 4, 10_000])
def test_one_number_among_many_is_enough_not_to_be_even(rows: int, where: int) -> None:
    x_OI = torch.arange(10_000.0).remainder(2).reshape(rows, -1)
    assert has_one_magnitude(x_OI)
    x_OI.flatten()[where] = 0.5
    assert not has_one_magnitude(x_OI)

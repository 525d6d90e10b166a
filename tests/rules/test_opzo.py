"""OPZO: three local factors, matrices that find the Jacobian, noise that knows neither ranks nor
micro-batches.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.random import counter_hash, signed
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.models.transforms import multi_head, select_head
from pipeline.rules.base import World
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.spiking.local_learning import Readout
from pipeline.spiking.neuron import LIF
from pipeline.spiking.noise import noise
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.plain import Plain
from pipeline.train.objective import CrossEntropy
from tests.helpers.references import gradient_of as reference_gradient
from tests.helpers.rule_networks import (
    CLASSES,
    FEATURES,
    Network,
    attached,
    batch,
    cross_entropy,
    difference,
    drawn,
    learn,
    lif_network,
    one_batch,
    outputs,
    refusals,
    spikes_of,
)

# So small that no membrane of a test can tell, in float32 or float64.
IMPERCEPTIBLE = {"noise": 1e-30, "inject": "membrane"}

contract_exceptions = {
    "test_one_step_equals_bptt": (
        "errors do not pass backwards through the layers, which is what BPTT does within one step"
    ),
}


def smallest_model() -> nn.Sequential:
    """Readouts beside the network: some rules use them, and to the others they must make no
    difference.
    """
    readouts = nn.ModuleList([Readout(8, CLASSES), Readout(7, CLASSES)])
    first, last = drawn(readouts, seed=3, scale=0.5)
    a, b, c, d, e = lif_network()
    return nn.Sequential(a, b, first, c, d, last, e)


def contract_rules() -> list[OPZO]:
    return [
        OPZO(),
        OPZO(local_readouts=True, intermediate=(1,), distribution="rademacher"),
        OPZO("random"),
        OPZO("single_point", inject="membrane", antithetic=False),
    ]


def quiet_rules() -> list[OPZO]:
    return [
        OPZO(**IMPERCEPTIBLE),
        OPZO(local_readouts=True, intermediate=(1,), distribution="rademacher", **IMPERCEPTIBLE),
        OPZO("random"),
        OPZO("single_point", antithetic=False, **IMPERCEPTIBLE),
    ]


def test_discovered_network_is_the_plain_one():
    x_TBC, _ = batch(3)
    assert torch.equal(outputs(smallest_model(), x_TBC), outputs(lif_network(), x_TBC))


def with_matrices(
    rule: OPZO, model: nn.Module, *, columns: tuple[int, ...] = (CLASSES, CLASSES), **attach
) -> list[Tensor]:
    """Attach, and give the layers matrices that have learnt something: as those of a checkpoint."""
    rule.attach(model, **attach)
    generator = torch.Generator().manual_seed(5)
    matrices = [
        torch.randn(units, outputs, generator=generator, dtype=torch.float64)
        for units, outputs in zip((8, 7), columns, strict=True)
    ]
    state = {f"signals.matrix_{layer}": matrix for layer, matrix in enumerate(matrices)}
    if rule.feedback == "momentum":
        state["signals.updates"] = torch.tensor([10])
        matrices = [matrix / (1 - 0.999**10) for matrix in matrices]
    rule.load_state_dict(state)
    return matrices


def gradient_of(rule: OPZO, model: nn.Module, steps: int, *, rows=slice(None)) -> dict[str, Tensor]:
    x_TBC, target_B = batch(steps)
    loss_fn, about = cross_entropy(target_B[rows]), None if rows == slice(None) else rows
    model.zero_grad()
    learn(rule.loss_terms(model, x_TBC[:, rows], loss_fn, step=0, rows=about))
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
    }


def by_hand(
    model: nn.Module,
    matrices: list[Tensor] | None,
    x_TBC: Tensor,
    target_B: Tensor,
    *,
    inject: str,
    antithetic: bool,
    seed: int,
) -> dict[str, Tensor]:
    """Psi times signal times trace, in loops over time and layers, without autograd.

    `matrices`: None for signals of single points.
    """
    weights = [module for module in model.modules() if isinstance(module, Linear)]
    decay, alpha, size = 0.5, 0.2, x_TBC.shape[1]
    lif = next(module for module in model.modules() if isinstance(module, LIF))
    gain = 1 - decay if lif.scale_input else 1
    v = [torch.zeros(size, units, dtype=torch.float64) for units in (8, 7)]
    trace: list[Tensor | float] = [0.0, 0.0, 0.0]
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t, x_BC in enumerate(x_TBC):
        factors, slopes, noises = [], [], []
        drawn, sign = (t // 2 * 2, (-1) ** t) if antithetic else (t, 1)
        for layer in range(2):
            hashes = [counter_hash(seed, 0, row, layer, drawn) for row in range(size)]
            keys = torch.tensor(list(map(signed, hashes)))
            z = sign * noise(keys, v[layer].shape[1], distribution="gaussian").double()
            n = alpha * z
            noises.append(z)
            trace[layer] = (
                x_BC if layer == 0 else decay * trace[layer] + x_BC
            )  # the first synapse has none
            factors.append(trace[layer])
            current = x_BC @ weights[layer].weight.T + weights[layer].bias
            u = decay * v[layer] + gain * current
            decided = u + n if inject == "membrane" else u
            s = (decided >= 1).double()
            slopes.append(gain * (1 - (decided - 1).abs()).clamp_min(0))
            v[layer] = u - s if lif.reset == "subtract" else u * (1 - s)
            x_BC = s + n if inject == "spikes" else s
        trace[2] = decay * trace[2] + x_BC
        factors.append(trace[2])
        o_BK = x_BC @ weights[2].weight.T + weights[2].bias
        e_BK = (torch.softmax(o_BK, 1) - F.one_hot(target_B, CLASSES)) / size / len(x_TBC)
        if matrices is None:
            signals = [z * (o_BK * e_BK).sum(1, keepdim=True) / alpha for z in noises]
        else:
            signals = [e_BK @ matrix.T for matrix in matrices]
        errors = [slope * g for slope, g in zip(slopes, signals, strict=True)] + [e_BK]
        for name, factor, g in zip(("0", "2", "4"), factors, errors, strict=True):
            found[f"{name}.weight"] += g.T @ factor
            found[f"{name}.bias"] += g.sum(0)
    return found


@pytest.mark.parametrize("neuron", [{}, {"reset": "zero"}, {"scale_input": True}])
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("inject", ["spikes", "membrane"])
@pytest.mark.parametrize("feedback", ["momentum", "random", "single_point"])
def test_the_update_is_the_product_of_three_local_factors(feedback, inject, antithetic, neuron):
    """Noise of either sign, which decides on a spike and is not carried on."""
    noisy = {"inject": inject, "antithetic": antithetic}
    model, rule = lif_network(**neuron), OPZO(feedback, noise=0.2, **noisy)
    matrices = with_matrices(rule, model, world=World(seed=11))
    got = gradient_of(rule, model, 4)
    learnt = None if feedback == "single_point" else matrices
    expected = by_hand(model, learnt, *batch(4), **noisy, seed=11)
    assert min(g.abs().max() for g in expected.values()) > 1e-3
    assert difference(got, expected) < 1e-13


def test_the_first_batch_teaches_the_matrices_and_the_readout_alone():
    rule, model = attached(OPZO())
    learnt = []
    for _ in range(2):
        found = gradient_of(rule, model, 3)
        learnt.append([name for name, g in found.items() if g.any() and "weight" in name])
        rule.end_of_batch()
    assert learnt == [["4.weight"], ["0.weight", "2.weight", "4.weight"]]
    assert int(rule.signals.get_buffer("updates")) == 2


def test_local_readouts_add_the_gradient_of_their_own_loss():
    """T = 1, no signal from above: each layer and its readout by autograd through that layer
    alone.
    """
    model, rule = smallest_model(), OPZO("random", local_readouts=True)
    with_matrices(rule, model)
    for layer in range(2):
        rule.signals.get_buffer(f"matrix_{layer}").zero_()
    got, (x_TBC, target_B) = gradient_of(rule, model, 1), batch(1)
    rule.release()
    h_TBN, losses = x_TBC, []
    for first in (0, 3):
        synapse, neuron, readout = model[first : first + 3]  # type: ignore[misc]
        h_TBN = outputs(nn.Sequential(synapse, neuron), h_TBN.detach(), grad=True)
        losses.append(F.cross_entropy(F.linear(h_TBN[0], *readout.parameters()), target_B))
    losses.append(F.cross_entropy(model[6](h_TBN.detach())[0], target_B))
    expected = reference_gradient(torch.stack(losses).sum(), model)
    assert min(g.abs().max() for g in expected.values()) > 1e-3
    assert difference(got, expected) < 1e-15


def test_intermediate_readouts_send_their_errors_to_the_layers_below():
    """The signal of layer 0 is M of twice the columns times both errors; the columns of the readout
    add to the gradient.
    """
    model = smallest_model()

    def first_weight(rule: OPZO, chosen: slice, kept: slice, columns: tuple[int, int]) -> Tensor:
        matrix = with_matrices(rule, model, columns=columns)[0]
        masked = torch.zeros_like(matrix)
        masked[:, chosen] = matrix[:, chosen]
        rule.signals.get_buffer("matrix_0").copy_(masked[:, kept])
        found = gradient_of(rule, model, 3)["0.weight"]
        rule.release()
        return found

    of_readout, of_output, all_ = slice(0, 3), slice(3, 6), slice(0, 6)
    readout, output, both = (
        first_weight(OPZO("random", intermediate=(1,)), chosen, all_, (6, 3))
        for chosen in (of_readout, of_output, all_)
    )
    assert torch.allclose(readout + output, both, atol=1e-15)
    assert readout.abs().max() > 1e-3 and output.abs().max() > 1e-3


def test_noise_and_gradients_know_neither_ranks_nor_micro_batches():
    """That the matrices do not either is tested in tests/spiking/test_error_feedback.py."""

    def run(rows: list[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
        model, rule = lif_network(), OPZO(momentum=0.0)
        with_matrices(rule, model, world=World(seed=4))
        record = spikes_of(model)
        got = gradient_of(rule, model, 3, rows=rows)
        return got, [torch.cat(spikes) for spikes in record.values()]

    whole, out = run([0, 1, 2, 3, 4])
    total = dict.fromkeys(whole, 0)
    for rows in ([0, 3], [4, 1, 2]):
        got, part_out = run(rows)
        assert all(map(torch.equal, part_out, [each[:, rows] for each in out]))
        total = {name: total[name] + g * len(rows) / 5 for name, g in got.items()}
    assert difference(total, whole) < 1e-15


def test_matrices_stay_in_fp32_under_bf16():
    """An average that moves by a thousandth stands still in bf16."""
    rule, model = attached(OPZO(local_readouts=True), smallest_model().float())
    backend = Plain(
        model, lambda network: torch.optim.SGD(network.parameters(), lr=0.1), precision="bf16"
    )
    x_TBC, target_B = batch(3)
    for _ in range(2):
        for objective in rule.loss_terms(backend.model, x_TBC.float(), CrossEntropy()(target_B)):
            backend.backward(objective.backward, 1.0)
        rule.end_of_batch()
        backend.step()
    matrix = rule.signals.get_buffer("matrix_0")
    assert matrix.dtype == torch.float32 and not torch.equal(matrix, matrix.bfloat16().float())


def test_an_evaluation_sees_no_noise():
    model, (x_TBC, _) = lif_network(), batch(3)
    before = outputs(model, x_TBC)
    rule, _ = attached(OPZO(), model)
    gradient_of(rule, model, 3)
    assert all(torch.equal(outputs(m, x_TBC), before) for m in (model, copy.deepcopy(model)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("rule", "batches", "least", "most"),
    [
        pytest.param(OPZO(antithetic=False), 6000, 0.95, 1.0, marks=pytest.mark.full),
        (OPZO(), 1000, 0.95, 1.0),
        (OPZO(momentum=0.0, antithetic=False), 1, -0.3, 0.3),
        (OPZO("random"), 1, -0.2, 0.2),
    ],
    ids=["momentum", "antithetic", "none", "random"],
)
def test_the_matrix_behind_the_last_hidden_layer_is_that_of_the_readout(
    rule: OPZO, batches: int, least: float, most: float
):
    """100 hidden units, noise 0.2, batches of 32: the true Jacobian of the last layer is
    W_out^T.
    """
    generator = torch.Generator().manual_seed(1)
    model = nn.Sequential(
        Linear(20, 100), LIF(), Linear(100, 100), LIF(), readout := Linear(100, 5)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5
            )
    rule.attach(model)
    for step in range(batches):
        x_TBC = torch.randn(2 if rule.antithetic else 1, 32, 20, generator=generator)
        target_B = torch.randint(5, (32,), generator=generator)
        for _ in rule.loss_terms(model, x_TBC, cross_entropy(target_B), step=step):
            pass
        rule.end_of_batch()
    matrix = rule.signals.get_buffer("matrix_1")
    found = float(F.cosine_similarity(matrix.flatten(), readout.weight.detach().T.flatten(), dim=0))
    rule.release()
    assert least <= found <= most


@pytest.mark.parametrize("protected", [False, True])
def test_a_task_with_a_head_of_its_own_begins_its_matrices_anew(protected):
    """The second head is the first with its sign turned: what was known is then known to be
    wrong.
    """
    model: Any = multi_head(mlp(CLASSES, in_features=FEATURES, hidden=(8, 7)), heads=2)
    first, second = model.classifier.heads
    second.weight.data.copy_(-first.weight)
    opzo = OPZO()
    rule = HLOP(opzo, rows=((2, 2), (1, 1)), skip=("classifier",)) if protected else opzo
    rule.attach(model)
    x_TBC, target_B = batch(2, size=32)
    for task, batches in enumerate((30, 10)):
        select_head(model, task)
        rule.start_task(model, task)
        for _ in range(batches):
            learn(rule.loss_terms(model, x_TBC.float(), cross_entropy(target_B)))
            rule.end_of_batch()
        found, head = opzo.signals.get_buffer("matrix_1"), model.classifier.heads[task].weight
        assert F.cosine_similarity(found.flatten(), head.detach().T.flatten(), dim=0) > 0.7
    assert int(opzo.signals.get_buffer("updates")) == 10


@pytest.mark.parametrize(
    ("feedback", "matrices", "learnt"),
    [("momentum", (8 + 7) * 3 * 8, 2), ("random", (8 + 7) * 3 * 8, 1), ("single_point", 0, 1)],
)
def test_its_own_bytes_are_the_matrices_and_what_is_noted_of_a_batch(feedback, matrices, learnt):
    """Of 8 and 7 neurons with 3 outputs, in fp64. What is learnt has as many sums, and counts its
    moves; a batch that ends frees none.
    """
    rule, model = OPZO(feedback), lif_network()
    one_batch(rule, model, 4)
    own = learnt * matrices + 8 * (learnt == 2)
    for _ in range(2):
        assert rule.bytes() == own
        rule.end_of_batch()


def test_labels():
    rules = [*contract_rules(), OPZO(local_readouts=True), OPZO("random", intermediate=(1, 2))]
    assert [rule.label for rule in rules] == [
        "OPZO",
        "OPZO-LL-IGL",
        "OPZO-DFA",
        "OPZO-ZO",
        "OPZO-LL",
        "OPZO-DFA-IGL",
    ]


def run(model: nn.Module, x_TB: Tensor) -> None:
    rule, _ = attached(OPZO(), model)
    target_B = torch.zeros(x_TB.shape[1], dtype=torch.int64)
    learn(rule.loss_terms(model, x_TB, cross_entropy(target_B)))


def swapped() -> nn.Module:
    """Registers the synapse of its second layer first."""
    return Network(
        lambda m, x: m.third(m.two(m.second(m.one(m.first(x))))),
        second=Linear(8, 7),
        first=Linear(FEATURES, 8),
        third=Linear(7, CLASSES),
        one=LIF(),
        two=LIF(),
    )


test_refuses = refusals(
    [
        (
            lambda: run(
                nn.Sequential(
                    Linear(FEATURES, 8), lif := LIF(), Linear(8, 8), lif, Linear(8, CLASSES)
                ),
                torch.ones(2, 4, FEATURES),
            ),
            r"OPZO: a layer must run once in a time step, .* got 1 twice",
        ),
        (
            lambda: OPZO("learnt"),
            r"OPZO: feedback must be 'momentum', 'random' or 'single_point'; got feedback='learnt'",
        ),  # type: ignore[arg-type]
        (
            lambda: OPZO(noise=0),
            (
                r"OPZO: noise must be finite and > 0 \(>= 0 with feedback='random'\); got noise=0,"
                r" feedback='momentum'"
            ),
        ),
        (
            lambda: OPZO("random", noise=-1),
            r"OPZO: noise must be .* got noise=-1, feedback='random'",
        ),
        (
            lambda: OPZO("random", momentum=0.3),
            r"OPZO: momentum has no effect with feedback='random' and noise=0.0; got momentum=0.3",
        ),
        (
            lambda: OPZO("single_point", momentum=0.9),
            r"OPZO: momentum has no effect with feedback='single_point'",
        ),
        (
            lambda: OPZO("random", inject="membrane"),
            r"OPZO: inject has no effect with .* got inject='membrane'",
        ),
        (
            lambda: OPZO("random", antithetic=False),
            r"OPZO: antithetic has no effect with .* got antithetic=False",
        ),
        (
            lambda: OPZO(momentum=1),
            r"OPZO: momentum must be at least 0 and below 1; got momentum=1",
        ),
        (
            lambda: OPZO(intermediate=(0, 1)),
            (
                r"OPZO: intermediate must be increasing indices >= 1 .*, because .* got"
                r" intermediate=\(0, 1\)"
            ),
        ),
        (
            lambda: OPZO(intermediate="12"),
            (
                r"OPZO: intermediate must be increasing indices >= 1 of hidden layers, .* got"
                r" intermediate='12'"
            ),
        ),  # type: ignore[arg-type]
        (
            lambda: OPZO(intermediate=1),
            (
                r"OPZO: intermediate must be increasing indices >= 1 of hidden layers, .* got"
                r" intermediate=1"
            ),
        ),  # type: ignore[arg-type]
        (
            lambda: OPZO(intermediate=(True, 2)),
            r"OPZO: intermediate must be increasing indices .* got intermediate=\(True, 2\)",
        ),
        (
            lambda: OPZO(antithetic=True).check_steps(1),
            (
                r"OPZO: antithetic pairs need two time steps, so T must be >= 2; got"
                r" antithetic=True, T=1"
            ),
        ),
        (lambda: OPZO(noise=math.nan), r"OPZO: noise must be finite and > 0 .* got noise=nan"),
        (
            lambda: OPZO(intermediate=(1, 0)),
            (
                r"OPZO: intermediate must be increasing indices >= 1 of hidden layers, .* got"
                r" intermediate=\(1, 0\)"
            ),
        ),
        (
            lambda: OPZO().attach(lif_network(), over_time="mean"),
            r"OPZO: over_time must be 'steps', because the loss of the mean logits needs"
            r" all T steps",
        ),
        (
            lambda: OPZO().attach(nn.Sequential(Linear(2, 2))),
            r"OPZO: the model must have LIF neurons, .* got Sequential",
        ),
        (
            lambda: OPZO(decay=0.9).attach(lif_network()),
            r"OPZO: traces and all neurons must share one decay, here 0.9; got 0.5 at 1, 0.5 at 3",
        ),
        (
            lambda: OPZO().attach(nn.Sequential(*list(lif_network())[:3], LIF(0.25), Linear(7, 3))),
            r"OPZO: traces and all neurons must share one decay, here 0.5; got 0.25 at 3",
        ),
        (
            lambda: OPZO().attach(nn.Sequential(*lif_network(), BatchNorm(3))),
            r"OPZO: a trace cannot pass batch norm; .* got batch norm at 5",
        ),
        (
            lambda: OPZO().attach(nn.Sequential(nn.Linear(6, 8), LIF())),
            r"OPZO: linear layers and convolutions must be .* torch's Linear at 0",
        ),
        (
            lambda: OPZO(local_readouts=True).attach(lif_network()),
            r"OPZO-LL: .* got none at layer 0, 1 of 0\.\.1",
        ),
        (
            lambda: OPZO(intermediate=(1, 4)).attach(smallest_model()),
            r"OPZO-IGL: .* got none at layer 4 of 0\.\.1",
        ),
        (
            lambda: run(
                nf_resnet18_small(3, in_channels=1, width=4, blocks=(1, 1)),
                torch.randn(2, 2, 1, 8, 8),
            ),
            (
                r"OPZO: the model must not have skip connections .* got stem\..* with a path to"
                r" stages\.0\.0\.first\.neuron and to "
            ),
        ),
        (
            lambda: run(swapped(), torch.randn(2, 2, FEATURES)),
            r"OPZO: the first synapse .* got first before second",
        ),
    ]
)

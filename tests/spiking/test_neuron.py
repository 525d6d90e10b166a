import itertools
import operator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.opzo import OPZO
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.spiking.equilibrium import Equilibrium
from pipeline.spiking.neuron import IF, LIF, PLIF, fire, named_neurons
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import (
    ATan,
    FastSigmoid,
    Rectangle,
    Sigmoid,
    Surrogate,
    Triangle,
    spike,
)
from pipeline.spiking.synapse import Linear
from tests.helpers.rule_networks import (
    batch,
    difference,
    gradients_on,
    lif_network,
    outputs,
    refusals,
    saved_peak,
)
from tests.helpers.saved import SavedBytes

run = partial(outputs, grad=True)
VARIANTS = list(itertools.product(("subtract", "zero"), ("detached", "kept")))
FIRES = {">=": operator.ge, ">": operator.gt}


@settings(max_examples=60, deadline=None)
@given(
    currents=st.lists(
        st.floats(-2, 3, width=32) | st.integers(-2, 3).map(float), min_size=1, max_size=12
    ),
    decay=st.sampled_from([0.0, 1 / 11, 0.5, 0.9, 1.0]),
    threshold=st.sampled_from([0.3, 1.0, 2.0]),
    comparison=st.sampled_from([">=", ">"]),
    reset=st.sampled_from(["subtract", "zero"]),
    scale_input=st.booleans(),
)
def test_equations_against_a_loop_over_numbers(
    currents, decay, threshold, comparison, reset, scale_input
):
    scale_input = scale_input and decay < 1
    v, expected, closest = 0.0, [], 1.0
    for x in currents:
        u = decay * v + ((1 - decay) * x if scale_input else x)
        s = 1.0 if FIRES[comparison](u, threshold) else 0.0
        v = u - threshold * s if reset == "subtract" else u * (1 - s)
        expected.append(s)
        closest = min(closest, abs(u - threshold))
    if 0 < closest < 1e-12:
        return  # one rounding decides whether it spikes
    lif = LIF(
        decay, threshold=threshold, comparison=comparison, reset=reset, scale_input=scale_input
    )
    x_TB = torch.tensor(currents, dtype=torch.float64).reshape(-1, 1, 1)
    with fresh_state(lif):
        assert lif(x_TB).flatten().tolist() == expected
        assert lif.state.values["v"].item() == pytest.approx(v, abs=1e-12)


@pytest.mark.parametrize(("reset", "reset_gradient"), VARIANTS)
@pytest.mark.parametrize(("x1", "x2"), [(0.7, 0.6), (1.3, 0.9), (1.6, 0.4), (1.0, 0.6)])
@pytest.mark.parametrize("comparison", FIRES)
def test_gradient_through_one_carried_membrane(comparison, reset, reset_gradient, x1, x2):
    """dL/dx[1] of L = s[2], by hand: psi(u2 - th) decay dv1/du1, the last factor from the reset."""
    decay, threshold = 0.5, 1.0
    psi = lambda u: max(0.0, 1 - abs(u - threshold))
    s1 = float(FIRES[comparison](x1, threshold))
    v1, slope = {
        ("subtract", "detached"): (x1 - s1, 1.0),
        ("subtract", "kept"): (x1 - s1, 1 - threshold * psi(x1)),
        ("zero", "detached"): (x1 * (1 - s1), 1 - s1),
        ("zero", "kept"): (x1 * (1 - s1), 1 - s1 - x1 * psi(x1)),
    }[reset, reset_gradient]
    x_TB = torch.tensor([x1, x2], dtype=torch.float64).reshape(2, 1, 1).requires_grad_()
    about = {"threshold": threshold, "comparison": comparison, "reset": reset}
    s_TB = run(LIF(decay, reset_gradient=reset_gradient, **about), x_TB)
    (g,) = torch.autograd.grad(s_TB[1].sum(), x_TB)
    assert g.flatten().tolist() == pytest.approx(
        [psi(decay * v1 + x2) * decay * slope, psi(decay * v1 + x2)], abs=1e-15
    )


@pytest.mark.parametrize(("reset", "reset_gradient"), VARIANTS)
@pytest.mark.parametrize("scale_input", [False, True])
def test_slices_continue_one_another(reset, reset_gradient, scale_input):
    lif = LIF(0.7, reset=reset, reset_gradient=reset_gradient, scale_input=scale_input)
    x_TB = (3 * torch.randn(6, 2, 4, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(6, 2, 4, dtype=torch.float64)
    whole, sliced = run(lif, x_TB), run(lif, *x_TB.split([1, 3, 2]))
    assert torch.equal(whole, sliced) and 0 < whole.mean() < 1
    assert torch.equal(
        *(torch.autograd.grad((s * weights).sum(), x_TB)[0] for s in (whole, sliced))
    )


def test_carry_stands_between_all_steps():
    lif = LIF(0.5)
    lif.carry = torch.detach
    x_TB = torch.full((4, 1, 1), 0.6, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(run(lif, x_TB)[2].sum(), x_TB)
    assert (g.flatten() != 0).tolist() == [False, False, True, False]
    halves = []
    lif.carry = lambda v: halves.append(v) or v / 2
    with fresh_state(lif):
        lif(x_TB[:3])
        lif(x_TB[3:])
        assert lif.state.values["v"].item() == halves[-1].item() / 2
    assert [round(v.item(), 6) for v in halves] == [0.6, 0.75, 0.7875, 0.796875]


@pytest.mark.parametrize(
    "given_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_membrane_is_never_below_fp32(given_dtype):
    lif = LIF(0.5)
    with fresh_state(lif):
        s_TB = lif(torch.randn(3, 2, 4, dtype=given_dtype))
        assert lif.state.values["v"].dtype == (
            torch.float64 if given_dtype == torch.float64 else torch.float32
        )
    assert s_TB.dtype == given_dtype


def test_under_autocast_the_membrane_integrates_what_bf16_would_lose():
    lif, synapse = LIF(1.0), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(synapse.weight, 2**-10)
    with torch.autocast("cpu", torch.bfloat16), fresh_state(lif):
        current = synapse(torch.ones(520, 1, 1))
        assert current.dtype == torch.bfloat16
        s_TB = lif(current)
        # In bf16, 0.5 + 2^-10 is 0.5.
        assert lif.state.values["v"].item() == 520 * 2**-10
    assert s_TB.dtype == torch.bfloat16


@pytest.mark.parametrize(("reset", "reset_gradient"), VARIANTS)
@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_what_is_kept_for_backward(reset, reset_gradient, kernel):
    steps, numbers = 5, 2 * 8
    lif = LIF(reset=reset, reset_gradient=reset_gradient, kernel=kernel)
    x_TB = torch.randn(steps, 2, 8, dtype=torch.float64, requires_grad=True)
    with SavedBytes() as saved, fresh_state(lif):
        s_TB = lif(x_TB)
    both = (reset, reset_gradient, kernel) == ("zero", "kept", "eager")
    assert saved.peak == steps * numbers * 8 * (2 if both else 1)
    s_TB.sum().backward()


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("comparison", FIRES)
def test_whole_numbers_reach_the_threshold_and_pass_it(comparison, reset, dtype, kernel):
    """As the currents of 1-bit weights do."""
    x_TB, v_B = torch.randint(-2, 4, (20, 50)), torch.zeros(50, dtype=torch.int64)
    spikes, reached = [], 0
    for x_B in x_TB:
        u_B = v_B + x_B
        s_B = FIRES[comparison](u_B, 3)
        v_B = torch.where(s_B, u_B - 3 if reset == "subtract" else 0, u_B)
        spikes.append(s_B)
        reached += int((u_B == 3).sum())
    neuron = IF(threshold=3.0, comparison=comparison, reset=reset, kernel=kernel)
    s_TB = run(neuron, *x_TB.to(dtype).split([1, 6, 13]))
    assert torch.equal(s_TB, torch.stack(spikes).to(dtype)) and reached > 50


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.7, 1.0, 3e-5, 1e6])
def test_the_next_number_passes_the_threshold(threshold, dtype, kernel):
    """The threshold is a number of the membrane's dtype, as the current is."""
    at = torch.tensor(threshold, dtype=dtype)
    x_TB = torch.stack([at.nextafter(at * 0), at, at.nextafter(at * 2)]).unsqueeze(0)
    for comparison, expected in ((">=", [0, 1, 1]), (">", [0, 0, 1])):
        neuron = LIF(threshold=threshold, comparison=comparison, kernel=kernel)
        assert run(neuron, x_TB).tolist() == [expected]


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_the_comparison_moves_no_surrogate(kernel):
    """A window of 0.5 to both sides of the threshold contains its two ends."""
    x_TB = torch.arange(-2, 4, 0.25).view(1, 1, -1).requires_grad_()
    for comparison in FIRES:
        neuron = LIF(comparison=comparison, surrogate=Rectangle(1.0), kernel=kernel)
        (g_TB,) = torch.autograd.grad(run(neuron, x_TB).sum(), x_TB)
        assert x_TB[g_TB == 1].tolist() == [0.5, 0.75, 1.0, 1.25, 1.5]


SURROGATE = "^LIF: surrogate must have a method derivative, and must not be a torch module"


test_refuses = refusals(
    [
        (lambda: LIF(1.5), r"LIF: decay must be in 0\.\.1; got decay=1\.5"),
        (lambda: LIF(-0.1), r"LIF: decay must be in 0\.\.1; got decay=-0\.1"),
        (lambda: LIF(threshold=0), r"LIF: threshold must be > 0; got threshold=0"),
        (
            lambda: IF(comparison="<"),
            r"LIF: comparison must be '>=' or '>'; got comparison='<'",
        ),
        (
            lambda: LIF(reset="hard"),
            r"LIF: reset must be 'subtract' or 'zero'; got reset='hard'",
        ),
        (
            lambda: LIF(reset_gradient="yes"),
            r"LIF: reset_gradient must be 'detached' or 'kept'; got reset_gradient='yes'",
        ),
        (
            lambda: LIF(1.0, scale_input=True),
            r"LIF: scale_input .* decay must be < 1; got decay=1",
        ),
        (
            lambda: IF(subtract=2.0, reset="zero"),
            r"LIF: subtract must be > 0 and needs reset='subtract'; got subtract=2.0, reset='zero'",
        ),
        (lambda: LIF()(torch.zeros(1, 1, 1)), r"LIF: .* only inside fresh_state"),
        (
            lambda: run(LIF(), torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)),
            r"all time steps must have the same shape; got \(3, 4\) after \(2, 4\)",
        ),
        (lambda: LIF(surrogate=torch.nn.Sigmoid()), rf"{SURROGATE}; got Sigmoid\(\)$"),
        (lambda: LIF(surrogate=torch.sigmoid), rf"{SURROGATE}; got <built-in method sigmoid .*$"),
    ]
)


def test_subtract_is_what_a_spike_takes():
    """The symmetric reset: 2 thresholds, so that the membrane stays centred; a constant current
    fires at half the rate.
    """
    spikes = run(IF(threshold=1.0, subtract=2.0), torch.full((1000, 1, 1), 0.5).double())
    assert abs(spikes.mean().item() - 0.25) <= 1 / 1000


def test_a_neuron_is_found_and_says_which_it_is():
    assert [name for name, _ in named_neurons(lif_network())] == ["1", "3"]
    assert "decay=0.25" in repr(LIF(0.25)) and repr(Triangle()) in repr(LIF())
    assert all("comparison='>'" in repr(cls(comparison=">")) for cls in (LIF, PLIF, IF))


# -------------------------------------------------------------------------------------------- fire


THRESHOLD = 0.7


def expressions(
    u_B: Tensor, *, subtract: float | None, has_reset_gradient: bool, surrogate: Surrogate
) -> tuple[Tensor, Tensor]:
    s_B = spike(u_B - THRESHOLD, surrogate=surrogate)
    s_reset_B = s_B if has_reset_gradient else s_B.detach()
    return s_B, (
        u_B * (1 - s_reset_B) if subtract is None else torch.sub(u_B, s_reset_B, alpha=subtract)
    )


@pytest.mark.parametrize(
    "surrogate", [Triangle(), Triangle(2.0), Sigmoid(), Rectangle(), ATan(), FastSigmoid()]
)
@pytest.mark.parametrize("subtract", [None, THRESHOLD, 1.3])
@pytest.mark.parametrize("has_reset_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_of_either_output_and_both(
    surrogate, subtract, has_reset_gradient, dtype
):
    x_B = torch.randn(64, dtype=dtype).add_(THRESHOLD)
    x_B[:2] = torch.tensor([THRESHOLD, 0.0], dtype=dtype)
    x_B.requires_grad_()
    g_s, g_v = torch.randn(2, 64, dtype=dtype)
    about = {"subtract": subtract, "has_reset_gradient": has_reset_gradient, "surrogate": surrogate}
    for asked in ((0,), (1,), (0, 1)):
        found = []
        for pair in (fire(x_B * 1, threshold=THRESHOLD, **about), expressions(x_B * 1, **about)):
            wanted, gradients = ([each[index] for index in asked] for each in (pair, (g_s, g_v)))
            found.append((*pair, *torch.autograd.grad(wanted, x_B, gradients)))
        assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
        s_B = found[0][0]
    assert 0 < s_B.mean() < 1


@pytest.mark.parametrize("subtract", [1.0, None])
def test_the_membrane_takes_the_place_of_what_was_given_away(subtract):
    u_B = torch.randn(8)
    _, v_B = fire(
        u_B, threshold=1.0, subtract=subtract, has_reset_gradient=False, surrogate=Triangle()
    )
    assert v_B.data_ptr() == u_B.data_ptr()


def test_a_second_derivative_is_refused():
    x_B = torch.randn(8, requires_grad=True)
    s_B, _ = fire(
        x_B * 1, threshold=0.1, subtract=1.0, has_reset_gradient=False, surrogate=Sigmoid()
    )
    with pytest.raises(
        RuntimeError, match=r"^fire: a spike has no second derivative; create_graph must be False$"
    ):
        torch.autograd.grad(s_B.sum(), x_B, create_graph=True)


# -------------------------------------------------------------------------------------------- plif


def learnt(**neuron) -> nn.Sequential:
    model = lif_network(**neuron)
    model[1], model[3] = PLIF(0.6, **neuron).double(), PLIF(0.8, **neuron).double()
    return model


def by_hand(
    currents: list[float],
    weights: list[float],
    decay: float,
    *,
    scale_input: bool,
    through_time: bool,
) -> float:
    """dL/dw of one neuron and L = sum_t weights[t] s[t], with a detached reset by subtraction and
    the triangle.
    """
    v, dv, found = 0.0, 0.0, 0.0
    for x, weight in zip(currents, weights, strict=True):
        u = decay * v + ((1 - decay) * x if scale_input else x)
        du = (v - x if scale_input else v) + (decay * dv if through_time else 0.0)
        found += weight * max(0.0, 1 - abs(u - 1)) * du
        v, dv = u - (u >= 1), du
    return found * decay * (1 - decay)


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("decay", [0.2, 0.5, 0.9])
def test_the_gradient_of_the_leak_with_and_without_what_comes_through_time(
    decay: float, scale_input: bool
) -> None:
    x_TB, weights_TB = torch.randn(2, 7, 4).double()
    x_TB = 1.5 * x_TB + (1 if scale_input else 0.3)
    alone, found = list(zip(x_TB.T.tolist(), weights_TB.T.tolist(), strict=True)), []
    for through_time in (True, False):
        neuron = PLIF(decay, scale_input=scale_input).double()
        if not through_time:
            neuron.carry = torch.detach
        (outputs(neuron, x_TB, grad=True) * weights_TB).sum().backward()
        about = {"scale_input": scale_input, "through_time": through_time}
        exact = neuron.decay_logit.sigmoid().item()
        found.append(neuron.decay_logit.grad.item())  # type: ignore[union-attr]
        expected = sum(by_hand(currents, weights, exact, **about) for currents, weights in alone)
        assert found[-1] == pytest.approx(expected, abs=1e-14)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize(
    "neuron",
    [{}, {"scale_input": True}, {"reset": "zero"}, {"subtract": 1.3}, {"reset_gradient": "kept"}],
)
def test_it_fires_and_hands_down_as_the_lif_of_its_leak(neuron: dict) -> None:
    x_TB = 2 * torch.randn(6, 5, 4, dtype=torch.float64)
    found = []
    for lif in (LIF(0.5, **neuron), PLIF(0.5, **neuron).double()):
        leaf_TB = x_TB.clone().requires_grad_()
        s_TB = outputs(lif, leaf_TB, grad=True)
        found.append((s_TB, *torch.autograd.grad((s_TB * x_TB).sum(), leaf_TB)))
    (plain, g_plain), (parametric, g_parametric) = found
    assert torch.equal(plain, parametric) and 0.05 < plain.mean() < 0.5
    assert torch.allclose(g_plain, g_parametric, atol=1e-13) and g_plain.any()


def test_rules_agree_on_it_as_on_any_weight() -> None:
    rules = (
        BPTT(),
        BPTT(chunk=2),
        BPTT(recompute=True),
        SLTT(),
        BPTT(truncate=1),
        HLOP(SLTT(), rows=((3, 4, 3), (1, 1, 1))),
    )
    bptt, chunked, recomputed, sltt, truncated, hlop = gradients_on(6, learnt(), *rules)
    assert max(difference(bptt, chunked), difference(bptt, recomputed)) < 1e-13
    assert max(difference(sltt, truncated), difference(sltt, hlop)) < 1e-13
    for name in ("1.decay_logit", "3.decay_logit"):
        one, other = bptt[name], sltt[name]
        assert min(one.abs(), other.abs(), (one - other).abs()) > 1e-4


def test_under_sltt_it_costs_one_membrane_whatever_t() -> None:
    few, many = (saved_peak(SLTT(), learnt(), *batch(steps)) for steps in (3, 12))
    assert few == many <= saved_peak(SLTT(), lif_network(), *batch(3)) + 5 * (8 + 7) * 8 + 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (
                lambda rule=rule: rule.attach(learnt()),
                r": the decay of neurons must be a constant, .* got the learnt decay of PLIF at"
                r" 1, 3",
            )
            for rule in (
                OTTT(),
                OPZO(),
                HLOP(BPTT(), rows=((3, 4, 3), (1, 1, 1)), learn_from="rates"),
            )
        ],
        (
            lambda: DSR().attach(learnt(), over_time="mean"),
            "DSR: every neuron must be a RateIF or RateLIF; got PLIF at 1",
        ),
        (
            lambda: Equilibrium(
                inject=Linear(6, 4), feedback=Linear(4, 4, bias=False), neurons=[PLIF()]
            ),
            "Equilibrium: the neurons must be LIF or IF, because their rate has a formula;"
            " got PLIF",
        ),
        *[
            (
                lambda decay=decay: PLIF(decay),
                rf"PLIF: decay must be > 0 and < 1, .*; got decay={decay}",
            )
            for decay in (0.0, 1.0)
        ],
    ],
)
def test_plif_refuses(call, message) -> None:
    """Rules and neurons that take the decay for a constant, and decays that no weight gives."""
    with pytest.raises(ValueError, match=message):
        call()


def test_it_says_what_it_has_learnt() -> None:
    neuron = PLIF(0.9, threshold=0.5)
    assert repr(neuron).startswith("PLIF(decay=0.9, threshold=0.5, ")
    assert list(neuron.state_dict()) == ["decay_logit"] and neuron.decay_logit.shape == (1,)

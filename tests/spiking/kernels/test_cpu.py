"""The numba kernels of neurons against eager torch, and what stands around them."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

from pipeline.core import saved_loops
from pipeline.spiking.encode import repeat
from pipeline.spiking.kernels import cpu, operators, packing
from pipeline.spiking.kernels.scaled_add import scaled_add
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.surrogate import ATan
from tests.helpers.kernel_cases import ORDERS, assert_eagers, cases, distance, ran

CASES = list(cases())
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def test_there_are_enough_cases():
    assert len(CASES) * len(BOUNDS) > 1500


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("neuron", ["LIF", "IF", "PLIF"])
def test_spikes_have_the_same_bits_and_gradients_their_rounding(neuron, dtype):
    torch.manual_seed(0)
    for case in CASES:
        if case.neuron == neuron:
            x_TB = torch.randn(case.steps, 3, 701) * 1.5 + 0.5
            x_TB[..., :300] = (x_TB[..., :300] * 4).round() / 4  # some are the threshold
            x_TB = x_TB.to(dtype)
            g_TB = torch.randn(case.steps, 3, 701).to(dtype)
            assert_eagers(case, x_TB, g_TB, BOUNDS[dtype])


def test_where_no_folder_can_be_written_each_process_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """numba itself would refuse to compile them, for a user without a home."""
    assert Path(cpu._forward.stats.cache_path).is_dir()
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(saved_loops.numba_config, "CACHE_DIR", "")
    again = runpy.run_path(cpu.__file__)
    assert again["_forward"].stats.cache_path is None


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_memory_is_taken_and_channels_stay_last(order: str):
    torch.manual_seed(1)
    x_TB = ORDERS[order]()
    s_TB, g_TB = ran(x_TB)
    expected = ran(x_TB.contiguous(), "eager")
    assert torch.equal(s_TB, expected[0]) and torch.allclose(g_TB, expected[1], rtol=0, atol=1e-6)
    if "channels last" in order:
        assert s_TB[0].is_contiguous(memory_format=torch.channels_last)


def test_threads_share_the_blocks_and_change_no_bit():
    x_TB, threads = torch.randn(4, 3, 50_001) * 2, torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ran(x_TB)
        torch.set_num_threads(3)
        with ThreadPoolExecutor(2) as others:
            for each in (ran(x_TB), *others.map(ran, [x_TB] * 4)):
                assert all(map(torch.equal, each, alone))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [RateIF, RateLIF])
def test_rate_neurons_have_eagers_bits(build, dtype):
    outputs, membranes = [], []
    for kernel in ("auto", "eager"):
        neuron = build(kernel=kernel)
        torch.manual_seed(0)
        with fresh_state(neuron):
            x_TB = (torch.randn(6, 3, 2001) * neuron.threshold.detach() * 2 / neuron.gain).to(dtype)
            slices = [neuron.run_without_gradient(x_cB) for x_cB in x_TB.split([2, 4])]
            outputs.append(torch.cat(slices))
            membranes.append(neuron.state.values["v"])
    assert torch.equal(*outputs) and torch.equal(*membranes) and outputs[0].count_nonzero() > 500


class Steeper(ATan):
    """A user's surrogate."""

    def derivative(self, u_minus_threshold: Tensor) -> Tensor:
        return 2 * super().derivative(u_minus_threshold)


class Leaky(LIF):
    """A user's neuron."""

    def charge(self, x_B: Tensor, v_B: Tensor) -> Tensor:
        return x_B + v_B * 0.3


def halving() -> LIF:
    lif = LIF()
    lif.carry = lambda v_B: v_B / 2
    return lif


@pytest.mark.parametrize(
    "build", [lambda: LIF(surrogate=Steeper(2.0)), Leaky, halving, lambda: LIF(kernel="eager")]
)
def test_what_the_kernels_do_not_know_runs_in_torch(build, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "lif_forward", Mock(side_effect=AssertionError))
    assert ran(torch.randn(3, 4, 5) * 2, lif=build())[1].count_nonzero() > 0
    with pytest.raises(AssertionError):
        ran(torch.randn(3, 4, 5))


def test_without_numba_torch_runs(monkeypatch: pytest.MonkeyPatch):
    x_TB = torch.randn(3, 4, 5) * 2
    expected = ran(x_TB)
    monkeypatch.setattr(operators, "_is_installed", lambda package: False)
    monkeypatch.setattr(cpu, "lif_forward", Mock(side_effect=AssertionError))
    assert torch.equal(ran(x_TB)[0], expected[0])


# ------------------------------------------------------------------ norm, scaled sum, packed spikes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", ["contiguous", "channels last", "vectors"])
def test_a_norm_of_each_step_is_torchs(
    order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    x_NC = (torch.randn(12, 7, 5, 5) * 2 + 1).to(dtype)
    if order == "channels last":
        x_NC = x_NC.contiguous(memory_format=torch.channels_last)
    x_TBC = (x_NC[..., 0, 0].contiguous() if order == "vectors" else x_NC).unflatten(0, (3, 4))
    g_TBC = torch.randn(x_TBC.shape).to(dtype)
    found = []
    for _ in range(2):
        norm = BatchNorm(7).to(torch.float64 if dtype == torch.float64 else torch.float32)
        norm.weight.data = torch.linspace(0.5, 2, 7, dtype=norm.weight.dtype)
        y_TBC = norm(x := x_TBC.detach().requires_grad_())
        gradients = torch.autograd.grad(y_TBC, (x, norm.weight, norm.bias), g_TBC)
        found.append((y_TBC.detach(), norm.running_mean, norm.running_var, *gradients))
        monkeypatch.setattr(operators, "_is_installed", lambda package: False)
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert all(map(torch.equal, found[0][:3], found[1][:3])) or order == "channels last"


def test_one_value_per_channel_has_no_variance():
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNorm(3)(torch.randn(2, 1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_scaled_sum_is_torchs_and_has_the_dtype_of_the_stream(dtype: torch.dtype):
    torch.manual_seed(0)
    x, b, g = (torch.randn(3, 4, 5).to(dtype) for _ in range(3))
    gain = torch.tensor([0.3], requires_grad=True)
    x, b = x.requires_grad_(), b.requires_grad_()
    y = scaled_add(x, b, gain, 0.2)
    assert y.dtype == dtype
    g_x, g_b, g_gain = torch.autograd.grad(y, (x, b, gain), g)
    bound = 2**-7 if dtype == torch.bfloat16 else 1e-6
    assert distance(y, x.double() + 0.2 * gain.double() * b.double()) < bound
    assert torch.equal(g_x, g) and distance(g_b, 0.2 * gain.double() * g.double()) < bound
    assert abs(float(g_gain - 0.2 * (g.double() * b.double()).sum())) < 30 * bound


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_spikes_are_packed_into_a_bit_each(dtype: torch.dtype, kernels: bool):
    torch.manual_seed(0)
    with patch.object(operators, "_is_installed", lambda package: kernels):
        for count in (0, 1, 7, 8, 9, 8191, 100_003):
            x = (torch.rand(count) < 0.3).to(dtype) * 2.74
            bits = packing.pack(x)
            assert bits.nbytes == -(-count // 8)
            assert torch.equal(packing.unpack(bits, x.shape, x.stride(), dtype, 2.74), x)
        x = (torch.rand(6, 3, 4, 4) < 0.3).to(dtype).contiguous(memory_format=torch.channels_last)
        again = packing.unpack(packing.pack(x), x.shape, x.stride(), dtype, 1.0)
        assert torch.equal(again, x) and again.stride() == x.stride()


def test_the_gradient_of_a_repeated_frame_is_summed_in_the_kernel() -> None:
    torch.manual_seed(1)
    frame_B, g_TB = torch.randn(2, 3000), torch.randn(5, 2, 3000)
    found = []
    for kernel in ("auto", "eager"):
        lif, x_B = LIF(kernel=kernel), frame_B.clone().requires_grad_()
        with fresh_state(lif):
            s_TB = lif(repeat(x_B, 5), gain=2.0, beta=0.5)
        found.append((s_TB.detach(), *torch.autograd.grad(s_TB, x_B, g_TB)))
    (spikes, gradient), expected = found
    assert torch.equal(spikes, expected[0])
    assert torch.allclose(gradient, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reset", ["subtract", "zero"])
def test_steps_without_gradients_overwrite_a_membrane_that_no_backward_needs(reset: str) -> None:
    torch.manual_seed(0)
    x_TB = torch.randn(6, 40_000, requires_grad=True)
    found, addresses = [], []
    for kernel in ("auto", "eager"):
        lif = LIF(0.6, reset=reset, kernel=kernel)
        lif.carry = torch.detach
        slices = []
        with fresh_state(lif):
            for t, x_1B in enumerate(x_TB.split(1)):
                with torch.set_grad_enabled(t == 2):
                    slices.append(lif(x_1B))
                if kernel == "auto":
                    addresses.append(lif.state.values["v"].data_ptr())
            last_B = lif.last_membrane(x_TB[:1])
        (gradient,) = torch.autograd.grad(slices[2].sum(), x_TB)  # after the later steps
        found.append((torch.cat(slices).detach(), last_B, gradient))
    assert all(map(torch.equal, *(each[:2] for each in found)))
    assert distance(found[0][2], found[1][2]) < 1e-6
    assert addresses[0] == addresses[1] and addresses[3] == addresses[4] == addresses[5]
    assert addresses[2] not in (addresses[1], addresses[3])

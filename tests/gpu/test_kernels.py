"""The kernels on a device against eager torch on it, and against float64.

On a CPU the same tests run on a few cases, so that they are known to run.
"""

# T time, B batch, C channels

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.rules.sltt import SLTT
from pipeline.spiking.kernels import packing
from pipeline.spiking.kernels.operators import has_kernels
from pipeline.spiking.kernels.scaled_add import scaled_add
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import pack_spikes
from tests.helpers.cards import CUDA, device_of
from tests.helpers.kernel_cases import ORDERS, assert_eagers, cases, distance, ran
from tests.helpers.rule_networks import cross_entropy, gradients

# Of the largest gradient.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neuron", ["LIF", "IF", "PLIF"])
@pytest.mark.parametrize("numbers", ["eighths", "any"])
@pytest.mark.timeout(600)  # Triton compiles about two kernels for each case
def test_a_neurons_kernel_has_eagers_spikes_and_gradients(
    numbers: str, neuron: str, dtype: torch.dtype, device: str
) -> None:
    """On eighths no sum is rounded. On other numbers, kernels and eager must round alike."""
    on = device_of(device)
    torch.manual_seed(0)
    every = [case for case in cases() if case.neuron == neuron]
    for case in every[:: 5 if device == "cuda" else 40]:
        x_TB = torch.randn(case.steps, 3, 1701, device=on) * 1.5 + 0.5
        if numbers == "eighths":
            case = case._replace(beta=1.0 if case.beta == 1 else 2.0, decay=0.5)
            x_TB = (x_TB * 8).round() / 8
        g_TB = torch.randn(case.steps, 3, 1701, device=on).to(dtype)
        assert_eagers(case, x_TB.to(dtype), g_TB, BOUNDS[dtype])


@DEVICES
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_memory_gives_the_same(order: str, device: str) -> None:
    on = device_of(device)
    torch.manual_seed(1)
    x_TB = ORDERS[order]()
    # Copies of a static input on another device would not be static.
    x_TB = x_TB[:1].to(on).expand_as(x_TB) if "static" in order else x_TB.to(on)
    s_TB, g_TB = ran(x_TB)
    expected_s_TB, expected_g_TB = ran(x_TB.contiguous(), "eager")
    assert torch.equal(s_TB, expected_s_TB)
    assert torch.allclose(g_TB, expected_g_TB, rtol=0, atol=1e-6)
    if "channels last" in order:
        assert s_TB[0].is_contiguous(memory_format=torch.channels_last)


@DEVICES
@DTYPES
@pytest.mark.parametrize("build", [RateIF, RateLIF])
def test_rate_neurons_have_eagers_bits(build, dtype: torch.dtype, device: str) -> None:
    on = device_of(device)
    found = []
    for kernel in ("auto", "eager"):
        torch.manual_seed(0)
        neuron = build(kernel=kernel).to(on)
        scale = neuron.threshold.detach() * 2 / neuron.gain
        x_TB = (torch.randn(6, 3, 2001, device=on) * scale).to(dtype)
        with fresh_state(neuron):
            slices = [neuron.run_without_gradient(x_cB) for x_cB in x_TB.split([2, 4])]
            found.append((torch.cat(slices), neuron.state.values["v"]))
    assert all(map(torch.equal, *found)) and found[0][0].count_nonzero() > 500


@DEVICES
@DTYPES
def test_spikes_are_packed_and_unpacked_to_the_bit(dtype: torch.dtype, device: str) -> None:
    on = device_of(device)
    torch.manual_seed(0)
    for count in (0, 1, 7, 8, 9, 8191, 1_000_003):
        x = (torch.rand(count) < 0.3).to(dtype) * 2.74
        bits = packing.pack(x.to(on))
        assert torch.equal(bits.cpu(), packing.pack(x))
        unpacked = packing.unpack(bits, x.shape, x.stride(), dtype, 2.74)
        assert torch.equal(unpacked.cpu(), x)


@DEVICES
def test_packed_spikes_change_no_gradient(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on = device_of(device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    torch.manual_seed(0)
    network = nf_resnet18_small(classes=10, in_channels=3, width=8, blocks=(1, 1)).to(on)
    x_TB = torch.rand(4, 8, 3, 16, 16).to(on)
    loss_fn = cross_entropy(torch.arange(8, device=on))
    with torch.autocast(on.type, dtype=torch.bfloat16):
        kept = gradients(SLTT(), network, x_TB, loss_fn)
        pack_spikes(network)
        packed = gradients(SLTT(), network, x_TB, loss_fn)
    assert all(torch.equal(packed[name], kept[name]) for name in kept)


@DEVICES
@DTYPES
@pytest.mark.parametrize("is_static", [False, True])
def test_a_scaled_sum_is_that_of_float64(is_static: bool, dtype: torch.dtype, device: str) -> None:
    on = device_of(device)
    torch.manual_seed(0)
    x, b, g = (torch.randn(3, 4, 501, device=on).to(dtype) for _ in range(3))
    x = x[:1].expand_as(x) if is_static else x
    x, b = x.detach().requires_grad_(), b.requires_grad_()
    gain = torch.tensor([0.3], device=on, requires_grad=True)
    y = scaled_add(x, b, gain, 0.2)
    g_x, g_b, g_gain = torch.autograd.grad(y, (x, b, gain), g)
    bound = max(1e-6, torch.finfo(dtype).eps)
    assert y.dtype == dtype and torch.equal(g_x, g)
    assert distance(y.detach(), x.double() + 0.2 * gain.double() * b.double()) <= bound
    assert distance(g_b, 0.2 * gain.double() * g.double()) <= bound
    products = g.double() * b.detach().double()
    assert abs(float(g_gain - 0.2 * products.sum())) <= bound * float(products.abs().sum())


SHAPES = {
    "contiguous": lambda: torch.randn(12, 48, 7, 7),
    "channels last": lambda: torch.randn(12, 48, 7, 7).to(memory_format=torch.channels_last),
    "odd, channels last": lambda: torch.randn(12, 33, 5, 5).to(memory_format=torch.channels_last),
    "many rows": lambda: torch.randn(12, 4, 40, 40).to(memory_format=torch.channels_last),
    "vectors": lambda: torch.randn(12, 70),
}


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("is_same", [False, True])
def test_a_norm_of_each_step_is_that_of_float64(
    is_same: bool, shape: str, dtype: torch.dtype, device: str
) -> None:
    """`is_same`: the gradient of all steps is one tensor in memory."""
    on = device_of(device)
    torch.manual_seed(0)
    x_TBC = (SHAPES[shape]() * 2 + 30).to(on, dtype).unflatten(0, (3, 4))
    g_TBC = torch.empty_like(x_TBC).normal_()
    g_TBC = g_TBC[:1].expand_as(g_TBC) if is_same else g_TBC
    norm = BatchNorm(x_TBC.shape[2]).to(on)
    nn.init.uniform_(norm.weight, 0.5, 2)
    expected = _of_float64(norm, x_TBC, g_TBC)
    y_TBC = norm(x := x_TBC.detach().requires_grad_())
    found = torch.autograd.grad(y_TBC, (x, norm.weight, norm.bias), g_TBC)
    moments = norm.running_mean, norm.running_var
    bound = 1e-4 if dtype == torch.float32 else 2**-7
    for one, other in zip((y_TBC.detach(), *found, *moments), expected, strict=True):
        assert distance(one, other) <= bound


def _of_float64(norm: BatchNorm, x_TBC: Tensor, g_TBC: Tensor) -> tuple[Tensor, ...]:
    """The output, the gradients of input, weight and bias, and the running statistics."""
    x_TBC = x_TBC.double().contiguous().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    moments = norm.running_mean.double(), norm.running_var.double()
    y_TBC = torch.stack(
        [
            F.batch_norm(x_BC, *moments, weight, bias, True, norm.momentum, norm.eps)
            for x_BC in x_TBC
        ]
    )
    return y_TBC.detach(), *torch.autograd.grad(y_TBC, (x_TBC, weight, bias), g_TBC), *moments


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_more_than_2_to_the_31_numbers_have_the_bits_of_few() -> None:
    """The last time step begins above 2^31, and the neurons do not depend on each other."""
    on = device_of("cuda")
    steps, neurons, last = 3, 2**30 + 1024, 4096
    if torch.cuda.mem_get_info(on)[0] < 40e9:
        pytest.skip("needs 40 GB of free memory on the GPU")
    x_TB = torch.empty(steps, neurons, dtype=torch.bfloat16, device=on).normal_()
    few_TB = x_TB[:, -last:].contiguous()
    s_TB, g_TB = _spikes_and_gradient(x_TB)
    few_s_TB, few_g_TB = _spikes_and_gradient(few_TB)
    assert torch.equal(s_TB[:, -last:], few_s_TB) and few_s_TB.count_nonzero() > 1000
    assert torch.equal(g_TB[:, -last:], few_g_TB) and few_g_TB.count_nonzero() > 1000
    del x_TB, g_TB
    bits = packing.pack(s_TB)
    assert torch.equal(packing.unpack(bits, s_TB.shape, s_TB.stride(), s_TB.dtype, 1.0), s_TB)


def _spikes_and_gradient(x_TB: Tensor) -> tuple[Tensor, Tensor]:
    lif = LIF(0.5)
    with fresh_state(lif):
        s_TB = lif(x_TB.requires_grad_())
    return s_TB.detach(), torch.autograd.grad(s_TB, x_TB, torch.ones_like(s_TB))[0]


@pytest.mark.gpu
def test_a_kernel_runs_on_the_gpu_of_its_tensors() -> None:
    device_of("cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    x_TB = torch.randn(3, 4, 501) * 2
    found = [ran(x_TB.to(f"cuda:{index}")) for index in (0, 1)]
    assert torch.cuda.current_device() == 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.gpu
def test_a_gpu_has_kernels() -> None:
    """Where Triton is missing, all else here would compare eager torch with itself."""
    assert has_kernels(torch.empty(0, device=device_of("cuda")))

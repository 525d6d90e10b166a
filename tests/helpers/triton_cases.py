"""A part of the kernel cases in Triton's interpreter, in a process of their own:

TRITON_INTERPRET=1 python -m tests.helpers.triton_cases PART PARTS
"""

import sys

import torch

from pipeline.spiking.kernels import cpu, cuda, operators
from pipeline.spiking.neuron import LIF, PLIF
from tests.helpers.kernel_cases import assert_eagers, cases, distance
from tests.helpers.rule_networks import outputs

# The interpreter cuts the last bits of a bf16 off, at each of three roundings.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 3 * 2**-7}


def main(part: int, parts: int) -> None:
    """Inputs are multiples of 1/8, on which the interpreter's products and sums are exact."""
    torch.manual_seed(part)
    torch.set_num_threads(1)
    operators._import = lambda module: cuda  # type: ignore[assignment]
    held = 0
    for case in list(cases())[part::parts]:
        case = case._replace(beta=1.0 if case.beta == 1 else 2.0, decay=0.5)
        for dtype, bound in BOUNDS.items():
            x_TB = ((torch.randn(case.steps, 3, 50) * 12 + 4).round() / 8).to(dtype)
            g_TB = torch.randn(case.steps, 3, 50).to(dtype)
            assert_eagers(case, x_TB, g_TB, bound, decay_bound=bound)
            held += 1
    print(held, "held")


def rounded_as_in_eager() -> None:
    """Numbers that differ from others only in the bits that fp32 rounds off."""
    x_TB = (torch.randn(3, 2, 50) * 12 + 4).round() / 8
    # In fp32 this decay is 1, and 1 - decay is not 0.
    leaky = [LIF(1 - 2**-26, scale_input=True, kernel=kernel) for kernel in ("auto", "eager")]
    spikes = [outputs(lif, x_TB * 2**26) for lif in leaky]
    assert torch.equal(*spikes) and 0.1 < spikes[0].mean() < 0.9
    # One rounding of 1.1 and one of its reciprocal give another number than 1 / 1.1 rounded once.
    inverse_beta = cuda._numbers(0.5, 1.0, 0.0, None, 1.0, 1.1)[-1]
    assert inverse_beta == float(1 / torch.tensor(1.1)) != float(torch.tensor(1 / 1.1))
    plif = PLIF(0.5)
    (g_decay,) = torch.autograd.grad(
        outputs(plif, x_TB.bfloat16(), grad=True).sum(), [*plif.parameters()]
    )
    assert g_decay != g_decay.bfloat16()  # a sum in fp32


def others() -> None:
    """The kernels besides the neuron's, against those of a CPU."""
    for dtype, bound in ((torch.float32, 5e-6), (torch.float16, 3e-3)):
        for shape, last in (
            ((3, 5, 7, 6, 6), False),
            ((3, 5, 40, 6, 6), True),
            ((2, 9, 33), False),
        ):
            x_NC = (torch.randn(shape).flatten(0, 1) * 2 + 3).to(dtype)
            if last:
                x_NC = x_NC.contiguous(memory_format=torch.channels_last)
            x_TBC = x_NC.unflatten(0, shape[:2])
            g_TBC = torch.empty_like(x_TBC).copy_(torch.randn(shape))
            same_TBC = g_TBC[:1].expand(shape)  # a gradient that is the same at all steps
            weight, bias, gain = torch.rand(shape[2]), torch.rand(shape[2]), torch.tensor([0.3])
            found = []
            for module in (cpu, cuda):
                running = torch.zeros(shape[2]), torch.ones(shape[2])
                y_TBC, *moments = module.step_norm_forward(x_TBC, weight, bias, *running, 0.1, 1e-5)
                gradients = []
                for g in (g_TBC, same_TBC):
                    gradients += module.step_norm_backward(g, x_TBC, weight, *moments)
                    g_b, g_gain = module.scaled_add_backward(g, x_TBC, gain, 0.2)
                    gradients.append(g_b)
                    products = g.double() * x_TBC.double()
                    error = abs(float(g_gain - 0.2 * products.sum()))
                    assert error <= 2e-4 * float(products.abs().sum()), (dtype, shape)
                sums = [
                    module.scaled_add_forward(x, y_TBC, gain, 0.2)
                    for x in (x_TBC, x_TBC[:1].expand(shape))
                ]
                spikes = (x_TBC > 3).to(dtype) * 2
                bits = module.pack_spikes(spikes)
                module.unpack_spikes(bits, unpacked := torch.empty_like(spikes), 2.0)
                assert torch.equal(unpacked, spikes)
                found.append((y_TBC, *moments, *running, *gradients, *sums, bits))
            for one, other in zip(*found, strict=True):
                assert distance(one, other) < bound, (dtype, shape)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    rounded_as_in_eager()
    others()

"""The kernels as a GPU would be given them, compiled for an H100 without one. Prints each with its
registers and the bytes that do not fit into them.

    python -m tests.helpers.triton_compiled

The arguments of each launch are those of the public functions, on tensors of a CPU, so what Triton
specialises on (absent tensors, integers that are 1 or divisible by 16, addresses) is as on a GPU.
Nothing is launched: the tensors keep what was in their memory.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pipeline.spiking.kernels import cuda, operators
from pipeline.spiking.neuron import LIF
from tests.helpers.kernel_cases import cases, outcome
from tests.helpers.rule_networks import outputs

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WORDS = ("REG", "STACK", "LOCAL")


class H100:
    """What Triton asks of a driver to compile."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


def compiling(seen: list[tuple[str, Any]]) -> Callable[..., None]:
    """In place of a launch. `seen` gets the name and the binary of each kernel, once."""
    run: Any = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        if all(binary is not other for _, other in seen):
            seen.append((kernel.fn.__name__, binary))

    return compile_only


def usage(binary: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        words = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return " ".join(re.findall(rf"{word}:(\d+)", said)[0] for word in WORDS)


def compile_neurons() -> None:
    every = list(cases())
    for dtype in (torch.bfloat16, torch.float32):
        for steps, step in ((1, 97), (5, 61)):
            for case in [case for case in every if case.steps == steps][::step]:
                x_TB, g_TB = (torch.zeros(steps, 3, 4000, dtype=dtype) for _ in range(2))
                outcome(case, "auto", x_TB, g_TB)
    case, x_TB = every[0], torch.zeros(4, 1)  # Triton makes a constant of the integer 1
    outcome(case._replace(steps=4), "auto", x_TB, x_TB)
    outputs(LIF(1, threshold=2), x_TB)  # integers have another type than floats
    cuda.lif_forward(
        x_TB, None, None, torch.ones(3), None, 1, 0.4, 0.0, 0.0, 0.0, 1.0, 1.0, False, False, True
    )


def compile_others() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x_NC = torch.zeros(12, 48, 6, 6, dtype=dtype)
        last_NC = x_NC.contiguous(memory_format=torch.channels_last)
        for x_TBC in (each.unflatten(0, (3, 4)) for each in (x_NC, last_NC, x_NC[:, :33, 0, 0])):
            x_TBC = operators.dense(x_TBC)
            channels = x_TBC.shape[2]
            weight, moments_TC = torch.ones(channels), torch.ones(3, channels)
            cuda.step_norm_forward(x_TBC, weight, weight, weight, weight, 0.1, 1e-5)
            cuda.step_norm_backward(x_TBC, x_TBC, weight, moments_TC, moments_TC)
            cuda.scaled_add_forward(x_TBC, x_TBC, weight[:1], 0.2)
            cuda.scaled_add_backward(x_TBC, x_TBC, weight[:1], 0.2)
            cuda.unpack_spikes(cuda.pack_spikes(x_TBC), x_TBC, 2.0)


def main() -> None:
    driver.set_active(H100())  # type: ignore[arg-type]
    operators._import = lambda module: cuda  # type: ignore[assignment]
    seen: list[tuple[str, Any]] = []
    JITFunction.run = compiling(seen)  # type: ignore[method-assign]
    compile_neurons()
    compile_others()
    for name, binary in seen:
        print(f"{name}: {usage(binary)}")


if __name__ == "__main__":
    main()

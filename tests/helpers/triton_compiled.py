"""The kernels of neurons, compiled for an H100 without one. Prints each with its registers and the
bytes that do not fit into them.

    python -m tests.helpers.triton_compiled
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.spiking.kernels import cuda

H100 = GPUTarget("cuda", 90, 32)
READ_ELF = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OF_INPUTS = ("x", "s", "g_s", "g_x")
INTEGERS = ("neurons", "x_step", "g_s_step")
NUMBERS = ("decay", "threshold", "subtract", "gain", "inverse_beta", "a", "b")


def compiled(kernel: Any, dtype: str, **constants: Any) -> str:
    names = kernel.arg_names
    types = {name: f"*{dtype}" if name in OF_INPUTS else "*fp32" for name in names}
    types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(NUMBERS, "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if types[name].startswith("*") or types[name] == "i32"]
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(source, target=H100, options={"enable_fp_fusion": False})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [READ_ELF, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    registers, stack, local = (re.findall(rf"{word}:(\d+)", said)[0] for word in WORDS)
    return f"{kernel.fn.__name__} {dtype} {constants['STEPS']} steps: {registers} {stack} {local}"


WORDS = ("REG", "STACK", "LOCAL")


def main() -> None:
    plain = {"CHARGE": 0, "TO_ZERO": False, "LEARNT": False, "SCALES": True, "BLOCK": cuda.BLOCK}
    most = plain | {"CHARGE": 2, "TO_ZERO": True, "LEARNT": True, "HAS_V": True}
    gradients = {"HAS_G_S": True, "RESET_GRADIENT": False, "CUT": False, "SURROGATE": 0}
    for dtype in ("bf16", "fp32"):
        for steps in (1, 4, 6):
            recomputes = dtype == "bf16" and steps > 1
            about = {"STEPS": steps, "HAS_V": steps == 1}
            forward = {"LEVELS": False, "SAVES_U": not recomputes}
            print(compiled(cuda._forward, dtype, **plain | about | forward))
            backward = gradients | {"HAS_U": not recomputes, "HAS_G_V": False, "NEEDS_V": False}
            print(compiled(cuda._backward, dtype, **plain | about | backward))
            backward |= {"HAS_G_V": True, "NEEDS_V": True, "RESET_GRADIENT": True, "SURROGATE": 1}
            print(compiled(cuda._backward, dtype, **most | backward | {"STEPS": steps}))


if __name__ == "__main__":
    main()

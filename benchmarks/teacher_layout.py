"""What a teacher's answers cost with the channels last in memory, as timm_teacher has them, against
the order of the batch.

Command:  python -m benchmarks.teacher_layout [--name tf_efficientnet_lite0] [--batches 6] [--side
          224] [--size 32] [--threads 1]
Result:   images/s, contiguous and channels last:  fp32 17.6, 28.3 (1.60);  bf16 43.7, 64.9 (1.48);
          commit eb0a1203d0de, one thread of 2 idle cores of an AMD EPYC, torch 2.13

Fresh weights; the two layouts take turns on the same random images, once in fp32 and once in bf16.
"""

import argparse
import copy
import statistics
import time

import timm
import torch

from pipeline.core.code_version import commit
from pipeline.measure.memory import device_here, hardware

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
WARM_UP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--name", default="tf_efficientnet_lite0")
    for name, value in (("batches", 6), ("side", 224), ("size", 32), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    on = f"{hardware(device_here())['cpu']}, torch {torch.__version__}"
    print(f"{chosen.name}, {chosen.side} px, batch {chosen.size}; commit {commit()}, {on}")
    network = timm.create_model(chosen.name).eval()
    for dtype in (torch.float32, torch.bfloat16):
        speeds = images_per_second(
            network.to(dtype), batches=chosen.batches, side=chosen.side, size=chosen.size
        )
        told = ", ".join(f"{layout} {speed:.1f}" for layout, speed in speeds.items())
        print(
            f"{dtype}: {told} images/s, ratio {speeds['channels last'] / speeds['contiguous']:.2f}"
        )


@torch.no_grad()
def images_per_second(
    network: torch.nn.Module, *, batches: int, side: int, size: int
) -> dict[str, float]:
    networks = {layout: copy.deepcopy(network) for layout in LAYOUTS}
    for layout, order in LAYOUTS.items():
        networks[layout].to(memory_format=order)  # type: ignore[call-overload]
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    dtype = next(network.parameters()).dtype
    for _ in range(WARM_UP + batches):
        x_BCHW = torch.randn(size, 3, side, side)
        for layout, order in LAYOUTS.items():
            began = time.perf_counter()
            networks[layout](x_BCHW.to(dtype, memory_format=order))
            seconds[layout].append(time.perf_counter() - began)
    return {layout: size / statistics.median(each[WARM_UP:]) for layout, each in seconds.items()}


if __name__ == "__main__":
    main()

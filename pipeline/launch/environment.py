"""The environment variables of worker processes. Ray passes on a fixed list of its own, and forces
OMP_NUM_THREADS to 1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.core.allocator import environment
from pipeline.core.secrets import is_secret
from pipeline.core.torch_settings import EXACT

PASSED_ON = (
    *("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "HF_"),
    *(
        "PYTORCH_",
        "CUBLAS_",
        "TRITON_",
        "TORCHINDUCTOR_",
    ),  # allocator, workspaces, and where compiled kernels are kept
)


def of_worker(*, threads: int, loader_threads: int, gpus: bool, alone: bool) -> dict[str, str]:
    """What reaches every worker; `threads` of torch's; `alone`: on one machine, which nobody else
    is to reach them on.
    """
    return {
        **(
            {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if alone else {}
        ),  # unless the user says otherwise
        **(EXACT if gpus else {}),  # likewise; NCCL reads it when it first meets the others
        **passed_on(),
        # A worker starts in a folder of its own; a package that the user trusts lies beside the
        # recipe or on the path.
        "PYTHONPATH": os.pathsep.join(
            dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path)
        ),
        **environment(),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": (
            "PASSIVE"
        ),  # spinning threads beside a busy process were nine times slower
        "NUMBA_NUM_THREADS": str(loader_threads),
        # What the workers have, not what this process sees; and workers without a GPU each must not
        # meet the few there are.
        **(
            {"DS_ACCELERATOR": "cuda"}
            if gpus
            else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        ),
    }


def passed_on() -> dict[str, str]:
    """What this process has been told of networks, caches and compilers.

    No secrets: Ray writes these variables down in its logs, and a machine has its own.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PASSED_ON) and not is_secret(name)
    }

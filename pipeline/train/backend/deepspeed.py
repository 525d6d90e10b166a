"""DeepSpeed's ZeRO-0/1/2 under rules that call backward several times per optimizer step.

Checked on deepspeed 0.19.8, the oldest version that pyproject.toml allows. In DeepSpeed's default
configuration, ZeRO-1 and ZeRO-2 keep only the *last* backward call's gradient, without an error.
With `managed_gradient_accumulation: false` they add the gradients of all backward calls until
`engine.step()`. `tests/train/backend/test_deepspeed.py` checks both facts.
"""

import logging
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed, nn

from pipeline.core.checks import require
from pipeline.core.tensor_file import load_deepspeed
from pipeline.train.backend.base import (
    Backend,
    OptimizerOf,
    cpu_copy,
    fuse,
    optimizer_reset,
    skipping,
)

CHECKPOINT_TAG = "state"
MAX_BUCKET_SIZE = 500_000_000  # elements


def config(
    *,
    micro_batch: int,
    workers: int,
    parameters: int,
    zero: int = 0,
    precision: str = "fp32",
    clip_norm: float = 0.0,
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. The training loop accumulates gradients itself, so
    DeepSpeed is configured for one micro-batch per step.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * workers,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # DeepSpeed's default of 1.0 would clip gradients that other backends do not clip.
        "gradient_clipping": clip_norm,
        "zero_allow_untested_optimizer": True,
        # Each backward pass allocates a full bucket. DeepSpeed's default of 5e8 elements takes 2 GB
        # for every network, however small.
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": min(parameters, MAX_BUCKET_SIZE),
            # Only clipping needs the gradient norm, which costs a reduction over ranks and a wait
            # for the GPU at every step.
            **({"compute_grad_norm": False} if zero and not clip_norm else {}),
        },
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            # At ZeRO-1 and ZeRO-2, gradients of the module classes in this list are reduced in
            # bf16, which changes them by up to 4e-2 (0.19.8). No model has the class below, so
            # every reduction is in fp32. The list does not change the forward pass.
            "lower_precision_safe_modules": ["torch.nn.Bilinear"],
        },
        "steps_per_print": 2**31,
        # This timer is on by default (0.19.8). The timer waits for the GPU at every forward pass:
        # T times per batch under an online rule, once under BPTT.
        "timers": {"throughput": {"enabled": False}},
    }


class DeepSpeed(Backend):
    """A DeepSpeed engine as a `Backend`. The process group must already exist."""

    name = "deepspeed"

    def __init__(
        self,
        network: nn.Module,
        optimizer_of: OptimizerOf,
        *,
        micro_batch: int,
        zero: int = 0,
        precision: str = "fp32",
        clip_norm: float = 0.0,
    ) -> None:
        deepspeed = import_deepspeed()
        if zero:
            _import_muon()
        scalars = [name for name, p in network.named_parameters() if p.dim() == 0]
        require(  # 0.19.8 would fail in its broadcast, without the parameter's name
            not scalars,
            "deepspeed: every parameter must have at least one dimension; got"
            f" {', '.join(scalars)}: use shape (1,)",
        )
        # 0.19.8 broadcasts the bytes of weights, which must be contiguous.
        reordered = [p for p in network.parameters() if p.dim() == 4 and not p.is_contiguous()]
        for p in reordered:
            p.data = p.data.contiguous()
        self.world_size = distributed.get_world_size()
        base_optimizer = optimizer_of(network)
        self.skips_on_device = fuse(base_optimizer) and not zero
        engine, optimizer, _, _ = deepspeed.initialize(
            model=network,
            optimizer=base_optimizer,
            config=config(
                micro_batch=micro_batch,
                workers=self.world_size,
                parameters=sum(parameter.numel() for parameter in network.parameters()),
                zero=zero,
                precision=precision,
                clip_norm=clip_norm,
            ),
        )
        if not zero:  # ZeRO-1 and ZeRO-2 have made them parts of a flat tensor
            for p in reordered:
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        # DeepSpeed creates its own process group (0.19.8) with torch's default timeout, 10 minutes
        # under NCCL. With this timeout, a reduction of gradients would fail before the watchdog
        # reports a hung worker.
        all_workers: Any = distributed.group.WORLD
        timeout = all_workers._get_backend(engine.device).options._timeout
        distributed.distributed_c10d._set_pg_timeout(timeout, engine.data_parallel_group)
        self.model: nn.Module = engine
        self.network = network
        self.optimizer: torch.optim.Optimizer = optimizer
        self.reset_optimizer = optimizer_reset(optimizer)
        self.zero = zero
        self._engine: Any = engine

    def backward(self, loss: Tensor, share: float) -> None:
        # DeepSpeed averages over ranks, but the shares already sum to 1 over ranks.
        self._engine.backward(loss * (share * self.world_size), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        # ZeRO (0.19.8) moves the gradients out of `grad`: ZeRO-1 to `grad_accum`, ZeRO-2 to
        # attributes of the optimizer that hold this rank's part of the sum over ranks.
        if self.zero == 2:
            optimizer: Any = self.optimizer
            gradients = (
                gradient
                for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors)
                for group in groups.values()
                for gradient in group or ()
            )
        else:
            gradients = (
                getattr(p, "grad_accum", None) if p.grad is None else p.grad
                for p in self.network.parameters()
            )
        return [gradient for gradient in gradients if gradient is not None]

    def zero_grad(self) -> None:
        require(
            not self.zero,
            f"deepspeed: ZeRO must be stage 0 to delete gradients; got ZeRO-{self.zero}",
        )
        for parameter in self.network.parameters():
            parameter.grad = None

    def step(self, bad: Tensor | bool = False) -> None:
        if bad is True:
            self.zero_grad()
            return
        with skipping(self.optimizer, bad):
            self._engine.step()

    def capture(self) -> dict[str, Any]:
        files: dict[str, Any] = {}
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,  # ZeRO-1 and ZeRO-2 copy scripts into it
        ):
            warnings.simplefilter("ignore", FutureWarning)

            def capture_file(state_dict: Any, path: str) -> None:
                files[Path(path).relative_to(folder).as_posix()] = cpu_copy(state_dict)

            with patch.object(self._engine.checkpoint_engine, "save", capture_file):
                self._engine.save_checkpoint(
                    folder, tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=False
                )
        return files

    def load(self, folder: Path) -> None:
        # The original `load` (0.19.8) would run any code in a pickle.
        self._engine.checkpoint_engine.load = load_deepspeed
        path, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if path is None:  # 0.19.8 returns None, and training would start from scratch
            raise FileNotFoundError(f"deepspeed: no checkpoint {CHECKPOINT_TAG!r} in {folder}")


def import_deepspeed() -> Any:
    """Import DeepSpeed without its messages, its shared-memory extension, and MLflow.

    DeepSpeed's autotuner imports MLflow if MLflow is installed. Training does not use the
    autotuner. The import of MLflow takes eight times as long as the rest of DeepSpeed, in every
    worker at every start.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    hides_mlflow = "mlflow" not in sys.modules
    if hides_mlflow:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes the import of MLflow fail
    try:
        # Another program may read stdout as JSON. With a GPU but without nvcc, 0.19.8 prints there.
        with redirect_stdout(sys.stderr):
            import deepspeed
    finally:
        if hides_mlflow:
            del sys.modules["mlflow"]
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's handler, which writes to stdout
            handler.setStream(sys.stderr)
    # Only an all-reduce for inference needs this extension. `init_distributed` would build the
    # extension, which takes a minute and needs a compiler.
    from deepspeed.ops import __compatible_ops__ as extensions

    extensions["deepspeed_shm_comm"] = False
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as ZeRO does to see whether it is the optimizer (0.19.8).

    Its functions are decorated with `torch.compile`, which imports torch's compiler: 1.5 s in every
    worker at every start. With this variable the decorator does nothing.
    """
    with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

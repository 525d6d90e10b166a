"""DeepSpeed's ZeRO-0/1/2 under rules that call backward several times per optimizer step.

Checked on deepspeed 0.19.8. In its default configuration ZeRO-1 and ZeRO-2 keep only the *last*
backward call's gradient, without an error; `managed_gradient_accumulation: false` makes
`engine.step()` the only boundary, and every call counts. `tests/train/backend/test_deepspeed.py`
pins
both facts.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, distributed, nn

from pipeline.core.tensor_file import load_data
from pipeline.train.backend.base import OptimizerOf, forgetter
from pipeline.train.backend.copies import copied

CHECKED = "0.19.8"
CHECKPOINT_TAG = "state"
LARGEST_BUCKET = 500_000_000  # numbers


def config(
    *,
    micro_batch: int,
    workers: int,
    parameters: int,
    zero: int = 0,
    precision: str = "fp32",
    clip_norm: float = 0.0,
) -> dict[str, Any]:
    """The DeepSpeed JSON of a run. Accumulation is the training loop's: DeepSpeed sees one long
    micro-batch.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "train_batch_size": micro_batch * workers,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": (
            clip_norm
        ),  # DeepSpeed's own default is 1.0, which would colour every comparison
        "zero_allow_untested_optimizer": True,
        # A bucket is allocated whole at each backward: DeepSpeed's own default of 5e8 numbers is 2
        # GB, whatever the network.
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": min(parameters, LARGEST_BUCKET),
            # Clipping alone needs the norm, which costs a reduction over ranks and a wait for the
            # GPU at every step.
            **({"compute_grad_norm": False} if zero and not clip_norm else {}),
        },
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            # Gradients of the classes listed here are reduced in bf16 at stages 1 and 2, which
            # moves them by up to 4e-2 (0.19.8); listing one that no model has keeps every reduction
            # in fp32 and the forward as it is.
            "lower_precision_safe_modules": ["torch.nn.Bilinear"],
        },
        "steps_per_print": 2**31,
        # On by default in 0.19.8, it waits for the GPU at every forward: T times a batch under an
        # online rule, once under BPTT.
        "timers": {"throughput": {"enabled": False}},
    }


class DeepSpeed:
    """A DeepSpeed engine behind the `Backend` protocol. The process group must exist before it is
    built.
    """

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
        scalars = [name for name, p in network.named_parameters() if p.dim() == 0]
        if scalars:  # 0.19.8 fails in the middle of its broadcast, without a name
            raise ValueError(
                "deepspeed: every parameter must have at least one dimension; got"
                f" {', '.join(scalars)}: use shape (1,)"
            )
        self.workers = distributed.get_world_size()
        settings = config(
            micro_batch=micro_batch,
            workers=self.workers,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            zero=zero,
            precision=precision,
            clip_norm=clip_norm,
        )
        engine, optimizer, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer_of(network), config=settings
        )
        _wait_as_long_as_the_others(engine)
        self.model: nn.Module = engine
        self.network = network
        self.optimizer: torch.optim.Optimizer = optimizer
        self.forget = forgetter(optimizer)
        self.zero = zero
        self._engine: Any = engine

    def backward(self, loss: Tensor, share: float) -> None:
        # DeepSpeed averages over ranks, shares already sum to 1 over them.
        self._engine.backward(loss * (share * self.workers), scale_wrt_gas=False)

    def gradients(self) -> list[Tensor]:
        # Where ZeRO (0.19.8) has moved them to: an attribute of its own at stage 1, at stage 2 this
        # rank's share of their sum.
        if self.zero == 2:
            shares = (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors)  # type: ignore[attr-defined]
            found = (
                gradient for share in shares for group in share.values() for gradient in group or ()
            )
        else:
            found = (
                getattr(p, "grad_accum", None) if p.grad is None else p.grad
                for p in self.network.parameters()
            )
        return [gradient for gradient in found if gradient is not None]

    def discard(self) -> None:
        if self.zero:
            raise ValueError(
                f"deepspeed: gradients can be forgotten at ZeRO-0 alone; got ZeRO-{self.zero}"
            )
        for parameter in self.network.parameters():
            parameter.grad = None

    def step(self) -> None:
        self._engine.step()

    def published(self) -> AbstractContextManager[None]:
        return nullcontext()

    def replicated(self) -> list[Tensor]:
        return list(self.network.parameters())

    def capture(self) -> dict[str, Any]:
        with (
            warnings.catch_warnings(),
            tempfile.TemporaryDirectory() as folder,
        ):  # where a stage above 0 copies its scripts to
            warnings.simplefilter("ignore", FutureWarning)
            kept, writing = _Kept(Path(folder)), self._engine.checkpoint_engine
            self._engine.checkpoint_engine = kept
            try:
                self._engine.save_checkpoint(
                    folder, tag=CHECKPOINT_TAG, save_latest=False, exclude_frozen_parameters=False
                )
            finally:
                self._engine.checkpoint_engine = writing
        return kept.files

    def load(self, folder: Path) -> None:
        # DeepSpeed's own `load` (0.19.8) runs whatever code a pickle asks for.
        self._engine.checkpoint_engine.load = load_data
        path, _ = self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)
        if (
            path is None
        ):  # 0.19.8 answers a missing checkpoint with (None, None) and trains on from scratch
            raise FileNotFoundError(f"deepspeed: no checkpoint {CHECKPOINT_TAG!r} in {folder}")


class _Kept:
    """Stands in for what writes DeepSpeed's checkpoints (0.19.8), and keeps a copy of each file's
    content instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).relative_to(self.folder).as_posix()] = copied(state_dict)

    def create(self, info: Any) -> None: ...
    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...
    def commit(self, info: Any) -> None: ...

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return False


def _wait_as_long_as_the_others(engine: Any) -> None:
    """Give the group that DeepSpeed (0.19.8) reduces in, a copy of all workers' own, the patience
    of that one.

    It is made with torch's default, 10 minutes under NCCL: gradients would give up on a worker
    before its watchdog does."""
    of_all: Any = distributed.group.WORLD
    options = of_all._get_backend(engine.device).options
    distributed.distributed_c10d._set_pg_timeout(options._timeout, engine.data_parallel_group)


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Inside, it cannot be imported, unless it was before."""
    absent = module not in sys.modules
    if absent:
        sys.modules[module] = None  # type: ignore[assignment]  # how Python says so
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


class _OwnLines:
    """Stands for `sys.stdout` while this thread imports something: what the thread prints goes to
    stderr.

    The other threads keep their stdout: the main thread shows the run meanwhile.
    """

    def __init__(self, stdout: TextIO) -> None:
        self._stdout, self._thread = stdout, threading.get_ident()

    def write(self, text: str) -> int:
        return self._of_this_thread().write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_this_thread(), name)

    def _of_this_thread(self) -> TextIO:
        return sys.stderr if threading.get_ident() == self._thread else self._stdout


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Inside, what this thread prints goes to stderr: stdout may be JSON that a program reads."""
    before = sys.stdout
    sys.stdout = _OwnLines(before)
    try:
        yield
    finally:
        sys.stdout = before


def import_deepspeed() -> Any:
    """Import DeepSpeed quietly, without the build of an extension that training does not use, and
    without MLflow.

    Its autotuner, which training does not use either, imports MLflow where there is one: eight
    times as long as all the rest of it, in every worker, at every start.

    Raises:
        RuntimeError: a DeepSpeed that would drop gradients in silence.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with (
        _without("mlflow"),
        _printing_to_stderr(),
    ):  # without nvcc 0.19.8 prints 7 lines on a machine with a GPU
        import deepspeed
    from deepspeed.runtime import constants

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if (
            type(handler) is logging.StreamHandler
        ):  # its own, which writes to stdout, as commands do that print JSON
            handler.setStream(sys.stderr)
    if not hasattr(constants, "MANAGED_GRADIENT_ACCUMULATION"):
        raise RuntimeError(
            f"deepspeed: needs managed_gradient_accumulation (deepspeed >= {CHECKED}); got"
            f" {deepspeed.__version__}, whose ZeRO-1/2 keep only the last of several backward calls"
        )
    # Only an inference all-reduce needs this extension; building it inside init_distributed takes a
    # minute and a compiler.
    from deepspeed.ops import __compatible_ops__ as extensions

    extensions["deepspeed_shm_comm"] = False
    return deepspeed

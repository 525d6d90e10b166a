"""Batch normalisation on time-first tensors, with the same meaning under every rule.

    y = gain (x - mean) / sqrt(var + eps) + bias

Two arguments determine which samples give mean and (biased) variance:

    over="step"       each time step alone, so one call on T steps equals T calls on one step
    over="time"       all T steps together, as in most published Transformers; rules that pass
                      slices of time to the model refuse it
    between="rank"    the samples of this rank
    between="world"   the samples of all ranks. The statistics are exact, also if the ranks have
                      different batch sizes. (torch's SyncBatchNorm requires CUDA, torch 2.13.)

A static input (`encode.is_static`) has the same statistics at every step. They are computed once,
and the running statistics are updated as for T steps.
"""

# T time, B batch, C channels, R ranks

from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.checks import refuse_unless_one_of
from pipeline.spiking.encode import frame_of, is_static, repeat
from pipeline.spiking.kernels.operators import has_kernels
from pipeline.spiking.kernels.step_norm import step_norm


class BatchNorm(nn.Module):
    """Batch norm on `[T, B, C, ...]`.

    In train mode the running statistics are updated once per time step (`over="time"`: once per
    call), also under `no_grad`. In eval mode, or if `frozen` is set, they are constant and replace
    the batch statistics. With `between="world"` every rank must make the same calls, because each
    call is collective. If `repeats` is set, the input is one frame, and the running statistics are
    updated as for `repeats` steps.

    Raises: ValueError for an unknown `over` or `between`, or if the third dimension is not
    `channels`.
    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        over: Literal["step", "time"] = "step",
        between: Literal["rank", "world"] = "rank",
    ) -> None:
        super().__init__()
        refuse_unless_one_of("BatchNorm", ("step", "time"), over=over)
        refuse_unless_one_of("BatchNorm", ("rank", "world"), between=between)
        self.channels = channels
        self.eps = eps
        self.momentum = momentum
        self.over = over
        self.between = between
        self.frozen = False
        self.repeats: int | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x_TBC: Tensor) -> Tensor:
        if x_TBC.dim() < 3 or x_TBC.shape[2] != self.channels:
            raise ValueError(
                f"BatchNorm: the input must be [T, B, {self.channels}, ...]; got shape"
                f" {tuple(x_TBC.shape)}"
            )
        if self.repeats is not None or is_static(x_TBC):
            return repeat(self._normalize(frame_of(x_TBC), self.repeats or len(x_TBC)), len(x_TBC))
        if self.uses_batch_statistics and self.over == "step" and len(x_TBC) > 1:
            if self.between == "world" or not has_kernels(x_TBC):
                return torch.stack([self._normalize(x_BC) for x_BC in x_TBC.unbind(0)])
            return step_norm(
                x_TBC,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.momentum,
                self.eps,
            )
        return self._normalize(x_TBC.flatten(0, 1)).view_as(x_TBC)

    @property
    def uses_batch_statistics(self) -> bool:
        return self.training and not self.frozen

    def _normalize(self, x_NC: Tensor, steps: int = 1) -> Tensor:
        """The output for `x_NC`. If `steps` is above 1, every one of these steps has this input."""
        if self.uses_batch_statistics and self.between == "world" and distributed.is_initialized():
            return self._normalize_over_ranks(x_NC, steps)
        if not self.uses_batch_statistics or steps == 1:
            return F.batch_norm(
                x_NC,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.uses_batch_statistics,
                self.momentum,
                self.eps,
            )
        # With momentum 1, batch_norm writes the statistics of the batch into mean_C and var_C.
        mean_C, var_C = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        y_NC = F.batch_norm(x_NC, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps)
        count = x_NC.numel() // self.channels
        self._update_running_statistics(mean_C, var_C * ((count - 1) / count), count, steps)
        return y_NC

    def _normalize_over_ranks(self, x_NC: Tensor, steps: int) -> Tensor:
        wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
        mean_C, var_C, count = moments_over_ranks(wide_NC)
        self._update_running_statistics(mean_C, var_C, count, steps)
        shape = (-1, *[1] * (x_NC.dim() - 2))
        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        return ((wide_NC - mean_C.view(shape)) * scale_C.view(shape) + self.bias.view(shape)).to(
            x_NC.dtype
        )

    @torch.no_grad()
    def _update_running_statistics(
        self, mean_C: Tensor, var_C: Tensor, count: Tensor | int, steps: int
    ) -> None:
        """Update as for `steps` time steps with the same `mean_C` and biased `var_C`.

        `count` is the number of values per channel in one time step.
        """
        updates, samples = (steps, count) if self.over == "step" else (1, count * steps)
        weight = 1 - (1 - self.momentum) ** updates
        unbiased_C = var_C * (samples / (samples - 1))
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), weight)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, eps={self.eps}, momentum={self.momentum}, over={self.over!r},"
            f" between={self.between!r}"
        )


def is_foreign_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm, other than `BatchNorm`, with statistics over all input samples.

    Examples are torch's BatchNorm, torch's InstanceNorm with running statistics, and timm's
    BatchNormAct2d and EvoNorm2dB0. Their input `[T B, C, ...]` has no time axis, so their
    statistics mix time steps. A layer with a buffer `weight` (torchvision's FrozenBatchNorm2d) is
    not such a norm, because its statistics are constant.
    """
    if isinstance(module, BatchNorm):
        return False
    buffers = dict(module.named_buffers(recurse=False))
    return isinstance(module, _BatchNorm) or (
        "weight" not in buffers and bool(buffers.keys() & {"running_mean", "running_var"})
    )


def foreign_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norms of `model` that mix time steps in training (`is_foreign_norm`), by module name.

    A norm is omitted if it has running statistics and stays in evaluation mode after
    `model.train()`, because its statistics are then constant.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        return {
            name or "the model itself": module
            for name, module in model.named_modules()
            if is_foreign_norm(module)
            and (module.training or not getattr(module, "track_running_stats", True))
        }
    finally:
        for module, mode in modes.items():
            module.training = mode


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def moments_over_ranks(x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over all ranks, and the number of values per channel.

    Mean and variance have a gradient.

    The function makes one collective call: each rank fills its own row of a table, and the sum over
    ranks is the whole table. Chan's formula combines the means and squared deviations of the ranks.
    It avoids the cancellation in E[x^2] - E[x]^2.

    Source: Chan, Golub & LeVeque 1983 (doi 10.1080/00031305.1983.10483115), eq. 2.1.
    """
    channels = x_NC.shape[1]
    count = x_NC.numel() // channels
    var_C, mean_C = torch.var_mean(x_NC, [0, *range(2, x_NC.dim())], correction=0)
    row = torch.cat([mean_C, var_C * count, mean_C.new_full((1,), float(count))])
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    table_R = _SumOverRanks.apply(F.pad(row.unsqueeze(0), (0, 0, rank, ranks - 1 - rank)))
    mean_RC, deviation_RC, count_R1 = table_R.split(  # type: ignore[union-attr]
        [channels, channels, 1], dim=1
    )
    total = count_R1.detach().sum()
    world_mean_C = (count_R1 * mean_RC).sum(0) / total
    world_deviation_C = (deviation_RC + count_R1 * (mean_RC - world_mean_C).square()).sum(0)
    return world_mean_C, world_deviation_C / total, total


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks. The backward sums the gradients of all ranks.

    The result is the gradient of the sum of the losses of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, grad_outputs[0])

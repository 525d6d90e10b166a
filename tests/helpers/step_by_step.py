"""Parts of published spiking Transformers, written out on torch's functions and published names."""

import torch
from torch import Tensor
from torch.nn import functional as F

# B batch, C channels, H W pixels


class StepByStep:
    """One time step at each call: `[B, C, H, W]` to logits `[B, K]`. The membranes stay."""

    def __init__(self, weights: dict[str, Tensor], heads: int) -> None:
        self.w = weights
        self.heads = heads
        self.membranes: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def lif(self, key: str, x: Tensor, threshold: float = 1.0) -> Tensor:
        v = self.membranes.get(key, torch.zeros_like(x))
        u = v + (x - v) / 2
        s = (u >= threshold).to(x.dtype)
        self.membranes[key] = u * (1 - s)
        return s

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        """The number of input channels gives the groups."""
        weight = self.w[f"{name}.weight"]
        weight = weight if weight.dim() == 4 else weight[..., None]
        return F.conv2d(
            x,
            weight,
            self.w.get(f"{name}.bias"),
            stride,
            weight.shape[-1] // 2 if padding is None else padding,
            groups=x.shape[1] // weight.shape[1],
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.w[f"{name}.{kind}"] for kind in kinds))

    def conv_bn(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return self.norm(f"{name}_bn", self.conv(f"{name}_conv", x, stride))

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.heads, -1, x.shape[2] * x.shape[3])

    def projected(self, at: str, x: Tensor, kinds: str) -> list[Tensor]:
        return [self.split(self.lif(at + i, self.conv_bn(at + i, x))) for i in kinds]

    def token_qk(self, at: str, x: Tensor) -> Tensor:
        q, k = self.projected(at, x, "qk")
        return (self.lif(at, q.sum(2, keepdim=True), 0.5) * k).reshape(x.shape)

    def channel_mask(self, at: str, x: Tensor) -> Tensor:
        q, k, v = self.projected(at, x, "qkv")
        return (q * self.lif(at, (k * v).sum(3, keepdim=True), 0.5)).reshape(x.shape)

    def self_attention(self, at: str, x: Tensor) -> Tensor:
        q, k, v = self.projected(at, x, "qkv")
        # the quadratic form, where the network takes the linear one
        scores = torch.einsum("bhdn,bhdm->bhnm", q, k)
        a = self.lif(at, 0.125 * torch.einsum("bhnm,bhdm->bhdn", scores, v), 0.5)
        return a.reshape(x.shape)

    def membrane_mlp(self, name: str, x: Tensor) -> Tensor:
        h = self.conv_bn(f"{name}.mlp.fc1", self.lif(name + "1", x))
        return x + self.conv_bn(f"{name}.mlp.fc2", self.lif(name + "2", h))

    def head(self, x: Tensor, name: str = "head") -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

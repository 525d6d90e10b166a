"""An evaluation runs single time steps: its results are those of all steps at once, its memory does
not grow with T, and no batch waits for a GPU.
"""

# T time, B batch, K classes, N neurons

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.datasets.synthetic import Synthetic
from pipeline.measure.activity import Activity, LayerActivity
from pipeline.measure.constants import ACTIVITY_EVERY
from pipeline.measure.operations import Operations
from pipeline.models.mlp import mlp
from pipeline.models.nf_resnet import nf_resnet18_small
from pipeline.rules.base import OverTime
from pipeline.rules.sltt import SLTT
from pipeline.spiking.encode import repeat
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.rate import RateIF, RateLIF
from pipeline.spiking.state import fresh_state, temporary_hooks
from pipeline.spiking.synapse import Linear
from pipeline.train.backend.collectives import Ranks
from pipeline.train.evaluation import evaluate, evaluation_batches
from pipeline.train.objective import CrossEntropy
from tests.helpers.rule_networks import learn
from tests.train.test_waits import Waits

T, B, K = 5, 32, 7


def residual() -> nn.Module:
    return nf_resnet18_small(classes=K, in_channels=2, width=4, blocks=(1, 1))


def perceptron(neuron: nn.Module) -> nn.Module:
    return mlp(K, in_features=2 * 8 * 8, hidden=(20, 12), neuron=neuron)


class Normed(nn.Module):
    """With a norm over the samples of all steps: of torch, which counts in evaluation too, or
    ours.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.hidden, self.norm, self.neuron = Linear(128, 20), norm, LIF()
        self.classifier = Linear(20, K)

    def forward(self, x_TB: Tensor) -> Tensor:
        h_TBN = self.hidden(x_TB.flatten(2))
        if isinstance(self.norm, BatchNorm):
            h_TBN = self.norm(h_TBN)
        else:
            h_TBN = self.norm(h_TBN.flatten(0, 1)).view_as(h_TBN)
        return self.classifier(self.neuron(h_TBN))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "IF": lambda: perceptron(RateIF(threshold=0.7)),
    "WeightedRates": lambda: perceptron(RateLIF()),
    "norm over time": lambda: Normed(BatchNorm(20, over="time")),
    "norm of the batch": lambda: Normed(nn.BatchNorm1d(20, track_running_stats=False)),
}


def batches(
    steps: int, *, is_static: bool, number: int = 2, dtype: torch.dtype | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    shape = (number, B, 2, 8, 8) if is_static else (number, steps, B, 2, 8, 8)
    x = (2 * torch.rand(shape, generator=draw)).to(dtype)
    target = torch.randint(K, (number, B), generator=draw)
    index = torch.arange(number * B).view(number, B)
    return [
        (repeat(x[i], steps) if is_static else x[i], target[i], index[i]) for i in range(number)
    ]


# ------------------------------------------------------------------------------------- the results


def _activity(spikes: dict[str, list[Tensor]], rows_C: tuple[int, ...]) -> list[LayerActivity]:
    layers = []
    for name, parts in spikes.items():
        fires_TCN = (torch.cat(parts, dim=1)[:, rows_C] != 0).flatten(2)
        share_N = fires_TCN.double().mean((0, 1))
        layers.append(
            LayerActivity(
                name=name,
                neurons=len(share_N),
                samples=len(rows_C),
                rates=tuple(fires_TCN.double().mean((1, 2)).tolist()),
                silent=float((share_N == 0).double().mean()),
                saturated=float((share_N == 1).double().mean()),
            )
        )
    return layers


@pytest.mark.parametrize("over_time", ["steps", "mean"])
@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_results_are_those_of_all_steps_at_once(
    name: str, is_static: bool, over_time: OverTime
) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]().double().eval()
    for module in network.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=0.3)
    data = batches(T, is_static=is_static, dtype=torch.float64)
    spikes: dict[str, list[Tensor]] = {}
    losses, ranked = [], []
    hooks = (
        neuron.register_forward_hook(
            lambda _, __, s_TB, name=name: spikes.setdefault(name, []).append(s_TB)
        )
        for name, neuron in named_neurons(network)
    )
    with torch.no_grad(), temporary_hooks(hooks), Operations(network) as operations:
        for x_TB, target_B, _ in data:
            with fresh_state(network):
                logits_TBK = network(x_TB)
            mean_BK = logits_TBK.mean(0)
            log_p_BK = (logits_TBK if over_time == "steps" else mean_BK).log_softmax(-1)
            losses.append(-log_p_BK[..., range(B), target_B].mean())
            ranked.append(mean_BK.argsort(-1, descending=True))
    result, predictions, activity, inference, _ = evaluate(
        network, data, CrossEntropy(), over_time=over_time, counts_operations=True
    )
    target_N, ranked_NK = torch.cat([each[1] for each in data]), torch.cat(ranked)
    is_hit_NK = ranked_NK == target_N[:, None]
    assert result.samples == 2 * B
    assert result.top1 == float(is_hit_NK[:, 0].double().mean())
    assert result.top5 == float(is_hit_NK[:, :5].any(1).double().mean())
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-12)
    assert predictions.answer.tolist() == ranked_NK[:, 0].tolist()
    assert predictions.target.tolist() == target_N.tolist()
    assert predictions.index.tolist() == list(range(2 * B))
    rows_C = Activity(network, every=ACTIVITY_EVERY).counted_rows(np.arange(2 * B))
    assert list(activity) == _activity(spikes, rows_C)
    assert min(layer.rate for layer in activity) > 0
    assert inference is not None and inference.samples == 2 * B
    if name != "norm of the batch":  # the counted samples are in other batches
        assert inference.work == operations.work["forward"]


# -------------------------------------------------------------------------------------- the memory


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes at one moment of storages that operations have made, each whole and
    once. Storages of `outside` do not count.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()
        self._outside = {each.untyped_storage()._cdata for each in outside}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._outside:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _peak(
    steps: int, act: Callable[[nn.Module, list[Any]], object], *, is_static: bool = True
) -> int:
    network, data = residual(), batches(steps, is_static=is_static)
    tensors = [tensor for batch in data for tensor in batch]
    with LiveBytes([*network.parameters(), *network.buffers(), *tensors]) as live:
        act(network, data)
    return live.peak


def _evaluate(network: nn.Module, data: list[Any]) -> None:
    evaluate(network, data, CrossEntropy(), counts_operations=data[0][0].stride(0) == 0)


def _train(network: nn.Module, data: list[Any]) -> None:
    rule = SLTT()
    rule.attach(network)
    for x_TB, target_B, _ in data:
        learn(rule.loss_terms(network, x_TB, CrossEntropy()(target_B)))
        rule.end_of_batch()


@pytest.mark.parametrize("is_static", [True, False])
def test_memory_is_that_of_few_steps_and_below_that_of_training(is_static: bool) -> None:
    few, many = (_peak(steps, _evaluate, is_static=is_static) for steps in (2, 16))
    assert 0.9 * few < many < 1.1 * few
    assert max(few, many) < _peak(16, _train, is_static=is_static)


# --------------------------------------------------------------------------------------- the waits


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_read_before_the_last_batch(
    name: str, is_static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a tensor on `meta` no value can be had. A number of the host is copied to no device."""
    network, taken = NETWORKS[name]().to("meta"), []
    shape = (2, 8, 8) if is_static else (T, 2, 8, 8)
    data = Synthetic(classes=K, shape=shape, val_samples=3 * B)
    loader = data.val(rank=0, world=1, micro_batch=B, threads=1)
    on_the_host = torch.tensor

    def batches_on_meta() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in evaluation_batches(loader, T, Ranks(device="meta")):
            yield batch
            taken.append(batch)

    monkeypatch.setattr(torch, "tensor", lambda *args, dtype=None: on_the_host(*args, dtype=dtype))
    monkeypatch.setattr(Tensor, "new_tensor", None)
    loss = CrossEntropy(mse=0.5, goal="one_hot")
    with (
        pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"),
        Waits() as waits,
    ):
        evaluate(network, batches_on_meta(), loss, counts_operations=True)
    assert len(taken) == 3 and not waits.found

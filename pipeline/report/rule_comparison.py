"""Training rules on a network and one batch, without a recipe.

    print(compare(network, x_TB, target_B))

Measuring needs no extra. The table and the figure need the extra `report`.
"""

# T time, B batch, K classes

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_counts, refuse_unless_one_of, require
from pipeline.core.torch_settings import keep_freed_memory
from pipeline.forecast.bench import ROUNDS, RULES, BatchBench
from pipeline.forecast.probe import Measured, measure
from pipeline.forecast.sweep import LargestBatch
from pipeline.measure.saved_bytes import held_bytes
from pipeline.recipe import BASELINE, Spec, spec
from pipeline.rules.base import OverTime, Rule
from pipeline.rules.bptt import BPTT
from pipeline.spiking.encode import frame_of, is_static, repeat
from pipeline.spiking.neuron import named_neurons
from pipeline.spiking.state import copies_without_graph, fresh_state
from pipeline.train.objective import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Comparison(Measured):
    """The costs and gradients of rules on one batch. `str` gives tables of 80 columns.

    `costs` has a row for each rule, also for `pandas.DataFrame(comparison.costs)`.
    `fidelity.cosines[rule][layer]` are the cosines with BPTT's gradient. `fidelity.lowest(rule)` is
    the layer with the lowest cosine, and this cosine.
    """

    network: str
    memory: int | None
    largest_batch: Mapping[str, int]  # by rule; empty without `memory`

    def __str__(self) -> str:
        return _import("pipeline.report.forecasts", "the table").comparison_text(self)

    def figure(self) -> Any:
        """Each rule's bytes against its time, coloured by its lowest cosine, as a plotly figure.

        The bytes are those saved for backward, of states and of the rule.

        Raises: ValueError without the extra `report`.
        """
        plotly = _import("plotly.graph_objects", "the figure")
        points = plotly.Scatter(
            x=[1e3 * cost.compute_s for cost in self.costs],
            y=[cost.all_bytes / 1e6 for cost in self.costs],
            text=[cost.rule for cost in self.costs],
            mode="markers+text",
            textposition="top center",
            marker={
                "color": [
                    nan if self.fidelity is None else self.fidelity.lowest(cost.rule)[1]
                    for cost in self.costs
                ],
                "cmin": 0,
                "cmax": 1,
                "size": 12,
                "showscale": True,
                "colorbar": {"title": "lowest cosine of a layer"},
            },
        )
        return plotly.Figure(points).update_layout(
            title=self.network,
            xaxis_title="forward and backward, ms",
            yaxis_title="memory, MB",
        )


def compare(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int | None = None,
    rules: Sequence[Rule] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    over_time: OverTime = "steps",
    memory: int | None = None,
    rounds: int = ROUNDS,
) -> Comparison:
    """Measure the memory, time and gradients of rules on one batch.

    Rules are tried on copies of the network in training mode. Neither `network` nor the state of
    torch's random generators changes. As in a run, the process keeps freed memory from now on.
    Times depend on the process's threads (`torch.set_num_threads`); a run's worker on a CPU has 1.

    Args:
        network: maps `[T, B, ...]` to logits `[T, B, K]`. It is on the device of `x` and `y`.
        x: the input `[T, B, ...]`, or with `steps` one frame `[B, ...]`.
        y: the targets; without `loss`, classes 0..K-1 as int64 `[B]`.
        steps: the number of time steps at which the frame is repeated.
        rules: rules that are not attached; None: those of `pipeline.rules`. BPTT is always added.
        loss: maps logits `[B, K]` and `y` to the mean over the batch; None: cross entropy.
        over_time: as for `Rule.attach`.
        memory: estimate the largest batch that fits into so many bytes, without an optimizer's
            state; None: do not.
        rounds: the number of rounds in which rules alternate to compare their times.

    Raises: ValueError if an argument does not fit, or no rule can train the network.
    """
    refuse_unless_counts("compare", {"rounds": rounds, "memory": 1 if memory is None else memory})
    refuse_unless_one_of("compare", ("steps", "mean"), over_time=over_time)
    require(
        isinstance(x, Tensor) and isinstance(y, Tensor) and min(x.dim(), y.dim()) >= 1,
        f"compare: x and y must be tensors with an axis B; got {type(x).__name__} and"
        f" {type(y).__name__}",
    )
    x_TB = x if steps is None else repeat(x, steps)
    require(
        x_TB.dim() >= 3 and x_TB.shape[1] == len(y) >= (1 if memory is None else 2),
        "compare: x must be time first, [T, B, ...], or one frame [B, ...] with steps=T, and y must"
        " have B targets, at least 1, or 2 with memory;"
        f" got x {tuple(x.shape)}, steps={steps}, y {tuple(y.shape)}, memory={memory}",
    )
    labelled = _by_label(rules)
    criterion: Any = (
        CrossEntropy()
        if loss is None
        else lambda target_B, _=None: lambda logits_BK: loss(logits_BK, target_B)
    )
    keep_freed_memory()  # as in a run, whose times it shortens
    with torch.enable_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        (copied, classes), largest = _copy(network, x_TB), {}
        require(
            loss is not None
            or (y.dtype == torch.int64 and y.dim() == 1 and 0 <= y.min() <= y.max() < classes),
            f"compare: without loss, y must be classes 0..{classes - 1} as int64 [B]; got"
            f" {y.dtype} {[*y.shape]} from {y.min()} to {y.max()}",
        )
        bench = _bench(copied, x_TB, y, criterion, over_time)
        measured = measure("compare", bench, labelled, rounds)
        if memory is not None:
            held = held_bytes(copied, torch.optim.SGD(copied.parameters()))
            half = len(y) // 2
            half_bench = _bench(copied, x_TB[:, :half], y[:half], criterion, over_time)
            search = LargestBatch(bench, half_bench, memory, held)
            largest = {
                cost.rule: search.estimate(cost, labelled[cost.rule]) for cost in measured.costs
            }
    return Comparison(
        network=type(network).__name__, memory=memory, largest_batch=largest, **vars(measured)
    )


def _by_label(rules: Sequence[Rule] | None) -> dict[str, Spec]:
    if rules is None:
        return {rule.build().label: rule for rule in RULES}
    require(
        isinstance(rules, Sequence)
        and all(isinstance(rule, Rule) for rule in rules)
        and len({rule.label for rule in rules}) == len(rules),
        "compare: rules must be a list of rules with different labels, such as [SLTT(), SLTT(k=1)];"
        f" got {' '.join(repr(rules).split())}",
    )
    return {BASELINE: spec(BPTT)} | {rule.label: spec(copy.deepcopy, x=rule) for rule in rules}


def _copy(network: nn.Module, x_TB: Tensor) -> tuple[nn.Module, int]:
    """A copy in training mode, without gradients, and the number of its outputs.

    One forward pass checks another copy.
    """
    require(
        getattr(network, "attached_rule", None) is None,
        "compare: the network must not be attached to a rule; release it from"
        f" {getattr(network, 'attached_rule', None)}",
    )
    require(
        named_neurons(network),
        "compare: the network must have neurons of pipeline.spiking; got none in"
        f" {type(network).__name__}: wrap(network) makes them from those of SpikingJelly, snnTorch"
        " or norse",
    )
    require(
        any(parameter.requires_grad for parameter in network.parameters()),
        "compare: the network must have a parameter with requires_grad; all of"
        f" {type(network).__name__} are frozen",
    )
    copied = copy.deepcopy(network, copies_without_graph(network)).train()
    copied.zero_grad()
    tried = copy.deepcopy(copied)
    try:
        with torch.no_grad(), fresh_state(tried):
            logits_TBK = tried(x_TB)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"compare: the network must take x as {x_TB.dtype} {[*x_TB.shape]}; got"
            f" {type(error).__name__}: {error}".partition("\n")[0]
        ) from error
    shape = getattr(logits_TBK, "shape", ())
    require(
        len(shape) == 3 and shape[:2] == x_TB.shape[:2],
        "compare: the network must map x [T, B, ...] to logits [T, B, K]; got"
        f" {f'shape {tuple(shape)}' if shape else type(logits_TBK).__name__} for x"
        f" {tuple(x_TB.shape)}",
    )
    return copied, logits_TBK.shape[2]


def _bench(
    network: nn.Module, x_TB: Tensor, y: Tensor, criterion: Any, over_time: OverTime
) -> BatchBench:
    # On tensors of its own, because a view that is saved counts with its whole storage.
    own_x_TB = (
        repeat(frame_of(x_TB).clone(), len(x_TB))
        if is_static(x_TB)
        else x_TB.clone(memory_format=torch.contiguous_format)
    )
    return BatchBench(network, own_x_TB, y.clone(), criterion, over_time=over_time)


def _import(module: str, part: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"compare: {part} needs {error.name}, which is not installed: pip install"
            " 'spiketrain[report]'"
        ) from error

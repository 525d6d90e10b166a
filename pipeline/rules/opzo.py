"""Online Pseudo-Zeroth-Order training: learnt matrices carry errors to hidden layers.

The matrices are learnt from noise.
"""

# T time, B batch, N units of a layer, K outputs, L hidden layers

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import are_counts, refuse_unless_one_of, require
from pipeline.core.random import counter_hash
from pipeline.rules.base import (
    LossOf,
    LossTerm,
    OverTime,
    Rule,
    World,
    detach_between_steps,
    slice_loss,
    slices,
)
from pipeline.spiking.error_feedback import ErrorFeedback, FixedRandom, MeanJacobian, SinglePoint
from pipeline.spiking.local_learning import (
    Inject,
    LocalGradient,
    Readout,
    inject_gradients,
    refuse_skip_connections,
)
from pipeline.spiking.neuron import LIF, named_neurons
from pipeline.spiking.noise import DISTRIBUTIONS, Distribution
from pipeline.spiking.state import attribute_set, fresh_state
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.spiking.trace import (
    Trace,
    refuse_batch_norm,
    running_order,
    shared_decay,
    traceable_synapses,
)

Feedback = Literal["momentum", "random", "single_point"]
NAMES = {"momentum": "OPZO", "random": "OPZO-DFA", "single_point": "OPZO-ZO"}
NOISE = 0.2


class OPZO(Rule):
    """OPZO and its two baselines: DFA (`feedback="random"`) and ZO (`feedback="single_point"`).

        out[t] = s[t] + alpha z[t]      in every hidden layer, z ~ N(0, 1)
        o[t]                            the logits of this one noisy forward
        e[t]   = dL[t]/do[t]            the output error of each sample
        g[t]   = M e[t] / (1 - lam^k)   the signal to a hidden layer; M of N x K, after k batches
        grad W = 1/T sum_t (psi(u[t]) g[t]) a[t]^T      three local factors
        a[t]   = decay a[t-1] + x[t]
        M     <- lam M + (1 - lam) mean of z[t] o[t]^T / alpha
                                        after each global batch, over its samples and steps

    M estimates the mean Jacobian E[do/ds]^T. With task-specific heads it starts anew for each head.
    No gradient passes to the layer below. The readout learns from e itself. Neurons, traces and
    losses are those of OTTT. "random": M is drawn once, with independent entries of variance 1/K.
    "single_point": g = z (o^T e) / alpha, from the one sample and step.

    Args:
        noise: alpha, in spikes (`inject="spikes"`, the default) or in units of the membrane
            (`"membrane"`: the noise decides on the spike and is not carried to the next step).
            None: 0.2 if the feedback is learnt from noise, 0 for "random". Without noise, its other
            settings are refused.
        distribution: of z, "gaussian" (the default) or "rademacher".
        momentum: lam, for "momentum" only; 0.999 by default.
        antithetic: every second time step uses the negative noise of the step before (the default,
            without effect at T = 1; if set there, it is refused).
        local_readouts: OPZO+LL. Each hidden layer also learns from the loss of its own linear
            readout, a `Readout` of the model (`models/transforms.py`), whose weights learn from
            that loss alone.
        intermediate: IGL. The indices of hidden layers, from 0, whose readouts send their errors to
            all layers below too. For the layers below, M has K columns for each of them and K for
            the output. The layer itself learns from its readout's loss.
        decay: of the traces; must equal the neurons' shared decay. None takes it from the model.

    Each z is a pure function of (seed, step, row, layer, time). `loss_of` is also called on each
    readout's logits, after the output's. A loss with memory between calls does not support
    readouts.

    There is no public code. The paper gives the noise, M's average, g, the three factors,
    antithetic pairs, and the ideas of both extensions. These are our choices: M starts at 0 and is
    bias-corrected as in Adam; it is updated once per global batch, not per step; with noise on the
    membrane, psi is taken at u + alpha z; IGL's errors and LL's losses have weight 1; readouts
    average over regions; the variance of DFA.

    Raises: ValueError for arguments out of range (when made); for a loss over mean logits, no
    neurons, several or learnt decays, batch norm, weight layers of torch, missing readouts
    (`attach`); for a skip connection around the neurons, which would carry gradients, layers that
    run twice in a step or change their size (`loss_terms`); for antithetic=True at T = 1
    (`check_steps`).
    Source: Xiao et al. 2024 (OPZO, arXiv 2407.12516); Noekland 2016 (DFA, arXiv 1609.01596).
    """

    memory = "constant"
    backpropagates_errors = False
    chunk = 1

    def __init__(
        self,
        feedback: Feedback = "momentum",
        *,
        noise: float | None = None,
        distribution: Distribution | None = None,
        inject: Inject | None = None,
        momentum: float | None = None,
        antithetic: bool | None = None,
        local_readouts: bool = False,
        intermediate: Sequence[int] = (),
        decay: float | None = None,
    ) -> None:
        super().__init__()
        refuse_unless_one_of("OPZO", tuple(NAMES), feedback=feedback)
        refuse_unless_one_of("OPZO", (*DISTRIBUTIONS, None), distribution=distribution)
        refuse_unless_one_of("OPZO", ("spikes", "membrane", None), inject=inject)
        if noise is None:
            noise = 0.0 if feedback == "random" else NOISE
        require(
            0 <= noise < math.inf and (noise != 0 or feedback == "random"),
            "OPZO: noise must be > 0, because the feedback is learnt from it; got"
            f" noise={noise}, {feedback=}",
        )
        inert = {} if feedback == "momentum" else {"momentum": momentum}
        if noise == 0:
            inert |= {"distribution": distribution, "inject": inject, "antithetic": antithetic}
        for name, value in inert.items():
            require(
                value is None,
                f"OPZO: {name} has no effect with {feedback=} and noise={noise}; got"
                f" {name}={value!r}",
            )
        momentum = 0.999 if momentum is None else momentum
        require(
            0 <= momentum < 1,
            f"OPZO: momentum must be at least 0 and below 1; got momentum={momentum}",
        )
        require(
            intermediate in ((), [])
            or (are_counts(intermediate) and list(intermediate) == sorted(set(intermediate))),
            "OPZO: intermediate must be increasing indices of hidden layers, 1 or more, because"
            f" no layer is below layer 0; got intermediate={intermediate!r}",
        )
        self.feedback = feedback
        self.noise = noise
        self.adds_noise = noise > 0
        self.distribution: Distribution = distribution or "gaussian"
        self.inject: Inject = inject or "spikes"
        self.antithetic = antithetic
        self.local_readouts = local_readouts
        self.intermediate = tuple(intermediate)
        self.one_loss_per_step = not (local_readouts or intermediate)
        self.decay = decay
        self.signals: ErrorFeedback = {
            "momentum": lambda: MeanJacobian(momentum=momentum, scale=noise),
            "random": FixedRandom,
            "single_point": lambda: SinglePoint(scale=noise),
        }[feedback]()
        self._layers: list[LocalGradient] = []
        self._paths_are_known = False
        self.label = NAMES[feedback] + "-LL" * local_readouts + "-IGL" * bool(intermediate)

    def attach(
        self, model: nn.Module, *, world: World = World(), over_time: OverTime = "steps"
    ) -> None:
        refuse_batch_norm(self.label, model)
        decay = shared_decay(self.label, model, self.decay)
        _, *synapses = self._synapses_of(model).values()
        readouts = self._readouts_of(model)
        super().attach(model, world=world, over_time=over_time)
        self.signals.reset(next(model.parameters()).device)
        if isinstance(self.signals, FixedRandom):
            self.signals.key_of = partial(counter_hash, world.seed, _MATRIX)
        self._paths_are_known = False
        detach_between_steps(self, model)
        # The first synapse sees the data and has no trace, as published for OTTT.
        for synapse in synapses:
            self.set_seam(synapse, "presynaptic", Trace(decay))
        for index, (_, neuron) in enumerate(named_neurons(model)):
            layer = LocalGradient(
                scale=self.noise,
                inject=self.inject,
                distribution=self.distribution,
                readout=readouts.get(index),
            )
            self._layers.append(layer)
            self.set_seam(neuron, "gradient", layer)

    def check_steps(self, steps: int) -> None:
        super().check_steps(steps)
        require(
            not self.antithetic or steps >= 2,
            "OPZO: antithetic pairs need two time steps, so T must be >= 2; got"
            f" antithetic=True, T={steps}",
        )

    def start_task(self, model: nn.Module, task: int) -> None:
        if task > 0 and any(getattr(module, "has_task_heads", False) for module in model.modules()):
            self.signals.reset(self.signals.device)  # the Jacobian of a new head is unknown

    def release(self) -> None:
        super().release()
        self._layers.clear()

    def begin_batch(self) -> None:
        self.signals.discard()

    def end_of_batch(self) -> None:
        self.signals.end_of_batch(self.world.mean)

    def extra_bytes(self) -> int:
        return self.signals.pending_bytes()

    def _loss_terms(
        self, model: nn.Module, x_TB: Tensor, loss_of: LossOf, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        with fresh_state(model):
            for t, x_1B in enumerate(slices(x_TB, 1)):
                # The second step of an antithetic pair has the negative noise of the first.
                drawn, sign = (t, 1.0) if self.antithetic is False else (t // 2 * 2, (-1.0) ** t)
                for index, layer in enumerate(self._layers if self.noise else ()):
                    layer.sign = sign
                    layer.keys = [
                        counter_hash(self.world.seed, step, row, index, drawn) for row in rows
                    ]
                with attribute_set(self._layers, "is_open", True):
                    logits_1BK = (
                        model(x_1B) if self._paths_are_known else self._checked(model, x_1B)
                    )
                yield self._loss_term(logits_1BK, loss_of, len(x_TB))

    def _loss_term(self, logits_1BK: Tensor, loss_of: LossOf, steps: int) -> LossTerm:
        """The loss term of one step.

        Each output receives its own error. Each hidden layer receives the signal computed from the
        errors.
        """
        loss, share_BK, e_BK = _loss_and_error(logits_1BK, loss_of, steps)
        readouts = {
            index: layer.recorded("logits")
            for index, layer in enumerate(self._layers)
            if layer.readout is not None
        }
        errors = {
            index: _loss_and_error(local_1BK, loss_of, steps)[2]
            for index, local_1BK in readouts.items()
        }
        ends, signals = [logits_1BK, *readouts.values()], [e_BK, *errors.values()]
        for index, layer in enumerate(self._layers):
            s_1B = layer.recorded("spikes")
            above = [place for place in self.intermediate if place > index]
            g_BN = self.signals.signal(
                index,
                s_1B[0, 0].numel(),
                e_BK=_columns([*(errors[place] for place in above), e_BK], s_1B.dtype),
                o_BK=_columns([*(readouts[place] for place in above), logits_1BK], s_1B.dtype),
                z_BN=layer.recorded("z") if self.noise else None,
            )
            ends.append(s_1B)
            signals.append(g_BN.view_as(s_1B))
        return LossTerm(backward=inject_gradients(loss, ends, signals), loss=loss, logits=share_BK)

    # --------------------------------------------------------------------------------------- checks

    def _synapses_of(self, model: nn.Module) -> dict[str, Linear | Conv2d]:
        """The synapses that hold traces, which excludes those of readouts."""
        readouts = {id(module.linear) for module in model.modules() if isinstance(module, Readout)}
        return {
            name: synapse
            for name, synapse in traceable_synapses(self.label, model).items()
            if id(synapse) not in readouts
        }

    def _readouts_of(self, model: nn.Module) -> dict[int, Readout]:
        """The readouts in use, by the index of their hidden layer."""
        place, readouts = -1, {}
        for module in model.modules():
            if isinstance(module, LIF):
                place += 1
            elif isinstance(module, Readout):
                readouts[place] = module
        wanted = range(place + 1) if self.local_readouts else self.intermediate
        lacking = [index for index in wanted if index not in readouts]
        require(
            not lacking,
            f"{self.label}: the model must have a Readout behind each hidden layer that learns"
            f" from one (models/transforms.py); got none at layer"
            f" {', '.join(map(str, lacking))} of 0..{place}",
        )
        return {index: readouts[index] for index in wanted}

    def _checked(self, model: nn.Module, x_1B: Tensor) -> Tensor:
        """The logits of the first step, after a check that only neurons connect the layers."""
        network = self._attached[0]
        synapses = self._synapses_of(network)
        neurons = dict(named_neurons(network))
        with running_order(synapses) as ran, running_order(neurons) as fired:
            logits_1BK = model(x_1B)
        twice = [name for name in (*synapses, *neurons) if ran.count(name) + fired.count(name) > 1]
        require(
            not twice,
            f"{self.label}: a layer must run once in a time step, because it takes one signal;"
            f" got {', '.join(twice)} twice",
        )
        require(
            ran[0] == next(iter(synapses)),
            f"{self.label}: the first synapse in order of registration must run first, because"
            f" it has no trace; got {ran[0]} before {next(iter(synapses))}",
        )
        ends = dict(zip(neurons, (layer.recorded("spikes") for layer in self._layers), strict=True))
        refuse_skip_connections(self.label, network, {**ends, "the output": logits_1BK})
        self._paths_are_known = True
        return logits_1BK


def _loss_and_error(
    logits_1BK: Tensor, loss_of: LossOf, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A step's part of the loss and of the logits, and dloss/dlogits.

    The gradient is taken on a leaf: DeepSpeed 0.19.8 treats any gradient through its engine's
    output as a backward of its own.
    """
    leaf_1BK = logits_1BK.detach().requires_grad_()
    with torch.enable_grad():
        loss, share_BK = slice_loss(leaf_1BK, loss_of, steps=steps)
    (e_1BK,) = torch.autograd.grad(loss, leaf_1BK)
    return loss.detach(), share_BK, e_1BK


def _columns(parts_1BK: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part_1BK.detach()[0] for part_1BK in parts_1BK], dim=1).to(dtype)


_MATRIX = 0x4D  # purpose of a random draw; its keys differ from all (seed, step, row, layer, time)

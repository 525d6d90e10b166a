"""Online Pseudo-Zeroth-Order training: learnt matrices map the output error to hidden layers."""

# T time, B batch, N units of a layer, K outputs

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.core.checks import are_counts, refuse_unless_one_of, require
from pipeline.core.random import counter_hash, hash_on_device
from pipeline.rules.base import (
    LossFn,
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
from pipeline.spiking.state import fresh_state, set_temporarily
from pipeline.spiking.synapse import Conv2d, Linear
from pipeline.spiking.trace import (
    Trace,
    refuse_batch_norm,
    running_order,
    shared_decay,
    traceable_synapses,
)

Feedback = Literal["momentum", "random", "single_point"]
LABELS = {"momentum": "OPZO", "random": "OPZO-DFA", "single_point": "OPZO-ZO"}
DEFAULT_NOISE = 0.2


class OPZO(Rule):
    """OPZO and its two baselines: DFA (`feedback="random"`) and ZO (`feedback="single_point"`).

        out[t] = s[t] + alpha z[t]      in every hidden layer, z ~ N(0, 1)
        o[t]                            the logits of this one noisy forward
        e[t]   = dL[t]/do[t]            the output error of each sample
        g[t]   = M e[t] / (1 - lam^k)   the signal to a hidden layer after k batches; M is N x K
        grad W = 1/T sum_t (psi(u[t]) g[t]) a[t]^T      three local factors
        a[t]   = decay a[t-1] + x[t]
        M     <- lam M + (1 - lam) mean of z[t] o[t]^T / alpha
                                        after each global batch, over its samples and steps

    M estimates the transposed mean Jacobian E[do/ds]^T from the noise. With task-specific heads M
    is reset at the start of each later task. No gradient passes to the layer below. The output
    layer uses e itself. Neurons, traces and losses are those of OTTT. psi is the derivative of the
    surrogate.

    Args:
        feedback: "momentum" is OPZO. "random": M is drawn once, with independent entries of
            variance 1/K. "single_point": g = z (o^T e) / alpha, from each sample and step alone.
        noise: alpha, in spikes or in units of the membrane (see `inject`); None: 0 for "random",
            otherwise 0.2. At 0, the other arguments of the noise must not be set.
        distribution: the distribution of z, "gaussian" (default) or "rademacher".
        inject: "spikes" (default) adds noise to the spikes. "membrane" adds it to the membrane,
            where it only changes the spike of its own step.
        momentum: lam, for "momentum" only; 0.999 by default.
        antithetic: whether every second time step uses the negative noise of the step before it.
            The default is True for T > 1. True is refused at T = 1.
        local_readouts: OPZO+LL. Each hidden layer also learns from the loss of its own linear
            readout, a `Readout` of the model (`models/transforms.py`). The weights of the readout
            learn only from this loss.
        intermediate: IGL. The indices of hidden layers (from 0) with a readout that sends its error
            to all layers below. M of a layer has K columns for each of these readouts above the
            layer, and K for the output. The hidden layer itself also learns from the loss of its
            readout.
        decay: the decay of the traces, which must be the decay of all neurons; None: taken from the
            model.

    Each z is a pure function of (seed, step, row, layer, time step). `loss_fn` is called with the
    logits of the network, and then with the logits of each readout. So a loss with memory between
    calls cannot be used with readouts.

    There is no public code. The paper describes the noise, the average in M, g, the three factors,
    antithetic pairs, and the ideas of both extensions. These are our choices: M starts at 0 and is
    bias-corrected as in Adam; M is updated once per global batch, not per step; with noise on the
    membrane, psi is taken at u + alpha z; errors of IGL and losses of LL have weight 1; readouts
    average over regions; the variance of DFA.

    Raises: ValueError for arguments out of range or without effect (`__init__`); for a loss over
    mean logits, no neurons, different or learnt decays, a `decay` that differs from the neurons',
    batch norm, linear layers and convolutions of torch, or missing readouts (`attach`); for a skip
    connection around the neurons, a layer that runs twice in a step, a first synapse that does not
    run first, or a layer that changes its size (`loss_terms`); for antithetic=True at T = 1
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
        refuse_unless_one_of("OPZO", tuple(LABELS), feedback=feedback)
        refuse_unless_one_of("OPZO", (*DISTRIBUTIONS, None), distribution=distribution)
        refuse_unless_one_of("OPZO", ("spikes", "membrane", None), inject=inject)
        if noise is None:
            noise = 0.0 if feedback == "random" else DEFAULT_NOISE
        require(
            0 <= noise < math.inf and (noise != 0 or feedback == "random"),
            "OPZO: noise must be finite and > 0 (>= 0 with feedback='random'); got"
            f" noise={noise}, {feedback=}",
        )
        unused = {} if feedback == "momentum" else {"momentum": momentum}
        if noise == 0:
            unused |= {"distribution": distribution, "inject": inject, "antithetic": antithetic}
        for name, value in unused.items():
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
            "OPZO: intermediate must be increasing indices >= 1 of hidden layers, because layer 0"
            f" has no hidden layer below it; got intermediate={intermediate!r}",
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
        self.signals = _signals(feedback, momentum=momentum, noise=noise)
        self._layers: list[LocalGradient] = []
        self._are_paths_checked = False
        self.label = (
            LABELS[feedback] + ("-LL" if local_readouts else "") + ("-IGL" if intermediate else "")
        )

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
        self._are_paths_checked = False
        detach_between_steps(self, model)
        # The first synapse, whose input is the data, has no trace, as published for OTTT.
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
            self.set_seam(neuron, "custom_forward", layer)

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
        self, model: nn.Module, x_TB: Tensor, loss_fn: LossFn, step: int, rows: Sequence[int]
    ) -> Iterator[LossTerm]:
        keys_TLB = self._keys(x_TB, step, rows) if self.noise else None
        with fresh_state(model):
            for t, x_1B in enumerate(slices(x_TB, 1)):
                is_second = self.antithetic is not False and t % 2 == 1
                for index, layer in enumerate(self._layers):
                    layer.sign = -1.0 if is_second else 1.0
                    layer.keys_B = None if keys_TLB is None else keys_TLB[t, index]
                with set_temporarily(self._layers, "is_open", True):
                    logits_1BK = (
                        model(x_1B) if self._are_paths_checked else self._checked(model, x_1B)
                    )
                yield self._loss_term(logits_1BK, loss_fn, len(x_TB))

    def _keys(self, x_TB: Tensor, step: int, rows: Sequence[int]) -> Tensor:
        """The keys of all noise of a batch: of every time step, layer and sample.

        The second step of an antithetic pair has the key of the first.
        """
        count = partial(torch.arange, device=x_TB.device)
        steps_T = count(len(x_TB))
        if self.antithetic is not False:
            steps_T = steps_T - steps_T % 2
        rows_B = (
            count(rows.start, rows.stop) if isinstance(rows, range) else steps_T.new_tensor(rows)
        )
        layers_L1 = count(len(self._layers)).view(-1, 1)
        return hash_on_device(self.world.seed, step, rows_B, layers_L1, steps_T.view(-1, 1, 1))

    def _loss_term(self, logits_1BK: Tensor, loss_fn: LossFn, steps: int) -> LossTerm:
        """The loss term of one step.

        The network's logits, and the logits of each readout, receive their own error. Each hidden
        layer receives its signal.
        """
        loss, logits_BK, e_1BK = _loss_and_error(logits_1BK, loss_fn, steps)
        readout_logits = {
            index: layer.recorded("logits")
            for index, layer in enumerate(self._layers)
            if layer.readout is not None
        }
        readout_errors = {
            index: _loss_and_error(local_1BK, loss_fn, steps)[2]
            for index, local_1BK in readout_logits.items()
        }
        outputs, signals = [logits_1BK, *readout_logits.values()], [e_1BK, *readout_errors.values()]
        for index, layer in enumerate(self._layers):
            s_1B = layer.recorded("spikes")
            above = [other for other in self.intermediate if other > index]
            errors = [*(readout_errors[other] for other in above), e_1BK]
            logits = [*(readout_logits[other] for other in above), logits_1BK]
            g_BN = self.signals.signal(
                index,
                s_1B[0, 0].numel(),
                e_BK=_columns(errors, s_1B.dtype),
                o_BK=_columns(logits, s_1B.dtype),
                z_BN=layer.recorded("z") if self.noise else None,
            )
            outputs.append(s_1B)
            signals.append(g_BN.view_as(s_1B))
        return LossTerm(
            backward=inject_gradients(loss, outputs, signals), loss=loss, logits=logits_BK
        )

    # --------------------------------------------------------------------------------------- checks

    def _synapses_of(self, model: nn.Module) -> dict[str, Linear | Conv2d]:
        readouts = {id(module.linear) for module in model.modules() if isinstance(module, Readout)}
        return {
            name: synapse
            for name, synapse in traceable_synapses(self.label, model).items()
            if id(synapse) not in readouts
        }

    def _readouts_of(self, model: nn.Module) -> dict[int, Readout]:
        """The readouts that the rule uses, by the index of their hidden layer.

        Raises: ValueError if the model has no `Readout` at one of these layers.
        """
        layer = -1
        readouts: dict[int, Readout] = {}
        for module in model.modules():
            if isinstance(module, LIF):
                layer += 1
            elif isinstance(module, Readout):
                readouts[layer] = module
        required = range(layer + 1) if self.local_readouts else self.intermediate
        missing = [index for index in required if index not in readouts]
        require(
            not missing,
            f"{self.label}: the model must have a Readout after each hidden layer that learns from"
            f" its own loss (models/transforms.py); got none at layer"
            f" {', '.join(map(str, missing))} of 0..{layer}",
        )
        return {index: readouts[index] for index in required}

    def _checked(self, model: nn.Module, x_1B: Tensor) -> Tensor:
        """The logits of the first step, after a check of the order and the connections of layers.

        Raises: ValueError for a layer that runs twice, a first synapse that does not run first, or
        a skip connection around the neurons.
        """
        network = self._attached[0]
        synapses = self._synapses_of(network)
        neurons = dict(named_neurons(network))
        with running_order({**synapses, **neurons}) as order:
            logits_1BK = model(x_1B)
        twice = [name for name in (*synapses, *neurons) if order.count(name) > 1]
        require(
            not twice,
            f"{self.label}: a layer must run once in a time step, because it has one signal per"
            f" step; got {', '.join(twice)} twice",
        )
        synapse_order = [name for name in order if name in synapses]
        require(
            synapse_order[0] == next(iter(synapses)),
            f"{self.label}: the first synapse in order of registration must run first, because"
            f" it has no trace; got {synapse_order[0]} before {next(iter(synapses))}",
        )
        spikes = {
            name: layer.recorded("spikes")
            for name, layer in zip(neurons, self._layers, strict=True)
        }
        refuse_skip_connections(self.label, network, {**spikes, "the output": logits_1BK})
        self._are_paths_checked = True
        return logits_1BK


def _signals(feedback: Feedback, *, momentum: float, noise: float) -> ErrorFeedback:
    if feedback == "random":
        return FixedRandom()
    if feedback == "single_point":
        return SinglePoint(scale=noise)
    return MeanJacobian(momentum=momentum, scale=noise)


def _loss_and_error(
    logits_1BK: Tensor, loss_fn: LossFn, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the logits of one step, both divided by `steps`, and the error dloss/dlogits.

    The error is the gradient of a detached copy of the logits, because DeepSpeed 0.19.8 mistakes a
    gradient through the output of its engine for a backward of the engine.
    """
    leaf_1BK = logits_1BK.detach().requires_grad_()
    with torch.enable_grad():
        loss, logits_BK = slice_loss(leaf_1BK, loss_fn, steps=steps)
    (e_1BK,) = torch.autograd.grad(loss, leaf_1BK)
    return loss.detach(), logits_BK, e_1BK


def _columns(parts_1BK: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part_1BK.detach()[0] for part_1BK in parts_1BK], dim=1).to(dtype)


# The purpose in the keys of random matrices. These keys differ from all keys of the noise.
_MATRIX = 0x4D

"""The recipe of a training run: one frozen value. Its buildable parts are `Spec`s.

A recipe names its parts by the Python objects themselves. There is no registry. A misspelt keyword
fails at its own line of the recipe. This module and its imports need only the standard library.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import math
import os
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.core.checks import require
from pipeline.core.errors import remedy
from pipeline.core.files import is_name
from pipeline.recipe import own_code
from pipeline.recipe.json import (
    RECIPE_FILE,
    check_format,
    decode,
    encode,
    flat,
    read_json,
    write_json,
)
from pipeline.recipe.phases import Phase, check_phases
from pipeline.recipe.spec import (
    Spec,
    admits,
    arguments_of,
    is_path,
    keywords_text,
    referred,
    spec,
    type_hints,
    type_name,
)

__all__ = [
    "Checkpointing",
    "Evaluation",
    "Phase",
    "Policy",
    "Recipe",
    "Role",
    "Spec",
    "Split",
    "read_json",
    "roles",
    "select",
    "spec",
    "write_json",
]

# Names that recipe.json may import, see `is_trusted`. Building a part reads and writes no file.
# Teachers are the exception: they read weights, so each teacher is listed by its own name.
TRUSTED = (
    "pipeline.data.datasets",
    "pipeline.data.mixing",
    "pipeline.models",
    "!pipeline.models.teachers",
    "!pipeline.spiking.kernels",
    "pipeline.models.teachers.cache.Cache",
    "pipeline.models.teachers.network.network_teacher",
    "pipeline.models.teachers.probe.Probe",
    "pipeline.models.teachers.timm.timm_teacher",
    "pipeline.models.teachers.weights.File",
    "pipeline.models.teachers.weights.Hub",
    "pipeline.models.teachers.weights.Package",
    "pipeline.models.teachers.weights.Untrained",
    "pipeline.recipe.phases",
    "pipeline.rules",
    "pipeline.spiking",
    "pipeline.train.distillation",
    "pipeline.train.objective",
    "pipeline.train.schedule",
    "torch.nn.modules",
    "timm.optim._optim_factory.create_optimizer_v2",
)

FORMAT = 2


class Role(enum.Flag):
    """The roles of a field of a recipe. No field has both `STUDY` and `PER_RUN`."""

    STUDY = enum.auto()  # all runs of one study have the same value; the study key covers it
    PER_RUN = enum.auto()  # runs of one study may have different values
    PER_ATTEMPT = enum.auto()  # attempts of one run may have different values
    TAG = enum.auto()  # a tag in MLflow, by which runs can be searched


def _role(role: Role, *, minimum: float | None = None) -> dict[str, Any]:
    """The metadata of a field. `minimum` is the smallest accepted value."""
    return {"role": role, "minimum": minimum}


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """A frozen value that checks the types and lower bounds of its own fields."""

    prefix: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for each in dataclasses.fields(self):
            value, name = getattr(self, each.name), self.prefix + each.name
            if not admits(hints[each.name], value):
                raise ValueError(
                    f"recipe: {name} must be {type_name(hints[each.name])}; got {value!r}"
                )
            minimum = each.metadata.get("minimum")
            require(
                minimum is None or value is None or value >= minimum,
                f"recipe: {name} must be at least {minimum}; got {value}",
            )


@dataclass(frozen=True, kw_only=True)
class Policy(_Fields):
    """The handling of bad batches and of workers whose weights differ.

    Fields:
        skip: ranges (first, end) of global batches that are not trained on; batches are counted
            from 0, and `end` is excluded
        loss_spike: a batch is bad if its loss exceeds this many times the median of the task's last
            64 good losses. 0: a batch is bad only if its loss or a gradient is not finite.
        max_skips: bad batches in a row that are skipped before the run goes back to its newest
            checkpoint (pipeline/train/guards/anomaly.py)
        max_rollbacks: number of times that a run goes back to a checkpoint before it ends as
            diverged
        replicas_every: steps between bitwise comparisons of the workers' weights. The weights are
            also compared at each checkpoint. 0: no comparison at all

    Raises: ValueError that names the field.
    """

    prefix = "policy."

    skip: tuple[tuple[int, int], ...] = field(default=(), metadata=_role(Role.STUDY))
    loss_spike: float = field(default=0.0, metadata=_role(Role.STUDY))
    max_skips: int = field(default=3, metadata=_role(Role.STUDY, minimum=0))
    max_rollbacks: int = field(default=2, metadata=_role(Role.PER_ATTEMPT, minimum=0))
    replicas_every: int = field(default=500, metadata=_role(Role.PER_ATTEMPT))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            all(0 <= first < end for first, end in self.skip),
            "recipe: policy.skip must be pairs of batches (first, end) with 0 <= first < end; got"
            f" {self.skip!r}",
        )
        require(
            not self.loss_spike or self.loss_spike > 1,
            f"recipe: policy.loss_spike must be 0 or above 1; got {self.loss_spike}",
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Fields):
    """When a run is evaluated, and on how many samples.

    Fields:
        every: epochs between evaluations. The last epoch (of each phase) is always evaluated. 0: no
            other epoch, so that the test set is read once
        samples: evaluate on this many samples, for smoke runs; None: on all
        fidelity_every: epochs between comparisons of the rule's gradient with BPTT's on the first
            batch. One more comparison takes place at the start. 0: none
    """

    prefix = "evaluation."

    every: int = field(default=1, metadata=_role(Role.STUDY, minimum=0))
    samples: int | None = field(default=None, metadata=_role(Role.STUDY, minimum=1))
    fidelity_every: int = field(default=0, metadata=_role(Role.PER_RUN, minimum=0))


@dataclass(frozen=True, kw_only=True)
class Checkpointing(_Fields):
    """When checkpoints are written and how many are kept.

    Fields:
        every: steps between checkpoints; 0: none by steps. Each epoch also ends with a checkpoint
        minutes: longest time between checkpoints, in minutes; 0: no limit
        keep: number of newest checkpoints that are kept, besides the best one
    """

    prefix = "checkpoints."

    every: int = field(default=0, metadata=_role(Role.PER_ATTEMPT, minimum=0))
    minutes: float = field(default=10.0, metadata=_role(Role.PER_ATTEMPT, minimum=0))
    keep: int = field(default=2, metadata=_role(Role.PER_ATTEMPT, minimum=1))


@dataclass(frozen=True)
class Split:
    """How one global batch is divided: `batch_size = workers * micro_batch * accumulation`."""

    workers: int
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, batch_size: int, *, workers: int, most: int | None) -> "Split":
        """The split with the fewest accumulated micro-batches.

        Args:
            most: largest micro-batch in samples; None: a worker's whole share is one micro-batch.

        Raises:
            ValueError: the batch does not divide; the message names the nearest sizes that do.
        """
        share, rest = divmod(batch_size, workers)
        if rest or share == 0:
            nearest = sorted({max(1, share) * workers, (share + 1) * workers})
            raise ValueError(
                f"recipe: batch_size must be divisible by {workers} workers; got {batch_size}; the"
                f" nearest sizes are {' and '.join(map(str, nearest))}"
            )
        largest = share if most is None else min(most, share)
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
        return cls(workers, micro, share // micro)


@dataclass(frozen=True, kw_only=True)
class Recipe(_Fields):
    """Everything that decides a run's result, and nothing about the machines that it runs on.

    Fields:
        name: of the run, unless the launch names it
        model: -> torch.nn.Module that maps [T,B,...] to logits [T,B,K]
        rule: -> pipeline.rules.base.Rule, which replaces `loss.backward()`
        data: -> pipeline.data.base.Data; with phases, the data that their tasks are made of
        objective: -> pipeline.train.objective.Loss: logits and targets to a scalar; with a teacher,
            pipeline.train.distillation.Distillation
        optimizer: called with the model; timm's `create_optimizer_v2` or a function like it
        schedule: called with the optimizer, the steps of the run (of each phase) and the steps of
            an epoch; see pipeline.train.schedule
        batch_size: samples in one global batch, whatever the number of workers
        mixing: -> pipeline.data.mixing.Mixing: Mixup and CutMix of the training batches; None:
            neither
        teacher: called with the data -> pipeline.models.teachers.base.Teacher, whose predictions
            the objective distils; None: labels only
        phases: tasks that are learnt one after another; empty: the data is the only task
        family: the experiment in MLflow; None: the name
        over_time: "steps": the mean over time of each step's loss; "mean": one loss of the mean
            logits
        micro_batch: largest number of samples in one forward pass of a worker; gradients are
            accumulated over its share. None: the whole share
        precision: of matrix products and convolutions, see pipeline/core/torch_settings.py; tf32
            needs an NVIDIA card
        pack_spikes: whether synapses keep spikes for their backward as bits: less memory, the same
            gradients
        clip_norm: largest gradient norm of a global batch; 0: no clipping
        ema_decay: decay of a running average of the weights, such as 0.9999. Evaluations and
            `model.safetensors` use the average. 0: no average
        seed: of initial weights, the order of samples and all random draws
        backend: "deepspeed" or plain torch
        zero: DeepSpeed's ZeRO stage
        init: a run's folder or a weights file (.safetensors, .pt) to start from, or "@NAME" in a
            suite. The study key covers its content, not its path. None: from scratch
        policy, evaluation, checkpoints: see `Policy`, `Evaluation` and `Checkpointing`
        log_every: steps between step events in the journal
        stop_after: number of global batches after which the run and its schedule end, or each phase
            and its schedule; None: they end after the last epoch
        protocol: "shared": all rules have the same settings; "trial": the run tries one value and
            is judged on a held-out part; "tuned": each rule has its best value, chosen by trials
        tuned: dotted keys of the fields that have a separate value for each rule, found by the same
            search. The study key excludes these values
        searched: the values that the search tried, as sorted text. They are part of the study key,
            so rules are compared only if the same values were tried
        published: points of a published log that reports show beside the run: (epochs done, top-1
            in 0..1)
        published_setting: dotted keys of this recipe with their values in the published log, such
            as ("time_steps", 4). If a run has another value, reports name the difference and do not
            judge the run by the log.

    Raises: ValueError that names the field, for a value of another type or out of range, or for
    fields that contradict each other.
    """

    name: str = field(metadata=_role(Role.PER_RUN))
    model: Spec = field(metadata=_role(Role.STUDY))
    rule: Spec = field(metadata=_role(Role.PER_RUN))
    data: Spec = field(metadata=_role(Role.STUDY))
    objective: Spec = field(metadata=_role(Role.STUDY))
    optimizer: Spec = field(metadata=_role(Role.STUDY))
    schedule: Spec = field(metadata=_role(Role.STUDY))
    time_steps: int = field(metadata=_role(Role.STUDY, minimum=1))
    batch_size: int = field(metadata=_role(Role.STUDY | Role.TAG, minimum=1))
    epochs: int = field(metadata=_role(Role.STUDY, minimum=1))
    mixing: Spec | None = field(default=None, metadata=_role(Role.STUDY))
    teacher: Spec | None = field(default=None, metadata=_role(Role.STUDY))
    phases: tuple[Phase, ...] = field(default=(), metadata=_role(Role.STUDY))
    family: str | None = field(default=None, metadata=_role(Role.PER_RUN | Role.TAG))
    over_time: Literal["steps", "mean"] = field(default="steps", metadata=_role(Role.STUDY))
    micro_batch: int | None = field(
        default=None, metadata=_role(Role.STUDY | Role.PER_ATTEMPT | Role.TAG, minimum=1)
    )
    seed: int = field(default=0, metadata=_role(Role.PER_RUN | Role.TAG, minimum=0))
    precision: Literal["fp32", "tf32", "bf16"] = field(
        default="fp32", metadata=_role(Role.STUDY | Role.TAG)
    )
    pack_spikes: bool = field(default=False, metadata=_role(Role.STUDY))
    clip_norm: float = field(default=0.0, metadata=_role(Role.STUDY, minimum=0))
    ema_decay: float = field(default=0.0, metadata=_role(Role.STUDY))
    backend: Literal["deepspeed", "plain"] = field(default="deepspeed", metadata=_role(Role.STUDY))
    zero: Literal[0, 1, 2] = field(default=0, metadata=_role(Role.STUDY | Role.TAG))
    init: str | None = field(default=None, metadata=_role(Role.PER_RUN | Role.PER_ATTEMPT))
    policy: Policy = Policy()
    evaluation: Evaluation = Evaluation()
    checkpoints: Checkpointing = Checkpointing()
    log_every: int = field(default=10, metadata=_role(Role.PER_ATTEMPT, minimum=1))
    stop_after: int | None = field(default=None, metadata=_role(Role.STUDY, minimum=1))
    protocol: Literal["shared", "trial", "tuned"] = field(
        default="shared", metadata=_role(Role.STUDY | Role.TAG)
    )
    tuned: tuple[str, ...] = field(default=(), metadata=_role(Role.STUDY | Role.TAG))
    searched: tuple[str, ...] = field(default=(), metadata=_role(Role.STUDY))
    published: tuple[tuple[int, float], ...] = field(default=(), metadata=_role(Role.PER_RUN))
    published_setting: tuple[tuple[str, int | float | str], ...] = field(
        default=(), metadata=_role(Role.PER_RUN)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.ema_decay < 1,
            f"recipe: ema_decay must be in 0..1, 1 excluded; got {self.ema_decay}",
        )
        require(
            all(epochs >= 1 and 0 <= top1 <= 1 for epochs, top1 in self.published),
            "recipe: published must be pairs of epochs, from 1, and top-1 in 0..1; got"
            f" {self.published!r}",
        )
        require(
            not self.published_setting or self.published,
            "recipe: published_setting needs published, the points of the log; got no published",
        )
        require(
            self.backend != "plain" or not self.zero,
            f"recipe: zero={self.zero} needs backend='deepspeed'; got backend='plain'",
        )
        for name, text in (("name", self.name), ("family", self.family)):
            require(
                text is None or is_name(text),
                f"recipe: {name} must be valid as a folder's name, without {os.sep!r}; got"
                f" {text!r}",
            )
        object.__setattr__(self, "phases", tuple(self.phases))
        check_phases(self.phases)
        require(
            (self.protocol == "shared") == (not self.tuned),
            "recipe: tuned must name fields if protocol is 'trial' or 'tuned', and only then; got"
            f" tuned={self.tuned} with protocol={self.protocol!r}",
        )
        require(
            not self.searched or self.tuned,
            f"recipe: searched needs a field in tuned; got searched={self.searched} without tuned",
        )
        for key in self.tuned:
            require(
                Role.STUDY in (roles().get(key) or roles().get(key.split(".")[0], Role.STUDY)),
                f"recipe: tuned must name fields that the study key covers; got {key}",
            )
            self.value_of(key)

    def split(self, workers: int) -> "Split":
        """How the global batch is divided among `workers`. Raises as `Split.of`."""
        return Split.of(self.batch_size, workers=workers, most=self.micro_batch)

    def override(self, changes: Mapping[str, Any]) -> "Recipe":
        """The recipe with dotted keys changed, such as `{"optimizer.lr": 0.05, "epochs": 3}`.

        Raises:
            ValueError: a key that does not exist, or a value of the wrong type or not finite.
        """
        recipe = self
        for key, value in changes.items():
            require(
                key.split(".")[0] != "phases",
                f"recipe: phases must be changed in the recipe file; got {key}: change data or"
                " stop_after, or the epochs of the phases without their own",
            )
            require(
                not isinstance(value, float) or math.isfinite(value),
                f"recipe: {key} must be finite; got {value}",
            )
            recipe = _changed(recipe, key.split("."), value, key)
        return recipe

    def value_of(self, key: str) -> Any:
        """The value under a dotted key, such as `optimizer.lr`.

        Raises:
            ValueError: the recipe has no value there.
        """
        value: Any = self
        for name in key.split("."):
            value = _children(value).get(name)
        require(
            value is not None,
            f"recipe: {key} must be written in the recipe; {self.name} has no value for it",
        )
        return value

    @property
    def remedy(self) -> str:
        """Advice for a training that diverged, as text."""
        return remedy(self.optimizer.kwargs.get("lr"), self.clip_norm)

    def resolved(self) -> "Recipe":
        """The same recipe with absolute paths: workers and later commands run in other folders."""
        return self.with_paths(
            lambda path: str(Path(path).absolute()) if referred(path) is None else path
        )

    def with_paths(self, change: Callable[[str], str]) -> "Recipe":
        """The same recipe with `init` and every path among the keywords of its parts changed."""

        def change_paths(part: Spec) -> Spec:
            return part.with_(
                **{
                    key: change(os.fspath(item))
                    for key, item in part.kwargs.items()
                    if item is not None and is_path(part.target, key)
                }
            )

        parts = {name: _map_specs(value, change_paths) for name, value in vars(self).items()}
        return replace(self, **{**parts, "init": None if self.init is None else change(self.init)})

    def tiny(self, *, data: Spec | None = None) -> "Recipe":
        """The same recipe shrunk to seconds on a CPU.

        It takes 4 steps of 8 samples at T <= 2, evaluates on 64 samples and has at most 2 phases.
        """
        phases = tuple(replace(phase, epochs=None) for phase in self.phases[:2])
        steps = min(self.time_steps, 2)
        data = self.data if data is None else data

        def shorten(names: Collection[str], part: Spec) -> Spec:
            return part.with_(
                **{name: min(part.kwargs[name], steps) for name in names if part.kwargs.get(name)}
            )

        return replace(
            self,
            name=f"{self.name}-tiny",
            model=_map_specs(self.model, functools.partial(shorten, ["time_steps"])),
            rule=_map_specs(
                _map_specs(self.rule, _tiny_part),
                functools.partial(shorten, ["k", "chunk", "truncate"]),
            ),
            teacher=self.with_untrained_teacher().teacher,
            data=_map_specs(data, functools.partial(shorten, ["steps"])),
            time_steps=steps,
            batch_size=8,
            micro_batch=None,
            epochs=1,
            phases=phases,
            stop_after=4 // max(1, len(phases)),
            evaluation=replace(self.evaluation, samples=64),
            published=(),
            published_setting=(),
            log_every=1,
        )

    def with_untrained_teacher(self) -> "Recipe":
        """The same recipe with the `tiny` keywords of its teacher, such as untrained weights."""
        return replace(self, teacher=_map_specs(self.teacher, _tiny_part))

    def check_time_steps(self, shape: Sequence[int]) -> None:
        """Check that recordings and parts of the model have the recipe's number of time steps.

        Parts whose computation needs T have a keyword `time_steps`; data has `steps`.

        Args:
            shape: of a sample; a recording's is (T, C, H, W).

        Raises:
            ValueError: the number of time steps is not the recipe's `time_steps`.
        """
        require(
            len(shape) != 4 or shape[0] == self.time_steps,
            "recipe: data.steps, the T of its recordings, must be"
            f" time_steps={self.time_steps}; got {shape[0]}",
        )
        for key, steps in _time_steps_in("model", self.model):
            require(
                steps == self.time_steps,
                f"recipe: {key} must be the recipe's time_steps={self.time_steps}; got {steps}",
            )

    def study_key(self, inputs: Mapping[str, str]) -> str:
        """A hash of everything that all runs of a study share, as 16 hex digits.

        Runs with the same key differ only in tuned fields and in fields without `Role.STUDY`, such
        as the rule and the seed. Such runs may be compared.

        Args:
            inputs: content hashes of the data, and of the files of `init` and of the teacher.
        """
        value = select(_fields_to_json(self, paths=False), lambda role: Role.STUDY in role)
        for key in self.tuned:
            *parts, last = key.split(".")
            holder = value
            for part in parts:
                holder = holder[part].get("kwargs", holder[part])
            holder.pop(last, None)
        content = json.dumps([value, dict(inputs)], sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, with callables as dotted names. `from_json` reads it back."""
        return {"version": FORMAT, "recipe": _fields_to_json(self, paths=True)}

    def decisive(self) -> dict[str, Any]:
        """The JSON of the fields that may not change between attempts of one run, without paths."""
        return select(
            json.loads(json.dumps(_fields_to_json(self, paths=False))),
            lambda role: Role.PER_ATTEMPT not in role,
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, trust: Collection[str] = ()) -> "Recipe":
        """Read a recipe from JSON. Only trusted names are imported.

        Raises:
            ValueError: the format version is another one, a target is not trusted, or a field is
                damaged, missing or unknown.
        """
        check_format(value, FORMAT, subject=RECIPE_FILE)
        fields = decode(value.get("recipe"), (*TRUSTED, *trust))
        groups = {
            each.name: type(each.default)
            for each in dataclasses.fields(cls)
            if isinstance(each.default, _Fields)
        }
        if isinstance(fields, Mapping):
            fields = {
                name: (
                    groups[name](
                        **arguments_of(groups[name], item, subject=f"{RECIPE_FILE}: {name}")
                    )
                    if name in groups
                    else item
                )
                for name, item in fields.items()
            }
        return cls(**arguments_of(cls, fields, subject=RECIPE_FILE))

    @classmethod
    def read(cls, path: Path, *, trust: Collection[str] = ()) -> "Recipe":
        """The recipe in the file `recipe.json` of a run.

        Raises:
            ValueError: the file does not exist, or as `from_json`.
        """
        try:
            if trust:
                own_code.make_importable(own_code.read(path.parent), trust)
            return cls.from_json(read_json(path), trust=trust)
        except ValueError as error:
            raise ValueError(f"{path.parent}: {error}") from error

    def flat(self) -> dict[str, str]:
        """Dotted keys to short text, for a tracker's table of parameters."""
        return dict(flat(_fields_to_json(self, paths=True)))


@functools.cache
def roles() -> Mapping[str, Role]:
    """The role of each field of a recipe, by its dotted name."""
    return {
        group.prefix + each.name: each.metadata["role"]
        for group in (Recipe, Policy, Evaluation, Checkpointing)
        for each in dataclasses.fields(group)
        if not isinstance(each.default, _Fields)
    }


def select(encoded: Mapping[str, Any], accepts: Callable[[Role], bool]) -> dict[str, Any]:
    """The fields of a recipe's JSON whose roles are accepted. Groups stay nested.

    Fields that this version does not know are included.
    """
    groups = {name.partition(".")[0] for name in roles() if "." in name}

    def accepted(fields: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: value
            for name, value in fields.items()
            if prefix + name not in roles() or accepts(roles()[prefix + name])
        }

    return {
        name: (
            accepted(value, f"{name}.") if name in groups and isinstance(value, Mapping) else value
        )
        for name, value in accepted(encoded, "").items()
    }


def _fields_to_json(fields: _Fields, *, paths: bool) -> dict[str, Any]:
    """The fields as JSON. A field is left out if its value and its default are None or ().

    A later version can therefore add such a field without a change of study keys.
    """
    return {
        each.name: (
            _fields_to_json(value, paths=paths)
            if isinstance(value, _Fields)
            else encode(value, paths=paths)
        )
        for each in dataclasses.fields(fields)
        for value in [getattr(fields, each.name)]
        if not (value == each.default and value in (None, ()))
    }


def _children(value: Any) -> Mapping[str, Any]:
    """The values one level below a value, by the names that dotted keys use."""
    if isinstance(value, Spec):
        return value.kwargs
    return vars(value) if isinstance(value, _Fields) else {}


def _changed(part: Any, path: Sequence[str], value: Any, key: str) -> Any:
    if not path:
        if isinstance(part, Spec):
            raise ValueError(
                f"recipe: {key} is a part, {part.label}; change its keywords:"
                f" {keywords_text(part.target, key + '.')}"
            )
        require(
            not isinstance(part, _Fields),
            f"recipe: {key} is a group; change its fields:"
            f" {', '.join(f'{key}.{name}' for name in _children(part))}",
        )
        return value
    head, *rest = path
    if isinstance(part, _Fields):
        require(
            head in vars(part),
            f"recipe: no field {part.prefix + head!r}; it has"
            f" {', '.join(part.prefix + name for name in vars(part))}",
        )
        return replace(part, **{head: _changed(getattr(part, head), rest, value, key)})
    require(isinstance(part, Spec), f"recipe: {key!r} names a field of a plain value, {part!r}")
    require(
        not rest or head in part.kwargs,
        f"recipe: {key}: {part.target.__name__} must have a part {head!r}; it has"
        f" {', '.join(part.kwargs)}",
    )
    return part.with_(**{head: _changed(part.kwargs.get(head), rest, value, key)})


def _time_steps_in(key: str, part: Spec) -> Iterator[tuple[str, int]]:
    for name, value in part.kwargs.items():
        if name == "time_steps":
            yield f"{key}.{name}", value
        elif isinstance(value, Spec):
            yield from _time_steps_in(f"{key}.{name}", value)


def _tiny_part(part: Spec) -> Spec:
    return part.with_(**getattr(part.target, "tiny", {}))


def _map_specs(value: Any, change: Callable[[Spec], Spec]) -> Any:
    """Apply `change` to each part in the value of a field, inner parts first."""
    if isinstance(value, tuple):
        return tuple(_map_specs(item, change) for item in value)
    if isinstance(value, Phase):
        return replace(value, data=_map_specs(value.data, change))
    if not isinstance(value, Spec):
        return value
    return change(
        value.with_(**{key: _map_specs(item, change) for key, item in value.kwargs.items()})
    )

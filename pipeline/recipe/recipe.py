"""A recipe is a training run written down as one frozen value; a part of it that can be built is a
`Spec`.

Nothing is looked up by string and there is no registry: a recipe names its parts by the Python
objects themselves, and a misspelt keyword fails on the recipe's own line. Only the standard library
is imported here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.core.errors import remedy
from pipeline.core.files import is_name
from pipeline.recipe import own_code
from pipeline.recipe.json import decode, encode, flat, read_json, write_json
from pipeline.recipe.phases import Phase, check_phases
from pipeline.recipe.spec import Spec, accepted_text, admits, is_path, referred, spec, type_name

__all__ = ["Phase", "Recipe", "Spec", "Split", "read_json", "spec", "write_json"]

# What recipe.json may name: single functions, and modules whose functions and classes make parts
# and do nothing else, whatever they are given. Whole packages are too much: timm.models reads any
# pickle when it is told to, pipeline.data writes files.
TRUSTED = (
    "pipeline.data.datasets",
    "pipeline.data.mixing",
    "pipeline.models",
    "pipeline.recipe.phases",
    "pipeline.rules",
    "pipeline.spiking",
    "pipeline.train.distillation",
    "pipeline.train.objective",
    "pipeline.train.schedule",
    "recipes",
    "torch.nn.modules",
    "timm.optim._optim_factory.create_optimizer_v2",
)
FORMAT = 1
# What runs of one study may differ in; the last three look on. Weights to start from count by their
# content.
BESIDE_THE_STUDY = (
    "name",
    "family",
    "rule",
    "seed",
    "init",
    "fidelity_every",
    "published",
    "published_setting",
)


@dataclass(frozen=True)
class Split:
    """How one global batch falls on the workers: `batch_size = workers * micro_batch *
    accumulation` samples.
    """

    workers: int
    micro_batch: int
    accumulation: int

    @classmethod
    def of(cls, batch_size: int, *, workers: int, most: int | None) -> Split:
        """The fewest accumulated micro-batches of at most so many samples (None: a worker's whole
        share).

        Raises:
            ValueError: the batch does not divide; the message names the sizes nearest to it that
            do.
        """
        share, rest = divmod(batch_size, workers)
        if rest or share == 0:
            near = sorted({max(1, share) * workers, (share + 1) * workers})
            raise ValueError(
                f"recipe: batch_size must divide by {workers} workers; got {batch_size}, "
                f"near it {' and '.join(map(str, near))} do"
            )
        largest = share if most is None else min(most, share)
        micro = next(size for size in range(largest, 0, -1) if share % size == 0)
        return cls(workers, micro, share // micro)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's result, and nothing about the machines that it runs on."""

    name: str
    model: Spec
    """-> torch.nn.Module that maps [T,B,...] to logits [T,B,K]"""
    rule: Spec
    """-> pipeline.rules.base.Rule: what replaces `loss.backward()`"""
    data: Spec
    """-> pipeline.data.base.Data; with phases, what their tasks are made of"""
    objective: Spec
    """-> pipeline.train.objective.Loss: logits and targets to a scalar; with a teacher,
    pipeline.train.distillation.Distillation
    """
    optimizer: Spec
    """called with the model: timm's `create_optimizer_v2` or anything of its kind"""
    schedule: Spec
    """called with the optimizer, the steps of the run (of each phase) and those of an epoch:
    pipeline.train.schedule
    """
    time_steps: int
    batch_size: int
    """samples in one global batch, whatever the number of workers"""
    epochs: int
    mixing: Spec | None = None
    """-> pipeline.data.mixing.Mixing: Mixup and CutMix of the training batches; None: samples as
    they are
    """
    teacher: Spec | None = None
    """called with the data -> pipeline.models.teachers.base.Teacher, whose answers the objective
    distils;
    None: labels alone
    """
    phases: tuple[Phase, ...] = ()
    """tasks to learn one after another; none: the data as it is"""
    family: str | None = None
    """what its runs are kept under, an experiment in MLflow; None: the name. No part of the study,
    as the name is none
    """
    over_time: Literal["steps", "mean"] = "steps"
    """the loss is the mean over time of each step's loss, or one loss of the mean logits"""
    micro_batch: int | None = None
    """most samples that one worker holds at a time (None: its whole share); what is left is
    accumulated
    """
    seed: int = 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of matrix products and convolutions, see pipeline/core/torch_settings.py; tf32 on NVIDIA
    cards alone
    """
    clip_norm: float = 0.0
    """largest gradient norm of a global batch; 0 switches clipping off"""
    ema_decay: float = 0.0
    """of a running average of the weights, 0.9999 for example, which is then what is evaluated and
    published; 0: no average
    """
    backend: Literal["deepspeed", "plain"] = "deepspeed"
    zero: Literal[0, 1, 2] = 0
    """DeepSpeed's ZeRO stage"""
    init: str | None = None
    """a run's folder or a weights file (.safetensors, .pt) to start from, or in a suite "@NAME";
    None: from scratch
    """
    skip: tuple[tuple[int, int], ...] = ()
    """global batches that are passed over, counted from 0: from one up to and without another"""
    max_skips: int = 3
    """bad batches in a row that leave no trace, before the run goes back to its newest checkpoint
    (pipeline/train/guards/anomaly.py)
    """
    max_rollbacks: int = 2
    """times that it goes back, before it ends"""
    loss_spike: float = 0.0
    """a loss of more than so many times the median of its task's last 64 makes a batch bad; 0: only
    one that is not finite
    """
    replicas_every: int = 500
    """steps between comparisons of what workers have learnt, bit by bit, beside one at each
    checkpoint; 0: none at all
    """
    evaluate_every: int = 1
    """epochs between evaluations, beside the one after the last; 0: that one alone, which reads the
    test set once
    """
    fidelity_every: int = 0
    """epochs between comparisons of the rule's gradient with BPTT's on the first batch, beside one
    at the start; 0: none
    """
    checkpoint_every: int = 0
    """steps between checkpoints, beside the one at each epoch's end; 0: none"""
    checkpoint_minutes: float = 10.0
    """longest time between checkpoints, in minutes; 0: no limit"""
    keep: int = 2
    """newest checkpoints kept, the best one beside them"""
    log_every: int = 10
    """steps between step events in the journal"""
    stop_after: int | None = None
    """end the run, or each of its phases, after this many global batches (None: after its last
    epoch); so does the schedule
    """
    evaluate_samples: int | None = None
    """evaluate on so many samples only (None: on all); for smoke runs"""
    protocol: Literal["shared", "trial", "tuned"] = "shared"
    """how the settings beside the rule came about: the same for every rule, being tried on a
    held-out part, or chosen so
    """
    tuned: tuple[str, ...] = ()
    """dotted keys of the fields that each rule has its own value of, by the same search; they leave
    the study key
    """
    searched: tuple[str, ...] = ()
    """the values that the search tried, as sorted text; they stay in the study key: no rule is set
    beside one that had others
    """
    published: tuple[tuple[int, float], ...] = ()
    """epochs done and top-1 in 0..1 of a published log, which reports set a run beside; nothing
    else reads it
    """
    published_setting: tuple[tuple[str, int | float | str], ...] = ()
    """dotted keys of this recipe and their values in the published log, such as ("time_steps", 4).
    Where a run has another value, reports show the log with that difference and do not judge the
    run by it"""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not admits(hints[each.name], value):
                raise ValueError(
                    f"recipe: {each.name} must be {type_name(hints[each.name])}; got {value!r}"
                )
        positive = ("time_steps", "batch_size", "epochs", "keep", "log_every")
        for name in positive + tuple(
            n
            for n in ("micro_batch", "stop_after", "evaluate_samples")
            if getattr(self, n) is not None
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe: {name} must be at least 1; got {getattr(self, name)}")
        not_negative = (
            "clip_norm",
            "checkpoint_every",
            "checkpoint_minutes",
            "evaluate_every",
            "fidelity_every",
            "seed",
            "max_skips",
            "max_rollbacks",
        )
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ValueError(f"recipe: {name} must not be negative; got {getattr(self, name)}")
        if not all(0 <= first < end for first, end in self.skip):
            raise ValueError(
                "recipe: skip must be pairs of batches, 0 or more, the first below the second; got"
                f" {self.skip!r}"
            )
        if self.loss_spike and self.loss_spike <= 1:
            raise ValueError(f"recipe: loss_spike must be 0 or above 1; got {self.loss_spike}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"recipe: ema_decay must be in 0..1, 1 excluded; got {self.ema_decay}")
        if not all(epochs >= 1 and 0 <= top1 <= 1 for epochs, top1 in self.published):
            raise ValueError(
                "recipe: published must be pairs of epochs, from 1, and top-1 in 0..1; got"
                f" {self.published!r}"
            )
        if self.published_setting and not self.published:
            raise ValueError(
                "recipe: published_setting needs published, the points of the log; it has none"
            )
        if self.backend == "plain" and self.zero:
            raise ValueError(
                f"recipe: zero={self.zero} needs backend='deepspeed'; got backend='plain'"
            )
        if (self.protocol == "shared") == bool(self.tuned):
            raise ValueError(
                f"recipe: tuned names fields of a trial or of tuned runs; got {self.tuned} of"
                f" protocol {self.protocol}"
            )
        if self.searched and not self.tuned:
            raise ValueError(
                f"recipe: searched has the values of a field that is tuned; got {self.searched} and"
                " no such field"
            )
        for key in self.tuned:
            if key.split(".")[0] in BESIDE_THE_STUDY:
                raise ValueError(
                    f"recipe: tuned must be a setting beside the rule; got {key}, which no study is"
                    " told apart by"
                )
            self.value_of(key)
        for name in ("name",) if self.family is None else ("name", "family"):
            text = getattr(self, name)
            if not is_name(text):
                raise ValueError(
                    f"recipe: {name} becomes a folder's name and must not hold {os.sep!r}; got"
                    f" {text!r}"
                )
        object.__setattr__(self, "phases", tuple(self.phases))
        check_phases(self.phases)

    def split(self, workers: int) -> Split:
        """How the global batch falls on `workers`. Raises as `Split.of`."""
        return Split.of(self.batch_size, workers=workers, most=self.micro_batch)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with dotted keys changed, `{"optimizer.lr": 0.05, "epochs": 3}`, and validated
        again.

        Raises:
            ValueError: a key that does not exist, naming those that do, or a value of the wrong
            type or not finite.
        """
        recipe = self
        for key, value in changes.items():
            head, *rest = key.split(".")
            if head not in _field_names(recipe):
                raise ValueError(
                    f"recipe: no field {head!r}; it has {', '.join(_field_names(recipe))}"
                )
            if head == "phases":
                raise ValueError(
                    f"recipe: phases are written in the recipe alone; got {key}; data, epochs and"
                    " stop_after reach all of them"
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"recipe: {key} must be finite; got {value}")
            part = getattr(recipe, head)
            recipe = dataclasses.replace(recipe, **{head: _changed(part, rest, value, key)})
        return recipe

    def value_of(self, key: str) -> Any:
        """The value under a dotted key, `optimizer.lr`.

        Raises:
            ValueError: nothing was written under it.
        """
        head, *rest = key.split(".")
        value = getattr(self, head, None) if head in _field_names(self) else None
        for name in rest:
            value = value.kwargs.get(name) if isinstance(value, Spec) else None
        if value is None:
            raise ValueError(
                f"recipe: {key} must be written in the recipe; {self.name} has no value for it"
            )
        return value

    @property
    def remedy(self) -> str:
        """What to change where training diverges."""
        return remedy(self.optimizer.kwargs.get("lr"), self.clip_norm)

    def resolved(self) -> Recipe:
        """The same recipe with every path absolute: workers start in folders of their own, and so
        may whoever resumes.
        """
        return self.with_paths(
            lambda path: str(Path(path).absolute()) if referred(path) is None else path
        )

    def with_paths(self, change: Callable[[str], str]) -> Recipe:
        """The same recipe with `init` and every path among the keywords of its parts changed."""
        parts = {
            each.name: _with_paths(getattr(self, each.name), change)
            for each in dataclasses.fields(self)
        }
        return dataclasses.replace(
            self, **{**parts, "init": None if self.init is None else change(self.init)}
        )

    def tiny(self, *, data: Spec | None = None) -> Recipe:
        """The same recipe shrunk to seconds on a CPU: 4 steps of small batches at T = 2, a small
        evaluation, 2 phases at most.
        """
        phases = tuple(dataclasses.replace(phase, epochs=None) for phase in self.phases[:2])
        steps = min(self.time_steps, 2)
        data = self.data if data is None else data
        rule = _tiny_part(self.rule)
        for name in ("k", "chunk", "truncate"):
            rule = _changed_throughout(
                rule, name, lambda value: value if value is None else min(value, steps)
            )
        return dataclasses.replace(
            self,
            name=f"{self.name}-tiny",
            model=_changed_throughout(self.model, "time_steps", lambda _: steps),
            rule=rule,
            teacher=self.with_untrained_teacher().teacher,
            data=data.with_(steps=steps) if "steps" in data.kwargs else data,
            time_steps=steps,
            batch_size=8,
            micro_batch=None,
            epochs=1,
            phases=phases,
            stop_after=4 // max(1, len(phases)),
            evaluate_samples=64,
            published=(),
            published_setting=(),
            log_every=1,
        )

    def with_untrained_teacher(self) -> Recipe:
        """The same recipe with a teacher whose weights need not be had: to look at, not to
        train.
        """
        return (
            self
            if self.teacher is None
            else dataclasses.replace(self, teacher=_tiny_part(self.teacher))
        )

    def check_time_steps(self, shape: Sequence[int]) -> None:
        """Refuse recordings (`shape` of a sample is (T, C, H, W)) and parts of the model that count
        on another T.

        A part that must know T, which slices do not show, is told by the keyword `time_steps`; data
        by `steps`.

        Raises:
            ValueError: a T that is not the recipe's `time_steps`.
        """
        if len(shape) == 4 and shape[0] != self.time_steps:
            raise ValueError(
                f"recipe: data.steps must be time_steps={self.time_steps}; got {shape[0]}"
            )
        for key, steps in _told_time_steps("model", self.model):
            if steps != self.time_steps:
                raise ValueError(
                    f"recipe: {key} must be the recipe's time_steps={self.time_steps}; got {steps}"
                )

    def study_key(self, inputs: Mapping[str, str]) -> str:
        """Runs with one key differ in the rule and the seed alone and may be compared: 16 hex
        digits.

        Args:
            inputs: content hashes of what paths only point at: `data` (and `init`, where there is
            one).
        """
        value = self._encoded(paths=False)
        for name in BESIDE_THE_STUDY:
            value.pop(name, None)
        for key in self.tuned:
            *parts, last = key.split(".")
            holder = value
            for part in parts:
                holder = holder[part]["kwargs"]
            holder.pop(last, None)  # a field that is written only where it is not zero
        return hashlib.sha256(
            json.dumps([value, dict(inputs)], sort_keys=True).encode()
        ).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` turns back into an equal recipe; callables are named by
        dotted path.
        """
        return {"version": FORMAT, "recipe": self._encoded(paths=True)}

    def decisive(self) -> dict[str, Any]:
        """The JSON of what a run keeps from its first batch to its last: not where things lie, nor
        how much memory holds.
        """
        value = json.loads(json.dumps(self._encoded(paths=False)))
        return {name: item for name, item in value.items() if name not in ("init", "micro_batch")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, trust: Collection[str] = ()) -> Recipe:
        """Read a recipe back, importing what is trusted alone.

        Raises:
            ValueError: another format version, a target that is not trusted, or a recipe that no
            longer fits.
        """
        if not isinstance(value, Mapping) or value.get("version") != FORMAT:
            got = value.get("version") if isinstance(value, Mapping) else value
            raise ValueError(
                f"recipe.json: this spiketrain reads format version {FORMAT}; got {got!r}"
            )
        written = value.get("recipe")
        if not isinstance(written, Mapping):
            raise ValueError(
                f"recipe.json: 'recipe' must hold the fields of a recipe; got {written!r}"
            )
        fields = {key: decode(item, (*TRUSTED, *trust)) for key, item in written.items()}
        unknown = sorted(set(fields) - set(_field_names(cls)))
        if unknown:
            raise ValueError(
                f"recipe.json: unknown fields {', '.join(unknown)}; a recipe has"
                f" {', '.join(_field_names(cls))}"
            )
        needed = [
            each.name for each in dataclasses.fields(cls) if each.default is dataclasses.MISSING
        ]
        missing = [name for name in needed if name not in fields]
        if missing:
            raise ValueError(f"recipe.json: fields {', '.join(missing)} are missing")
        return cls(**fields)

    @classmethod
    def read(cls, path: Path, *, trust: Collection[str] = ()) -> Recipe:
        """The recipe of a run, from its recipe.json. Raises what `from_json` does, and where there
        is no such file.
        """
        try:
            written = read_json(path)
            with own_code.on_path(
                own_code.read(path.parent) if trust else {}, trust, of=path.absolute().parent.name
            ):
                return cls.from_json(written, trust=trust)
        except ValueError as error:
            raise ValueError(f"{path.parent}: {error}") from error

    def flat(self) -> dict[str, str]:
        """Dotted keys to short text, for a tracker's table of parameters."""
        return dict(flat(self._encoded(paths=True)))

    def _encoded(self, *, paths: bool) -> dict[str, Any]:
        fields = {
            each.name: encode(getattr(self, each.name), paths=paths)
            for each in dataclasses.fields(self)
        }
        # A recipe without them keeps its study key.
        often_absent = (
            "mixing",
            "teacher",
            "phases",
            "family",
            "ema_decay",
            "tuned",
            "searched",
            "published",
            "published_setting",
        )
        absent = [name for name in often_absent if not getattr(self, name)]
        absent += ["protocol"] if self.protocol == "shared" else []
        return {name: value for name, value in fields.items() if name not in absent}


def _field_names(recipe: Recipe | type[Recipe]) -> list[str]:
    return [each.name for each in dataclasses.fields(recipe)]


def _changed(part: Any, path: list[str], value: Any, key: str) -> Any:
    if not path:
        if isinstance(part, Spec):
            raise ValueError(
                f"recipe: {key} is a part, {part.label}; change its keywords:"
                f" {accepted_text(part.target, key + '.')}"
            )
        return value
    if not isinstance(part, Spec):
        raise ValueError(f"recipe: {key!r} goes below a plain value, {part!r}")
    head, *rest = path
    if rest and head not in part.kwargs:
        raise ValueError(
            f"recipe: {key}: {part.target.__name__} was not given a part {head!r}; it holds"
            f" {', '.join(part.kwargs)}"
        )
    return part.with_(**{head: _changed(part.kwargs.get(head), rest, value, key)})


def _told_time_steps(key: str, part: Spec) -> Iterator[tuple[str, int]]:
    for name, value in part.kwargs.items():
        if name == "time_steps":
            yield f"{key}.{name}", value
        elif isinstance(value, Spec):
            yield from _told_time_steps(f"{key}.{name}", value)


def _tiny_part(part: Spec) -> Spec:
    """The part, and those inside it, with what they call tiny themselves."""
    inside = {
        key: _tiny_part(value) for key, value in part.kwargs.items() if isinstance(value, Spec)
    }
    return part.with_(**{**inside, **getattr(part.target, "tiny", {})})


def _changed_throughout(part: Spec, name: str, change: Callable[[Any], Any]) -> Spec:
    """The part with every keyword `name` changed, its own and those of the parts within it."""
    inside = {
        key: _changed_throughout(value, name, change)
        for key, value in part.kwargs.items()
        if isinstance(value, Spec)
    }
    return part.with_(
        **inside, **{key: change(value) for key, value in part.kwargs.items() if key == name}
    )


def _with_paths(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_with_paths(item, change) for item in value)
    if isinstance(value, Phase):
        return dataclasses.replace(value, data=_with_paths(value.data, change))
    if not isinstance(value, Spec):
        return value
    paths = {
        key: change(os.fspath(item))
        for key, item in value.kwargs.items()
        if item is not None and is_path(value.target, key)
    }
    return value.with_(
        **{**{key: _with_paths(item, change) for key, item in value.kwargs.items()}, **paths}
    )

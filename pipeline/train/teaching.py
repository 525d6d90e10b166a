"""The teacher of a run in one process: builds it, fits its probe, measures its accuracy and caches
its logits.

Results of a teacher are stored under a key that includes everything that determines them. The place
is the folder of its cache or, without a cache, the run's folder. So a resume neither fits nor
evaluates again.

B batch, K classes, N samples, D features
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.torch_settings import check_precision
from pipeline.data.base import Batch, Data
from pipeline.models.teachers.base import Teacher
from pipeline.models.teachers.cache import CachedPredictions
from pipeline.models.teachers.probe import Probe
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Recipe, Split, read_json, write_json
from pipeline.track import events
from pipeline.track.journal import Tracker
from pipeline.train.backend.collectives import Ranks
from pipeline.train.evaluation import Evaluation, evaluate, evaluation_batches
from pipeline.train.objective import CrossEntropy
from pipeline.train.part_checks import build_part, require_members
from pipeline.train.transfer import move_batch

FEATURE_BATCH = 32  # images whose features are computed at a time


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The teacher's logits for a micro-batch, from the cache or from the teacher itself."""

    teacher: Teacher
    accuracy: Evaluation
    cache: CachedPredictions | None

    def __call__(self, x_B: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        """The teacher's logits `[B,K]` for `x_B`, which are one epoch's views of the samples
        `index_B`. The logits are fp32 and have no graph.

        If the logits of one sample are missing, the teacher computes the whole batch, because the
        last bits of its logits depend on the other samples of the batch.
        """
        if self.cache is None:
            return self.teacher(x_B)
        if (cached_BK := self.cache.find(epoch, index_B)) is not None:
            return cached_BK.to(x_B.device)
        return self.cache.add(epoch, index_B, self.teacher(x_B))


def build_teacher(recipe: Recipe, data: Data) -> Teacher:
    """The recipe's teacher with its weights. The state of the random generators does not change, so
    the student has the same weights with and without a teacher.

    Raises:
        ValueError: the teacher cannot be built, or does not fit the recipe.
    """
    assert recipe.teacher is not None
    require(
        not recipe.phases,
        "recipe: a teacher must be used without phases, because it has the classes of one data set;"
        f" got {len(recipe.phases)}",
    )
    with torch.random.fork_rng(devices=[]):
        teacher = build_part("teacher", recipe.teacher, Teacher, data)
    subject = f"teacher: {recipe.teacher.target.__name__}"
    require_members(subject, teacher, ("label",))
    for name in ("forward", "identity"):
        require(
            getattr(type(teacher), name) is not getattr(Teacher, name),
            f"{subject} must override {name}; it does not",
        )
    repeats = recipe.data.kwargs.get("repeats", 1)
    mixing = None if recipe.mixing is None else recipe.mixing.label
    require(
        teacher.cache is None or (mixing is None and repeats == 1),
        "recipe: a teacher with a cache needs samples without mixing and repeats, because the cache"
        f" has one prediction per sample and epoch; got mixing={mixing}, repeats={repeats}; omit"
        " teacher.cache",
    )
    require(
        teacher.probe is None or repeats == 1,
        "recipe: a probe needs samples without repeats, because it is fitted on one view of each"
        f" sample; got repeats={repeats}",
    )
    return teacher


def open_teaching(
    recipe: Recipe,
    data: Data,
    split: Split,
    *,
    folder: Path,
    steps: int,
    ranks: Ranks,
    tracker: Tracker,
    threads: int,
    is_fresh: bool,
) -> Teaching:
    """Prepare the teacher for the first batch. Collective.

    Args:
        steps: the number of global batches of the whole run.
        is_fresh: whether the run starts at step 0. The teacher's accuracy is then reported.
    """
    teacher = ranks.all_or_raise(lambda: build_teacher(recipe, data)).to(ranks.device)
    ranks.all_or_raise(lambda: check_precision("teacher", teacher.precision, ranks.device))
    probe, cache, predictions = teacher.probe, teacher.cache, None
    key = {
        "data": data.fingerprint(),
        "views": encode(recipe.data, paths=False),
        "teacher": teacher.identity(),
        # the settings of a network_teacher's neurons are in no weight
        "model": encode(
            recipe.teacher.kwargs.get("model") if recipe.teacher else None, paths=False
        ),
        "probe": None if probe is None else asdict(probe),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    results_folder = (folder / "teacher" if cache is None else Path(cache.folder)) / name
    results_folder.mkdir(parents=True, exist_ok=True)
    if probe is not None:
        state = ranks.broadcast_object(
            lambda: _fit_head(teacher, probe, data, results_folder, tracker, threads)
        )
        classes, features = state["weight"].shape
        head = nn.Linear(features, classes, device="meta")
        head.load_state_dict(state, assign=True)
        teacher.head = head.requires_grad_(False).to(ranks.device)
    accuracy = _accuracy(recipe, data, split, teacher, results_folder, ranks, threads)
    if is_fresh:
        # `firing_rate` is omitted, because the teacher may have no spiking neurons.
        metrics = {name: x for name, x in accuracy.metrics.items() if name != "firing_rate"}
        tracker.write(
            events.Teacher(teacher=teacher.label, figures={"samples": accuracy.samples, **metrics})
        )
    if cache is not None:
        cache_folder = results_folder / f"seed-{recipe.seed}-{cache.storage}"
        ranks.broadcast_object(
            lambda: cache.check(
                cache_folder, predictions=steps * recipe.batch_size, classes=data.classes
            )
        )
        predictions = CachedPredictions(
            cache_folder, classes=data.classes, storage=cache.storage, rank=ranks.rank
        )
    return Teaching(teacher=teacher, accuracy=accuracy, cache=predictions)


def _fit_head(
    teacher: Teacher, probe: Probe, data: Data, folder: Path, tracker: Tracker, threads: int
) -> dict[str, Tensor]:
    """The weights of the teacher's head, from a file in `folder`. If there is no file, fit the head
    and write the file. Only for rank 0.

    The probe gets `probe.views` views of training samples; None: one view of each sample. Each
    epoch has one view of each sample.
    """
    if stored := sorted(folder.glob("probe-*.safetensors")):
        require(
            _digest(stored[0].read_bytes()) == stored[0].stem.removeprefix("probe-"),
            f"Probe: {stored[0]} must have the checksum in its name; it is damaged: delete the"
            " file, and the probe is fitted again",
        )
        return load_file(stored[0])
    begun, device = time.monotonic(), next(teacher.parameters()).device
    features, targets = [], []
    # Batches of one sample, so that no sample at the end of an epoch is dropped.
    with closing(
        data.train(seed=probe.seed, rank=0, world=1, batch_size=1, micro_batch=1, threads=threads)
    ) as loader:

        def samples() -> Iterator[Batch]:
            for epoch in itertools.count():
                with loader.epoch(epoch) as batches:
                    yield from batches

        views = itertools.islice(samples(), probe.views or loader.samples)
        while chunk := list(itertools.islice(views, FEATURE_BATCH)):
            x_C = torch.cat([each.x for each in chunk])
            batch = move_batch(replace(chunk[0], x=x_C), device)
            features.append(teacher.features(batch.x).cpu())
            targets.append(torch.cat([each.target for each in chunk]))
    features_ND, target_N = torch.cat(features), torch.cat(targets)
    head = probe.fit(features_ND, target_N, data.classes)
    content = save(head.state_dict())
    write_whole(folder / f"probe-{_digest(content)}.safetensors", content)
    tracker.write(
        events.Probe(
            teacher=teacher.label,
            views=len(target_N),
            top1=float((head(features_ND).argmax(-1) == target_N).float().mean()),
            seconds=time.monotonic() - begun,
        )
    )
    return head.state_dict()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


class _OneStepNetwork(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, x_1B: Tensor) -> Tensor:
        return self.teacher(x_1B[0])[None]


def _accuracy(
    recipe: Recipe,
    data: Data,
    split: Split,
    teacher: Teacher,
    folder: Path,
    ranks: Ranks,
    threads: int,
) -> Evaluation:
    """The teacher's accuracy on the evaluation samples of the student. It is stored in `folder` and
    measured once. Collective.
    """
    limit = recipe.evaluation.samples
    file = folder / ("accuracy.json" if limit is None else f"accuracy-{limit}.json")
    known = ranks.broadcast_object(lambda: read_json(file) if file.exists() else None)
    if known is not None:
        return Evaluation(**known)
    with closing(
        data.val(rank=ranks.rank, world=ranks.size, micro_batch=split.micro_batch, threads=threads)
    ) as loader:
        batches = evaluation_batches(loader, 1, ranks, max_samples=limit)
        result = evaluate(_OneStepNetwork(teacher), batches, CrossEntropy(), ranks=ranks).result
    if ranks.rank == 0:
        write_json(file, asdict(result))
    return result

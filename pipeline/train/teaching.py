"""The teacher of a run in one of its processes: built, its probe fitted, its accuracy measured, its
answers cached.

Results of a teacher are stored under a key of everything that determines them, in the folder of its
cache or, without a cache, in the run's folder. So a resume neither fits nor evaluates again.

B batch, K classes, N samples, D features
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
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
from pipeline.train.evaluation import Evaluation, evaluate, inputs
from pipeline.train.objective import CrossEntropy
from pipeline.train.part_checks import build_part, require_members

TOGETHER = 32  # images whose features are computed at a time


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The teacher's answers for a micro-batch, from the cache or the teacher itself."""

    teacher: Teacher
    accuracy: Evaluation
    kept: CachedPredictions | None

    def __call__(self, x_B: Tensor, index_B: Tensor, epoch: int) -> Tensor:
        """The teacher's logits `[B,K]` for one epoch's views of the samples `index_B`, fp32 and
        without a graph.

        If one answer is missing, the teacher computes all of them: the other samples of a batch
        change the last bits of an answer.
        """
        if self.kept is None:
            return self.teacher(x_B)
        if (cached_BK := self.kept.find(epoch, index_B)) is not None:
            return cached_BK.to(x_B.device)
        return self.kept.add(epoch, index_B, self.teacher(x_B))


def build_teacher(recipe: Recipe, data: Data) -> Teacher:
    """The recipe's teacher with its weights. The random numbers for the student's weights stay the
    same.

    Raises:
        ValueError: teacher and recipe do not fit together.
    """
    assert recipe.teacher is not None
    require(
        not recipe.phases,
        "recipe: a teacher knows the classes of one data set, so it takes no phases; got"
        f" {len(recipe.phases)}",
    )
    with torch.random.fork_rng(devices=[]):
        teacher = build_part("teacher", recipe.teacher, Teacher, data)
    who = f"teacher: {recipe.teacher.target.__name__}"
    require_members(who, teacher, ("label",))
    for name in ("forward", "identity"):
        require(
            getattr(type(teacher), name) is not getattr(Teacher, name),
            f"{who} must override {name}; it does not",
        )
    repeats = recipe.data.kwargs.get("repeats", 1)
    mixing = None if recipe.mixing is None else recipe.mixing.label
    require(
        teacher.cache is None or (mixing is None and repeats == 1),
        "recipe: a teacher's cache keeps one answer a sample and epoch, so it takes neither mixed"
        f" nor repeated samples; leave teacher.cache out; got mixing={mixing}, repeats={repeats}",
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
        is_fresh: the run begins, so the teacher's accuracy is reported.
    """

    teacher = ranks.all_or_raise(lambda: build_teacher(recipe, data)).to(ranks.device)
    ranks.all_or_raise(lambda: check_precision("teacher", teacher.precision, ranks.device))
    probe, cache, kept = teacher.probe, teacher.cache, None
    key = {
        "data": data.fingerprint(),
        "views": encode(recipe.data, paths=False),
        "teacher": teacher.identity(),
        "probe": None if probe is None else asdict(probe),
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = (folder / "teacher" if cache is None else Path(cache.folder)) / name
    place.mkdir(parents=True, exist_ok=True)
    if probe is not None:
        state = ranks.broadcast_object(
            lambda: _fitted(teacher, probe, data, place, tracker, threads)
        )
        classes, features = state["weight"].shape
        head = nn.Linear(features, classes, device="meta")
        head.load_state_dict(state, assign=True)
        teacher.head = head.requires_grad_(False).to(ranks.device)
    accuracy = _accuracy(recipe, data, split, teacher, place, ranks, threads)
    if is_fresh:
        figures = {"samples": accuracy.samples, **accuracy.metrics}
        del figures["firing_rate"]  # a teacher need not spike
        tracker.write(events.Teacher(teacher=teacher.label, figures=figures))
    if cache is not None:
        answers = place / f"seed-{recipe.seed}-{cache.storage}"
        ranks.broadcast_object(
            lambda: cache.check(
                answers, predictions=steps * recipe.batch_size, classes=data.classes
            )
        )
        kept = CachedPredictions(
            answers, classes=data.classes, storage=cache.storage, rank=ranks.rank
        )
    return Teaching(teacher=teacher, accuracy=accuracy, kept=kept)


def _fitted(
    teacher: Teacher, probe: Probe, data: Data, place: Path, tracker: Tracker, threads: int
) -> dict[str, Tensor]:
    """The head's weights. They are read if they were stored before, else fitted and stored. For
    rank 0.

    The probe sees one view of each sample of the training part per epoch, for as many epochs as it
    needs.
    """
    if kept := sorted(place.glob("probe-*.safetensors")):
        require(
            _digest(kept[0].read_bytes()) == kept[0].stem.removeprefix("probe-"),
            f"Probe: {kept[0]} must be what its name says; it is damaged: delete it, and it is"
            " fitted again",
        )
        return load_file(kept[0])
    begun, device = time.monotonic(), next(teacher.parameters()).device
    features, targets = [], []
    # Batches of one sample, so that no sample at the end of an epoch is dropped.
    one = {"batch_size": 1, "micro_batch": 1}
    with closing(data.train(seed=probe.seed, rank=0, world=1, threads=threads, **one)) as loader:

        def samples() -> Iterator[Batch]:
            for epoch in itertools.count():
                with loader.epoch(epoch) as batches:
                    yield from batches

        views = itertools.islice(samples(), probe.views or loader.samples)
        while chunk := list(itertools.islice(views, TOGETHER)):
            features.append(
                teacher.features(torch.cat([each.x for each in chunk]).to(device)).cpu()
            )
            targets.append(torch.cat([each.target for each in chunk]))
    features_ND, target_N = torch.cat(features), torch.cat(targets)
    head = probe.fit(features_ND, target_N, data.classes)
    content = save(head.state_dict())
    write_whole(place / f"probe-{_digest(content)}.safetensors", content)
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


class _AsNetwork(nn.Module):
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
    place: Path,
    ranks: Ranks,
    threads: int,
) -> Evaluation:
    """The teacher's accuracy on the samples that the student is evaluated on. It is stored in
    `place`. Collective.
    """
    limit = recipe.evaluation.samples
    file = place / ("accuracy.json" if limit is None else f"accuracy-{limit}.json")
    known = ranks.broadcast_object(lambda: read_json(file) if file.exists() else None)
    if known is not None:
        return Evaluation(**known)
    with closing(
        data.val(rank=ranks.rank, world=ranks.size, micro_batch=split.micro_batch, threads=threads)
    ) as loader:
        batches = inputs(loader, 1, ranks, most=limit)
        result = evaluate(_AsNetwork(teacher), batches, CrossEntropy(), ranks=ranks).result
    if ranks.rank == 0:
        write_json(file, asdict(result))
    return result

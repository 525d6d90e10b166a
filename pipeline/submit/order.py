"""What is asked of a scheduler, whichever it is. It needs neither the data nor the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.counts import is_count
from pipeline.elastic import told
from pipeline.units import counted

OWN = ("--name", "--runs", "--address", "--workers", "--or-resume")
"""options of a launch that follow from the order"""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One launch. What only one scheduler asks of a name or an image, its own `render` asks.

    Args:
        words: what `spiketrain launch` is given: recipes, and options other than OWN and --inline.
        name: of the run or suite, and of the job.
        workers: processes that train together; several numbers, ascending: as many of these as there is room for, from time to
            time; None: as many as the scheduler's template makes of the machines.
        image: the container image that the machines use (empty: none).
        runs: where runs live, as the machines that train see it.
        infra: the scheduler's folder of templates, such as infra/slurm or infra/k8s/overlays/cpu/job.
    """

    words: tuple[str, ...]
    name: str
    workers: int | tuple[int, ...] | None
    image: str
    runs: str
    infra: Path

    def __post_init__(self) -> None:
        if not self.words or self.words[0].startswith("-"):
            raise ValueError(f"order: words must begin with a recipe; got {' '.join(self.words) or 'none'}")
        for name, texts in (("words", self.words), ("runs", (self.runs,)), ("image", (self.image,))):
            for text in texts:
                if any(ord(character) < 32 or ord(character) == 127 for character in text):
                    raise ValueError(f"order: {name} must be free of control characters; got {text!r}")
        for word in self.words:
            option = word.partition("=")[0]
            if option in OWN:
                raise ValueError(f"order: {option} is the job's own to say; got it among the words of the launch")
            if option == "--inline":
                raise ValueError("order: a job trains with workers of Ray; got --inline, which trains in one process without")
        if self.workers is not None and not (self.sizes and all(is_count(each) for each in self.sizes)):
            raise ValueError(f"order: workers must be 1 or more; got {self.workers!r}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every number of workers that the run may have; none where the scheduler's template says how many."""
        if self.workers is None:
            return ()
        return self.workers if isinstance(self.workers, tuple) else (self.workers,)

    @property
    def asked(self) -> str:
        """The word after --workers."""
        assert self.sizes, "only a template that makes a number of the machines is given none"
        return told(self.sizes)

    def option(self, name: str) -> str | None:
        """The value of an option among the words, as a word of its own or after =; the last one counts."""
        value = None
        for word, after in zip(self.words, (*self.words[1:], None), strict=True):
            if word == name:
                value = after
            elif word.startswith(f"{name}="):
                value = word.partition("=")[2]
        return value

    @property
    def side_by_side(self) -> int:
        """Runs at a time that need room of their own; one where they take what room there is (auto).

        Raises:
            ValueError: the words ask for another number than a count.
        """
        asked = self.option("--side-by-side") or "1"
        if asked == "auto":
            return 1
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"order: --side-by-side must be a number of runs or auto; got {asked}")
        return int(asked)

    def wanted(self, workers: int) -> str:
        """`4 workers`, or `2 runs side by side of 4 workers`."""
        runs = "" if self.side_by_side == 1 else f"{self.side_by_side} runs side by side of "
        return runs + counted(workers, "worker")

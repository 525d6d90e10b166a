"""What a rule was seen to need at small batches, as functions of the batch and of the number of
time steps.

a quantity of a batch of B samples and T time steps        a + b B + c T + d B T         fitted to
four small batches"""

# B samples of a worker, T time steps

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.forecast.asked import Asking
from pipeline.forecast.bench import Needs
from pipeline.measure.traffic import Device
from pipeline.recipe.recipe import Recipe
from pipeline.rules.base import Rule
from pipeline.train.tasks import build_data

EFFICIENCY = 0.4
"""of the roofline that training reaches: an assumption, to be replaced by a measurement"""


@dataclass(frozen=True)
class Bilinear:
    """a + b B + c T + d B T through four points."""

    a: float
    b: float
    c: float
    d: float

    @classmethod
    def through(cls, values: Mapping[tuple[int, int], float]) -> Bilinear:
        """`values` at each (B, T) of two B and two T; of two B and one T, for that T alone."""
        B, T = (sorted({place[axis] for place in values}) for axis in (0, 1))
        B1, B2 = B
        if len(T) == 1:
            slope_B = (values[B2, T[0]] - values[B1, T[0]]) / (B2 - B1)
            return cls(values[B1, T[0]] - slope_B * B1, slope_B, 0.0, 0.0)
        T1, T2 = T
        slope = {T_: (values[B2, T_] - values[B1, T_]) / (B2 - B1) for T_ in T}
        d = (slope[T2] - slope[T1]) / (T2 - T1)
        b = slope[T1] - d * T1
        at_0 = {T_: values[B1, T_] - slope[T_] * B1 for T_ in T}
        c = (at_0[T2] - at_0[T1]) / (T2 - T1)
        return cls(at_0[T1] - c * T1, b, c, d)

    def __call__(self, B: float, T: float) -> float:
        return self.a + self.b * B + self.c * T + self.d * B * T


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one worker was seen to need, or a card would, at small batches of one rule."""

    rule: Rule
    saved_bytes: Bilinear
    state_bytes: Bilinear
    rule_bytes: float
    """of what the rule learns by itself, and notes of a batch"""
    seconds: Bilinear
    """of forward and backward here; of a card, its roofline at EFFICIENCY"""
    launches_s: Bilinear
    """of a card's kernels; here 0"""
    backward_calls: Bilinear

    def compute_s(self, micro: int, T: int) -> float:
        return max(self.seconds(micro, T), self.launches_s(micro, T))


@dataclass(frozen=True, kw_only=True)
class TeacherProfile:
    """What a teacher was seen to need of one worker, or would of a card, whatever the rule and the
    number of time steps.
    """

    label: str
    bytes: int
    """of its weights and statistics"""
    seconds: Bilinear
    """of its answers for a batch, which has no time steps: at T = 1"""
    launches_s: Bilinear

    def __call__(self, micro: int) -> float:
        """Seconds of so many samples."""
        return max(self.seconds(micro, 1), self.launches_s(micro, 1))


COUNTED = 8
"""samples, at most, where operations and bytes are counted and not timed: what a card holds may not
fit this machine
"""


def sizes_for(recipe: Recipe, workers: int, *, card: Device | None) -> tuple[int, int]:
    """Two sizes of batches, below that of a worker where it is 3 or more; small ones, where they
    stand for a `card`.

    What is timed is not much smaller than what is planned, for what errs is extrapolated with the
    rest.
    """
    micro = recipe.split(workers).micro_batch
    if card is not None:
        larger = min(max(2, micro // 2), COUNTED)
        return larger // 2, larger
    larger = max(2, 3 * micro // 4)
    return min(max(1, micro // 2), larger - 1), larger


def times_for(recipe: Recipe, rule: Rule) -> tuple[int, ...]:
    """Two numbers of time steps that the rule can train at, around the recipe's where it can; of
    recordings, their own.
    """
    T = recipe.time_steps
    if len(build_data(recipe).shape) == 4:
        return (T,)

    def can(steps: int) -> bool:
        try:
            rule.check_steps(steps)
        except ValueError:
            return False
        return True

    fitting = [
        steps
        for steps in dict.fromkeys((T - 1, T + 1, T // 2, 2 * T, 3 * T))
        if steps >= 1 and can(steps)
    ]
    if len(fitting) < 2:  # of which it says itself why
        rule.check_steps(T)
    return tuple(sorted(fitting[:2]))


def profile_of(
    rule: Rule,
    needs: Mapping[tuple[int, int], Needs],
    seconds: Mapping[tuple[int, int], float] | None,
    recipe: Recipe,
    card: Device | None,
) -> Profile:
    """From what was seen at each (B, T); `seconds` of machines like this one, None for a `card`."""
    if card is None:
        assert seconds is not None
        launches = dict.fromkeys(needs, 0.0)
    else:
        seconds = {
            place: each.traffic.busy(card, precision=recipe.precision) / EFFICIENCY
            for place, each in needs.items()
        }
        launches = {place: each.traffic.kernels * card.launch for place, each in needs.items()}
    return Profile(
        rule=rule,
        saved_bytes=Bilinear.through(
            {place: each.peak_saved_bytes for place, each in needs.items()}
        ),
        state_bytes=Bilinear.through({place: each.state_bytes for place, each in needs.items()}),
        rule_bytes=max(each.rule_bytes for each in needs.values()),
        seconds=Bilinear.through(seconds),
        launches_s=Bilinear.through(launches),
        backward_calls=Bilinear.through(
            {place: each.backward_calls for place, each in needs.items()}
        ),
    )


def teacher_profile(
    recipe: Recipe, x_B: Tensor, sizes: tuple[int, int], card: Device | None
) -> TeacherProfile | None:
    """Of the recipe's teacher, asked about `sizes` of the samples `x_B` as the loader gives them;
    None without one.

    Raises: ValueError for a precision of the teacher's that the card's sheet does not give.
    """
    if recipe.teacher is None:
        return None
    asking = Asking(recipe, x_B.device)
    if card is None:
        fewer, more = (asking.seconds(x_B[:B]) for B in sizes)
        # Fewer samples take no longer: else what the clock errs by would be drawn out to a teacher
        # that takes no time at all.
        seconds = {(sizes[0], 1): min(fewer, more), (sizes[1], 1): more}
        launches = dict.fromkeys(seconds, 0.0)
    elif asking.precision not in card.flops:
        raise ValueError(
            f"plan: {card.name}: the teacher's precision must be {', '.join(card.flops)}; got"
            f" {asking.precision}"
        )
    else:
        traffic = {(B, 1): asking.traffic(x_B[:B]) for B in sizes}
        seconds = {
            place: each.busy(card, precision=asking.precision) / EFFICIENCY
            for place, each in traffic.items()
        }
        launches = {place: each.kernels * card.launch for place, each in traffic.items()}
    return TeacherProfile(
        label=asking.label,
        bytes=asking.bytes,
        seconds=Bilinear.through(seconds),
        launches_s=Bilinear.through(launches),
    )

"""What the soak and the faults count by sees a sample that a resume loses or doubles, whoever has
trained it before.
"""

import pytest

from benchmarks.survived import Record, survived, wrong

# two steps an epoch
ABOUT = {"batch_size": 4, "samples": 8, "workers": 2}


def start(step: int, *, began: float) -> Record:
    return {"event": "start", "step": step, "began": began}


def trained(*steps: int, begun: float) -> list[Record]:
    """By both ranks, a step a second from then on: the first half of the samples in an even step,
    the other in an odd one.
    """
    return [
        {
            "time": begun + n,
            "step": step,
            "rank": rank,
            "samples": [f"{step % 2 * 4 + rank * 2 + each}" for each in range(2)],
        }
        for n, step in enumerate(steps)
        for rank in range(2)
    ]


def test_what_was_rolled_back_and_trained_again_counts_once():
    records = trained(*range(7), begun=1.0) + trained(*range(4, 8), begun=21.0)
    starts = [start(0, began=0.0), start(4, began=20.0)]
    assert wrong(records, starts, steps=8, **ABOUT) == []
    assert [(each["step"], each["time"]) for each in survived(records, starts)[8:12:2]] == [
        (4, 21.0),
        (5, 22.0),
    ]


LOST, STRANGE = trained(*range(4), begun=1.0), trained(*range(3), begun=1.0)
LOST[-1] = {**LOST[-1], "samples": ["6", "2"]}
STRANGE[-1] = {**STRANGE[-1], "samples": ["2", "strange"]}


@pytest.mark.parametrize(
    ("records", "resumes", "steps", "said"),
    [
        pytest.param(
            trained(*range(7), begun=1.0) + trained(6, 7, begun=21.0),
            [start(4, began=20.0)],
            8,
            "2 steps were never trained, the first of them 4",
            id="a resume passes over steps that the attempt before had trained",
        ),
        pytest.param(
            trained(*range(8), begun=1.0) + trained(6, begun=21.0),
            [start(6, began=20.0)],
            8,
            "1 steps were never trained, the first of them 7",
            id="a resume does not train the last step again",
        ),
        pytest.param(
            trained(*range(4), begun=1.0)[:-1],
            [],
            4,
            "1 steps were never trained, the first of them 3",
            id="one rank alone has trained a step",
        ),
        pytest.param(
            LOST,
            [],
            4,
            "epoch 1: 1 doubled, 1 lost, 0 of no other epoch",
            id="a sample is in two batches of an epoch and another in none",
        ),
        pytest.param(
            trained(*range(4), begun=1.0) + trained(3, begun=11.0),
            [],
            4,
            "epoch 1: 4 doubled, 0 lost, 0 of no other epoch",
            id="one attempt trains a batch twice",
        ),
        pytest.param(
            STRANGE,
            [],
            3,
            "epoch 1: 0 doubled, 0 lost, 1 of no other epoch",
            id="a sample is of no other epoch",
        ),
    ],
)
def test_what_is_lost_doubled_or_strange_is_named(
    records: list[Record], resumes: list[Record], steps: int, said: str
):
    assert wrong(records, [start(0, began=0.0), *resumes], steps=steps, **ABOUT) == [said]

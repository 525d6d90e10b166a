"""What the soak and the faults count by sees a sample that a resume loses or doubles, whoever has
trained it before.
"""

from benchmarks.survived import Record, survived, wrong

ABOUT = {"batch_size": 4, "samples": 8, "workers": 2}
"""two steps an epoch"""


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


def test_steps_that_a_resume_passes_over_are_missing_though_the_attempt_before_had_trained_them():
    records = trained(*range(7), begun=1.0) + trained(6, 7, begun=21.0)
    starts = [start(0, began=0.0), start(4, began=20.0)]
    assert wrong(records, starts, steps=8, **ABOUT) == [
        "2 steps were never trained, the first of them 4"
    ]
    at_the_end = trained(*range(8), begun=1.0) + trained(6, begun=21.0)
    assert wrong(at_the_end, [*starts[:1], start(6, began=20.0)], steps=8, **ABOUT) == [
        "1 steps were never trained, the first of them 7"
    ]


def test_a_step_that_one_rank_alone_has_trained_is_missing():
    assert wrong(trained(*range(4), begun=1.0)[:-1], [start(0, began=0.0)], steps=4, **ABOUT) == [
        "1 steps were never trained, the first of them 3"
    ]


def test_a_sample_in_two_batches_of_an_epoch_is_doubled_and_another_lost():
    records = trained(*range(4), begun=1.0)
    records[-1] = {**records[-1], "samples": ["6", "2"]}
    assert wrong(records, [start(0, began=0.0)], steps=4, **ABOUT) == [
        "epoch 1: 1 doubled, 1 lost, 0 of no other epoch"
    ]


def test_a_batch_that_one_attempt_trains_twice_is_doubled():
    records = trained(*range(4), begun=1.0) + trained(3, begun=11.0)
    assert wrong(records, [start(0, began=0.0)], steps=4, **ABOUT) == [
        "epoch 1: 4 doubled, 0 lost, 0 of no other epoch"
    ]


def test_a_sample_of_no_other_epoch_is_named():
    records = trained(*range(3), begun=1.0)
    records[-1] = {**records[-1], "samples": ["2", "strange"]}
    assert wrong(records, [start(0, began=0.0)], steps=3, **ABOUT) == [
        "epoch 1: 0 doubled, 0 lost, 1 of no other epoch"
    ]

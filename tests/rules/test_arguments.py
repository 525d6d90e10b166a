"""Where a rule counts - steps, iterations, rows -, nothing but a whole number will do."""

import pytest

from pipeline.rules.bptt import BPTT
from pipeline.rules.dsr import DSR
from pipeline.rules.hlop import HLOP
from pipeline.rules.ide import IDE
from pipeline.rules.ottt import OTTT
from pipeline.rules.sltt import SLTT
from pipeline.rules.spide import SPIDE

ROWS = ((3, 4, 3),)
COUNTED = [
    (lambda value: SLTT(k=value), "SLTT: k must be a whole number in 1..T"),
    (lambda value: SLTT(chunk=value), "SLTT: chunk must be a whole number in 1..T"),
    (lambda value: OTTT(chunk=value), "OTTT: chunk must be a whole number in 1..T"),
    (lambda value: BPTT(value), "BPTT: chunk must be a whole number in 1..T"),
    (lambda value: BPTT(truncate=value), "BPTT: truncate must be a whole number in 1..T"),
    (lambda value: DSR(calibrate=value), "DSR: calibrate must be a whole number >= 0"),
    (lambda value: IDE(iterations=value), "IDE: iterations must be a whole number >= 1"),
    (lambda value: SPIDE(steps=value), "SPIDE: steps must be a whole number >= 1"),
    (
        lambda value: HLOP(SLTT(), rows=ROWS, inner_iterations=value),
        "HLOP: inner_iterations must be a whole number >= 1",
    ),
    (
        lambda value: HLOP(SLTT(), rows=ROWS, lateral_steps=value),
        "HLOP: lateral_steps must be a whole number >= 1",
    ),
]


@pytest.mark.parametrize("value", [True, 2.0, 2.5, "2", -1], ids=repr)
@pytest.mark.parametrize(
    ("make", "rule"), COUNTED, ids=[rule.split(" must")[0] for _, rule in COUNTED]
)
def test_what_is_counted_must_be_a_whole_number(make, rule, value):
    with pytest.raises(ValueError) as refused:
        make(value)
    name = rule.split()[1]
    assert str(refused.value) == f"{rule}; got {name}={value!r}"


@pytest.mark.parametrize(
    "rows",
    ["12", ("12",), (3, 4), ((3, 4.0),), ((3, True),), ((3, -1),), ((),), (), (None,), 12],
    ids=repr,
)
def test_rows_must_be_whole_numbers(rows):
    with pytest.raises(ValueError) as refused:
        HLOP(SLTT(), rows=rows)
    assert (
        str(refused.value)
        == f"HLOP: rows must hold, for each task, a number >= 0 for each synapse; got rows={rows!r}"
    )


@pytest.mark.parametrize("rate", [True, "0.1", ("0.1",), (0.1, 0), (), None], ids=repr)
def test_learning_rates_must_be_numbers(rate):
    with pytest.raises(ValueError) as refused:
        HLOP(SLTT(), rows=ROWS, learning_rate=rate)
    assert (
        str(refused.value) == f"HLOP: learning_rate must be numbers > 0; got learning_rate={rate!r}"
    )

import json
import math
import re
from typing import Any

import plotly.graph_objects as go
import pytest

from pipeline.core.units import format_quantity, unit_of
from pipeline.forecast.sweep import sweep
from pipeline.measure.constants import PARTS, REST, SECTIONS
from pipeline.recipe.recipe import spec
from pipeline.report.claims import SuiteReport, parse_result
from pipeline.report.drawing import Figure, Missing, Table, harmless, plain
from pipeline.report.figures import learning_curves, pareto, ratios, standing, time_parts, trade_off
from pipeline.report.heat_maps import firing_rates, gradient_fidelity, temporal_share
from pipeline.report.page import WEB
from pipeline.report.results import ReportError, Run
from pipeline.report.study import Study
from pipeline.report.sweeps import largest_batches, sweep_figures, sweep_of, swept
from pipeline.report.tables import MEASURED_CAPTION
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.forecast.test_probe import recipe_with
from tests.helpers.hand_made import MACHINE, events, fidelity, recipe, run, study
from tests.helpers.hand_made import made as written

SWEEP = {
    "recipe": "small",
    "commit": "abc",
    "hardware": {"cpu": "a cpu", "cores": 2, "threads": 1, "gpu": "none", "torch": "2.13"},
    "samples": 8,
    "points": [
        {
            "time_steps": T,
            "cost": {
                "rule": rule,
                "peak_saved_bytes": saved,
                "state_bytes": 500,
                "forward_s": 0.25,
                "backward_s": 0.5,
            },
        }
        for rule, at_T in {"BPTT": {1: 1000, 4: 4000}, "SLTT": {1: 1000, 4: 1000}}.items()
        for T, saved in at_T.items()
    ],
}


# The colours of each scheme by name, as page.css has them
COLOURS = {
    scheme: dict(re.findall("--([a-z0-9-]+): (#[0-9a-f]{6});", text))
    for scheme, text in zip(
        ("light", "dark"),
        (WEB / "page.css").read_text().split("color-scheme: dark)")[:2],
        strict=True,
    )
}


def made(one: Figure | Missing) -> Figure:
    assert isinstance(one, Figure), one
    text = json.dumps(one.drawing, allow_nan=False)
    assert set(re.findall('"--([a-z]+(?:-[0-9])?)"', text)) <= COLOURS["light"].keys()
    go.Figure(json.loads(re.sub('"--[^"]*"', '"#123456"', text)))  # refuses what plotly lacks
    return one


def traces(one: Figure) -> dict[str, dict]:
    return {trace["name"]: trace for trace in one.drawing["data"]}


def test_ratios_to_the_baseline():
    figure = made(ratios(study().groups[0]))
    found = {row[1]: (row[0], row[2], row[3], row[5]) for row in figure.table.rows}
    assert found == {
        "saved bytes": ("SLTT", "BPTT", 0.25, 2),
        "saved bytes and states": ("SLTT", "BPTT", pytest.approx(2_001_000 / 8_001_000), 2),
        "compute time": ("SLTT", "BPTT", 0.75, 2),
        "wall clock": ("SLTT", "BPTT", 0.8, 2),
        "inference energy": ("SLTT", "BPTT", pytest.approx(0.75), 2),
    }
    assert traces(figure)["SLTT"]["x"] == [
        0.25,
        pytest.approx(2_001_000 / 8_001_000),
        0.8,
        0.75,
        pytest.approx(0.75),
    ]
    assert "SLTT has the fewest saved bytes, 0.25 of the baseline's" in figure.alt


def test_pareto():
    assert pareto({"a": (1, 1), "b": (2, 2), "c": (2, 1), "d": (3, 2)}) == ["a", "b"]
    assert pareto({"a": (1, 1), "same": (1, 1)}) == ["a", "same"]
    assert pareto({"less": (1, 1), "more": (1, 2)}) == ["more"]
    assert pareto({"dear": (2, 2), "more": (1, 2)}) == ["more"]


def test_trade_off_marks_the_front():
    figure = made(
        trade_off(
            study(run("DFA", top1=0.5, peak_saved_bytes=9_000_000)).groups[0], "peak_saved_bytes"
        )
    )
    on_front = {row[0]: row[6] for row in figure.table.rows}
    assert on_front == {"BPTT": "yes", "SLTT": "yes", "DFA": "no"}
    drawn = traces(figure)
    assert drawn["Pareto front"]["x"] == [2, 8] and drawn["Pareto front"]["y"] == [89.5, 91]
    assert drawn["SLTT"]["x"] == [2, 2] and drawn["SLTT"]["y"] == [89, 90]  # a point for each run
    assert drawn["SLTT"]["text"][1] == (
        "<b>SLTT</b>, seed 1<br>top-1 90.00%<br>saved bytes 2 MB<br>compute time 120 ms"
        "<br>wall clock 16 s"
    )
    assert not drawn["SLTT"]["marker"]["symbol"].endswith("-open") and drawn["DFA"]["marker"][
        "symbol"
    ].endswith("-open")
    made(trade_off(study().groups[0], "wall_s"))


def test_what_diverged_is_named_below_the_front():
    lost = [
        *(run("SLTT-1", seed=seed, state="diverged") for seed in (2, 1)),
        run("DFA", state="diverged"),
    ]
    figure = made(trade_off(study(run("SLTT-1", top1=0.95), *lost).groups[0], "peak_saved_bytes"))
    assert {row[0]: row[6] for row in figure.table.rows} == {
        "BPTT": "no",
        "SLTT": "no",
        "SLTT-1": "yes",
    }
    diverged = " Diverged runs are in no mean: DFA (seed 0), SLTT-1 (seed 1, 2)."
    assert figure.caption.endswith(diverged)
    again = run(
        "SLTT", name="again", state="diverged"
    )  # in a seed in which another run of it finished
    assert "iverged" not in made(trade_off(study(again).groups[0], "peak_saved_bytes")).caption


def test_energy_has_its_operations_and_says_which_samples_they_are_of():
    counted = {
        "macs": 3e6,
        "acs": 5e7,
        "energy_j": 5.88e-5,
        "samples": 60,
        "counted_on": "evenly spread over it",
    }
    runs = (run("BPTT", inference=counted), run("SLTT"))
    figure = made(trade_off(Study(title="t", runs=runs).groups[0], "inference.energy_j"))
    assert figure.table.columns[-3:] == ("measured on cards, joules", "MACs", "ACs")
    assert {row[0]: row[-3:] for row in figure.table.rows} == {
        "BPTT": (None, 3e6, 5e7),
        "SLTT": (None, 1.0, 2.0),
    }
    assert "Joules are not measured on a CPU." in figure.caption
    assert (
        "Counted on 10 and 60 samples, evenly spread over it and the first share." in figure.caption
    )
    assert (
        "For a still image, the layers before the first neuron are computed and counted once"
        in figure.caption
    )
    assert "MACs" not in made(trade_off(study().groups[0], "wall_s")).table.columns
    counted["measured_j"] = 0.25
    on_cards = {**MACHINE, "gpu": "H100"}
    for rules, said in (
        (("BPTT", "SLTT"), f"are {MEASURED_CAPTION}"),
        (("SLTT",), "are not measured: no card reports them"),
    ):
        runs = tuple(
            run(rule, hardware=on_cards, **({"inference": counted} if rule == "BPTT" else {}))
            for rule in rules
        )
        figure = made(trade_off(Study(title="t", runs=runs).groups[0], "inference.energy_j"))
        assert {row[0]: row[-3] for row in figure.table.rows} == {
            rule: 0.25 if rule == "BPTT" else None for rule in rules
        }
        assert f"{said}. Each point is a run" in figure.caption


def test_the_prices_behind_joules_are_named():
    def told(*more: Run) -> str:
        return made(trade_off(study(*more).groups[0], "inference.energy_j")).caption

    assert "never a measurement. Prices of an operation: 45 nm, fp32. Counted on" in told()
    others = [
        run(rule, inference={"energy_j": 1e-6, "samples": 10, "counted_on": "all", **by})
        for rule, by in (("A", {"prices": "x"}), ("B", {}))
    ]
    assert "Prices of an operation: 45 nm, fp32; x; not known. Counted on" in told(*others)


def test_what_was_not_measured_is_missing():
    bare = run(
        activity=None,
        inference=None,
        forward_s=None,
        backward_s=None,
        rest_s=None,
        evaluation_s=None,
    )
    (group,) = Study(title="t", runs=(bare,)).groups
    makers = (firing_rates, gradient_fidelity, temporal_share, time_parts)
    found = [trade_off(group, "inference.energy_j"), *(make(group) for make in makers)]
    assert {type(each) for each in found} == {Missing}


def test_time_by_part():
    figure = made(time_parts(study().groups[0]))
    found = {(row[0], row[1]): row[2] for row in figure.table.rows}
    assert found["BPTT", "backward"] == pytest.approx(0.12) and found[
        "SLTT", "backward"
    ] == pytest.approx(0.08)
    assert found["SLTT", "rest"] == pytest.approx(0.005) and found[
        "BPTT", "evaluation"
    ] == pytest.approx(0.02)
    assert sum(
        float(row[3] or 0) for row in figure.table.rows if row[0] == "BPTT"
    ) == pytest.approx(1)
    assert traces(figure)["backward"]["x"] == pytest.approx([120, 80])


def test_batches_alone_are_in_no_mean_with_whole_runs():
    """A run that goes on knows nothing of its evaluations: it stands for a rule of which no other
    has finished.
    """
    slow = {
        "event": "step",
        "time": 1100.0,
        "attempt": 0,
        "step": 200,
        "metrics": {"forward_s": 1.0},
    }
    going = (run("SLTT", seed=2, state="running", more_events=[slow]), run("OTTT", state="running"))
    figure = made(time_parts(study(*going).groups[0]))
    found = {(row[0], row[1]): row[2] for row in figure.table.rows}
    assert found["SLTT", "forward"] == pytest.approx(0.04) and found[
        "SLTT", "evaluation"
    ] == pytest.approx(0.02)
    assert found["OTTT, batches alone", "forward"] == pytest.approx(0.04)
    assert "A rule without a finished run has the time of its batches alone." in figure.caption
    assert "alone" not in made(time_parts(study().groups[0])).caption


def test_memory_and_time_against_time_steps():
    figure, time = sweep_figures(SWEEP)
    assert figure.table.rows[1] == ("BPTT", 4, 4000, 4500)
    assert traces(figure)["SLTT"]["y"] == [1, 1]
    assert traces(figure)["BPTT, with states"]["y"] == [1.5, 4.5]
    assert "Dotted lines include states: membranes" in figure.caption
    assert time.table.rows[1] == ("BPTT", 4, 0.75) and traces(time)["BPTT"]["y"] == [750, 750]
    assert time.alt == "At T = 4, BPTT takes 750 ms, the most, and SLTT takes 750 ms, the least."
    points = [
        {**point, "cost": {**point["cost"], "forward_s": point["time_steps"]}}
        for point in SWEEP["points"]
    ]
    _, time = sweep_figures({**SWEEP, "points": points[:3]})
    assert time.alt == "At T = 4, BPTT takes 4500 ms."
    assert (
        figure.alt
        == "BPTT saves 4 times as many bytes at T = 4 as at T = 1; SLTT saves 1 times as many bytes"
        " at T = 4 as at T = 1."
    )
    assert "commit abc, a cpu" in figure.caption


def test_no_two_of_many_parts_or_rules_are_drawn_alike():
    """There are eight colours, and more parts of a batch's time."""
    spent = {f"{name}_s": 1.0 for name in (*PARTS, REST, *SECTIONS)}
    parts = traces(made(time_parts(Study(title="t", runs=(run(**spent),)).groups[0]))).values()
    assert len(parts) == len(spent) - 1 > 8 and "fidelity" not in traces(
        made(time_parts(Study(title="t", runs=(run(**spent),)).groups[0]))
    )
    bars = [(each["marker"]["color"], each["marker"]["pattern"].get("shape", "")) for each in parts]
    assert len(set(bars)) == len(bars)
    cost = SWEEP["points"][0]["cost"]
    points = [{"time_steps": 1, "cost": {**cost, "rule": f"rule {count}"}} for count in range(20)]
    rules = traces(sweep_figures({**SWEEP, "points": points})[0]).values()
    assert len({(each["line"]["color"], each["marker"]["symbol"]) for each in rules}) == 20


def test_firing_rates_are_means_over_runs():
    more = [
        {
            "name": "first",
            "neurons": 100,
            "samples": 20,
            "rates": [0.1, 0.05],
            "silent": 0.0,
            "saturated": 0.0,
        }
    ]
    (group,) = Study(
        title="t",
        runs=(run(activity=more), run(seed=1, activity=[{**more[0], "rates": [0.3, 0.15]}])),
    ).groups
    assert made(firing_rates(group)).table.rows == (
        ("BPTT", "first", 1, pytest.approx(0.2), 0.0, 0.0),
        ("BPTT", "first", 2, pytest.approx(0.1), 0.0, 0.0),
    )


def test_gradients():
    group = study(run("SLTT", seed=2, more_events=fidelity())).groups[0]
    assert made(gradient_fidelity(group)).table.rows == (
        ("first", "SLTT", 0.75),
        ("second", "SLTT", 1.0),
    )
    shares = made(temporal_share(group))
    assert shares.table.rows[:2] == (("first", "start", 0.5), ("first", "epoch 1", 0.25))
    assert shares.table.rows[2] == ("second", "start", None)
    looked_too = run("BPTT", name="bptt", more_events=fidelity())
    for group, of in (
        (study(looked_too, run("SLTT", seed=2, more_events=fidelity())), "sltt-2"),
        (study(looked_too), "bptt"),
    ):
        assert f"in the run {of}." in made(temporal_share(group.groups[0])).caption


def test_a_comparison_that_is_to_come_is_not_called_none():
    def why(*more: Run) -> list[str]:
        return [one.why for one in _maps(study(*more)) if isinstance(one, Missing)]

    looking = {
        rule: run(
            rule,
            name=f"new-{rule}",
            recipe=recipe(rule, evaluation={"fidelity_every": 1}),
        )
        for rule in ("BPTT", "SLTT")
    }
    unasked = run(
        "SLTT",
        name="none",
        recipe=recipe("SLTT", evaluation={"fidelity_every": 0}),
    )
    hint = "--set evaluation.fidelity_every=1 compares them after each epoch"
    assert why(unasked) == 2 * [f"no run compared its gradient with BPTT's; {hint}"]
    assert why(looking["SLTT"]) == 2 * ["no comparison of gradients yet in new-SLTT"]
    assert why(looking["BPTT"]) == [
        why()[0],
        "no comparison of gradients yet in new-BPTT",
    ]  # which has no cosine with itself


def _maps(of: Study) -> tuple[Figure | Missing, Figure | Missing]:
    return gradient_fidelity(of.groups[0]), temporal_share(of.groups[0])


def test_a_gradient_that_leads_away_is_not_drawn_as_one_at_a_right_angle():
    def drawn(cosine: float) -> tuple[float, str]:
        told = fidelity()
        told[1]["cosines"]["SLTT"]["first"] = cosine
        figure = made(gradient_fidelity(study(run("SLTT", seed=2, more_events=told)).groups[0]))
        return figure.drawing["data"][0]["zmin"], figure.caption

    assert (
        drawn(-0.5)[0] == -0.5
        and "0: a right angle; below 0: an opposing direction. The" in drawn(-0.5)[1]
    )
    assert drawn(0.5)[0] == 0 and "below 0" not in drawn(0.5)[1]


def test_learning_curves_mark_restarts():
    figure = made(learning_curves(study(run("SLTT", seed=5, restart=True)).groups[0]))
    (restart,) = [row for row in figure.table.rows if row[3] == "restart"]
    assert restart[:7] == ("sltt-5", "SLTT", 5, "restart", 50, 1.0, 11)
    drawn = traces(figure)["restart"]
    assert (drawn["x"], drawn["y"]) == ([1], [pytest.approx(40)])
    assert "restart" not in traces(made(learning_curves(study().groups[0])))


def test_a_rule_is_in_the_legend_though_its_first_run_has_no_point_yet():
    begun = written("begun", events("SLTT")[:1], state="running", recipe=recipe("SLTT"))
    group = study(begun).groups[0]
    assert group.of("SLTT")[0].name == "begun"
    drawn = made(learning_curves(group)).drawing["data"]
    assert [trace["name"] for trace in drawn if trace["showlegend"]] == ["BPTT", "SLTT"]


def test_what_is_done_again_is_told_below_the_curves():
    going = written(
        "going",
        events("SLTT", restart=True)[:6],
        state="running",
        recipe=recipe("SLTT"),
        redone="kept",
    )
    figure = made(learning_curves(study(going).groups[0]))
    assert "from before the restart until it has repeated them" in figure.caption
    assert [row[4] for row in figure.table.rows if row[0] == "going" and row[3] == "training"] == [
        25,
        50,
        60,
    ]
    assert (
        "earlier batches"
        not in made(learning_curves(study(run("SLTT", seed=5, restart=True)).groups[0])).caption
    )


@pytest.mark.parametrize(
    ("points", "told"),
    [
        ([[1, 0.5], [2, 0.94]], "4.0 points below the published run at epoch 2"),
        ([[1, 0.5], [2, 0.905]], "on track, 0.5 points below the published run at epoch 2"),
        ([[1, 0.5], [5, 0.99]], "on track, 30.0 points above the published run at epoch 1"),
        ([[5, 0.99]], "no evaluation yet at a published epoch"),
    ],
)
def test_beside_the_published_run(points: list, told: str):
    one = run(recipe=recipe(published=points))
    assert standing(one) == told
    figure = made(learning_curves(Study(title="t", runs=(one,)).groups[0]))
    assert f"bptt-0: {told}" in figure.alt and traces(figure)["published, BPTT"]["x"] == [
        epoch for epoch, _ in points
    ]
    assert [row[5:8] for row in figure.table.rows if row[3] == "published"] == [
        (epoch, None, top1) for epoch, top1 in points
    ]


def test_a_run_of_another_setting_than_the_published_log_is_shown_beside_it_and_not_judged():
    beside = {
        "published": [[1, 0.5], [2, 0.905]],
        "published_setting": [["time_steps", 4], ["model.over", "time"]],
    }
    other = run(recipe=recipe(**beside))
    difference = "time_steps 4 published, 2 here, model.over time published, not set here"
    told = f"not judged, because the published log is for another setting: {difference}"
    assert standing(other) == told
    figure = made(learning_curves(Study(title="t", runs=(other,)).groups[0]))
    assert (
        told in figure.alt
        and "on track" not in figure.alt
        and traces(figure)["published, BPTT"]["x"] == [1, 2]
    )
    assert f"The published setting differs: {difference}." in figure.caption
    model = {"target": "pipeline.models.x.net", "kwargs": {"over": "time"}}
    alike = run(recipe=recipe(**beside, time_steps=4, model=model))
    assert standing(alike) == "on track, 0.5 points below the published run at epoch 2"


def test_each_published_log_is_drawn_once_and_named_after_the_rules_that_carry_it():
    """It stands beside the study key: runs that are compared may carry another, or none."""
    mine, theirs = [[1, 0.5], [2, 0.9]], [[2, 0.7]]
    runs = [
        run(rule, seed=seed, recipe=recipe(rule, published=log))
        for rule, log in (("BPTT", mine), ("SLTT", theirs), ("SLTT-1", mine), ("OTTT", ()))
        for seed in (0, 1)
    ]
    figure = made(learning_curves(Study(title="t", runs=tuple(runs)).groups[0]))
    drawn = [trace for trace in traces(figure).values() if trace["name"].startswith("published")]
    assert [(each["name"], each["x"], each["y"]) for each in drawn] == [
        ("published, BPTT, SLTT-1", [1, 2], [50, 90]),
        ("published, SLTT", [2], [70]),
    ]
    assert len({each["line"]["color"] for each in drawn}) == 2
    assert [(row[1], row[5], row[7]) for row in figure.table.rows if row[3] == "published"] == [
        ("BPTT, SLTT-1", 1, 0.5),
        ("BPTT, SLTT-1", 2, 0.9),
        ("SLTT", 2, 0.7),
    ]
    assert (
        "Stars" in figure.caption
        and "Stars" not in made(learning_curves(study().groups[0])).caption
    )


def test_a_long_curve_is_conditions_of_means_not_in_some_of_its_points():
    """One step in two told 1, the others 0: to leave out points in between would show a network
    that has learnt, or has not.
    """
    begun = events()[0]
    told = [
        {
            "event": "step",
            "time": 1000.0 + at,
            "attempt": 0,
            "step": 10 * at,
            "metrics": {"loss": at % 3, "top1": at % 2},
        }
        for at in range(1, 1201)
    ]
    told[-1]["step"] += 30  # a point of four times the batches
    of_none = {**told[5], "metrics": {"loss": math.nan, "top1": 0}}
    long = written("long", [begun, *told[:5], of_none, *told[6:]], state="running", recipe=recipe())
    figure = made(learning_curves(Study(title="t", runs=(long,)).groups[0]))
    rows = [row for row in figure.table.rows if row[3] == "training"]
    assert len(rows) == 300 and [row[4] for row in rows[:2]] == [40, 80] and rows[-1][4] == 12_030
    assert {row[7] for row in rows[:-1]} == {0.5} and rows[-1][7] == pytest.approx(2 / 7)
    assert rows[0][8] == pytest.approx((1 + 2 + 0 + 1) / 4) and rows[1][8] == pytest.approx(
        (2 + 1 + 2) / 3
    )
    assert traces(figure)["BPTT"]["y"] == pytest.approx([*299 * [50], 200 / 7])
    said = "A curve of more than 300 points is reduced to at most 300 means, here and in the CSV."
    assert said in figure.caption and said not in made(learning_curves(study().groups[0])).caption
    whole = written("whole", [begun, *told[:300]], state="running", recipe=recipe(), curve_every=2)
    figure = made(learning_curves(Study(title="t", runs=(whole,)).groups[0]))
    assert [row[7] for row in figure.table.rows] == [
        at % 2 for at in range(1, 301)
    ] and said not in figure.caption
    assert (
        "Only some points of a long journal are read; no mean includes the others."
        in figure.caption
    )


def test_names_are_text_in_drawings_and_in_spreadsheets():
    group = study(run("<b>x</b>")).groups[0]
    assert "&lt;b&gt;x&lt;/b&gt;" in traces(made(ratios(group))) and "<b>x</b>" not in traces(
        made(ratios(group))
    )
    assert plain("a<b&c") == "a&lt;b&amp;c"
    assert harmless("=1+1") == "'=1+1" and harmless(-1.5) == -1.5
    assert [harmless(text) for text in ("-inf", "-x", "+1", "@x")] == ["-inf", "'-x", "+1", "'@x"]
    assert (
        Table(columns=("a", "b"), rows=(("x,y", None), ('q"', 0.1))).to_csv()
        == 'a,b\n"x,y",\n"q""",0.1\n'
    )


def test_units():
    units = (unit_of("B", [5, 2_000_000]), unit_of("s", [7300]), unit_of("J", [3e-9]))
    assert units == ((1e6, "MB"), (3600, "h"), (1e-9, "nJ"))
    texts = (format_quantity(3e-6, kind="J"), format_quantity(90.0, kind="s"))
    assert texts == ("3 µJ", "90 s")


@pytest.mark.parametrize("colours", COLOURS.values(), ids=COLOURS)
def test_colours_keep_their_contrast(colours: dict[str, str]):
    assert colours.keys() == COLOURS["light"].keys()
    for name in (*(f"series-{index}" for index in range(8)), "ink", "muted", "accent"):
        for paper in ("paper", "page"):
            assert _contrast(colours[name], colours[paper]) >= 4.5, name


def _contrast(one: str, other: str) -> float:
    lights = sorted(map(_luminance, (one, other)))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(color: str) -> float:
    parts = [int(part, 16) / 255 for part in re.findall("..", color[1:])]
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def at_largest(sizes: dict[tuple[str, int], int]) -> dict[str, Any]:
    """SWEEP with a largest batch of each rule and T, which takes 0.75 s."""
    points = [
        {**point, "largest_batch": sizes[point["cost"]["rule"], point["time_steps"]]}
        for point in SWEEP["points"]
    ]
    return {
        **SWEEP,
        "memory_bytes": 10**9,
        "points": [{**point, "at_largest": point["cost"]} for point in points],
    }


LARGEST = at_largest({("BPTT", 1): 120, ("BPTT", 4): 30, ("SLTT", 1): 120, ("SLTT", 4): 100})


def test_the_speed_at_a_rules_own_largest_batch_is_beside_bptts_at_its_own():
    table = largest_batches(LARGEST)
    assert table is not None and table.columns[2] == "largest batch in 1 GB"
    assert table.rows[2:] == (
        ("SLTT", 1, 120, 160.0, 1.0),
        ("SLTT", 4, 100, pytest.approx(400 / 3), pytest.approx(10 / 3)),
    )
    cost = {**LARGEST["points"][1]["cost"], "rule": "BPTT-chunk-1"}
    stepped = {"time_steps": 4, "cost": cost, "largest_batch": 60, "at_largest": cost}
    table = largest_batches({**LARGEST, "points": [*LARGEST["points"], stepped]})
    assert table is not None and table.rows[3][4] == pytest.approx(
        10 / 6
    )  # of BPTT step by step, which is faster here


def test_what_was_not_tried_is_not_measured_and_what_nobody_looked_for_has_no_table():
    untried = [
        {name: value for name, value in point.items() if name != "at_largest"}
        for point in LARGEST["points"]
    ]
    table = largest_batches({**LARGEST, "points": untried})
    assert table is not None and [row[2:] for row in table.rows[2:]] == [
        (120, None, None),
        (100, None, None),
    ]
    assert largest_batches(SWEEP) is None
    of_one = {**LARGEST, "points": LARGEST["points"][::2]}  # at T = 1 alone
    found = swept(
        (SWEEP, {**SWEEP, "points": []}, LARGEST, of_one, {**SWEEP, "points": SWEEP["points"][:1]})
    )
    told = [(each.key, len(each.figures), each.largest is None) for each in found]
    assert told == [
        ("sweep1", 2, True),
        ("sweep2", 2, False),
        ("sweep3", 0, False),
        ("sweep4", 2, True),
    ]


def test_what_sweep_prints_is_what_a_page_reads():
    recipe = recipe_with(0.5, data=recipe_with(0.5).data.with_(samples=4000))
    found = sweep(
        recipe, steps=(4,), rules=(spec(BPTT), spec(SLTT)), memory_bytes=500_000, at_largest=True
    )
    table = largest_batches(sweep_of(json.loads(json.dumps(found.to_json())), "sweep.json"))
    assert table is not None and len(table.rows) == len(found.points)
    for row, point in zip(table.rows, found.points, strict=True):
        assert row[:3] == (point.cost.rule, 4, point.largest_batch)
        assert point.at_largest is not None and point.largest_batch is not None
        assert row[3] == pytest.approx(point.largest_batch / point.at_largest.compute_s)


def test_what_a_report_returned_is_read_again():
    kept = SuiteReport(sweeps=(LARGEST, SWEEP))
    assert parse_result(json.loads(json.dumps(kept.to_json())), "here") == kept
    assert (
        parse_result(None, "here")
        == parse_result({"claims": 3, "sweeps": "x"}, "here")
        == SuiteReport()
    )


POINT = SWEEP["points"][0]
NULL = {**POINT["cost"], "forward_s": None}


@pytest.mark.parametrize(
    "damage",
    [
        {"points": [{**POINT, "at_largest": {}}]},
        {"points": [{**POINT, "at_largest": NULL}]},
        {"points": [{"time_steps": 1}]},
        {"points": [{**POINT, "at_largest": {**NULL, "forward_s": 0.0, "backward_s": 0}}]},
        {"points": [{**POINT, "cost": {**NULL, "forward_s": math.nan}}]},
        {"points": [{**POINT, "time_steps": math.inf}]},
        {"points": 3},
        {"hardware": {}},
        {"hardware": {"gpu": "none"}},
        {"hardware": {"cpu": "a cpu", "threads": 1}},
        {"hardware": 3},
    ],
)
def test_what_is_no_sweep_is_refused(damage: dict[str, Any]):
    said = "report: here must be the output of sweep --format json"
    with pytest.raises(ReportError, match=said):
        sweep_of({**SWEEP, **damage}, "here")

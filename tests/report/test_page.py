import itertools
import re
from dataclasses import replace

import pytest

from pipeline.report import page
from pipeline.report.results import Run
from pipeline.report.study import Study
from tests.helpers.hand_made import CLAIM, MACHINE, on, recipe, run, study
from tests.report.test_figures import LARGEST, SWEEP
from tests.report.test_tables import tuned


def body(html: str) -> str:
    """Without plotly.js."""
    return re.sub(r"<script type=.application/gzip.*?</script>", "", html, flags=re.DOTALL)


def test_a_page_of_42_runs_is_small():
    rules = ("BPTT", *(f"RULE-{index}" for index in range(6)))
    keys = itertools.product("ab", rules, range(3))
    runs = [run(rule, seed=seed, study=16 * key, name=f"{key}{rule}") for key, rule, seed in keys]
    html = page.render(Study(title="claims", runs=tuple(runs)))
    assert len(runs) == 42 and len(html.encode()) <= 2_500_000


def test_machines_are_apart_and_a_missing_baseline_is_named():
    elsewhere = [
        run(rule, hardware={**MACHINE, "gpu": "H100"}, name=f"gpu-{rule}")
        for rule in ("SLTT", "OTTT-A")
    ]
    html = body(page.render(study(*elsewhere)))
    assert html.count("No baseline: no finished run of BPTT is shown. There are no ratios.") == 1
    assert '<h2 id="g2">on H100, 1 worker</h2>' in html
    assert html.index('id="g1"') < html.index('id="g2"') < html.index("How the groups differ")


def test_no_title_is_a_hash():
    html = body(page.render(study(run("SLTT", study="f" * 16, recipe=recipe(time_steps=4)))))
    titles = re.findall("<(?:h[1-5]|li)[^>]*>(?:<a[^>]*>)?([^<]*)", html)
    assert "net on data" in titles and "time steps 4 instead of 2" in titles
    assert not [text for text in titles if "01234567" in text or "ffffffff" in text]


def test_a_run_alone_is_a_group_without_ratios():
    moved = run("SLTT", name="moved", restart=True, trained_on=[on(workers=2), on()])
    lonely = run(
        "SLTT", study="f" * 16, name="lonely", recipe=recipe("SLTT", published=[[2, 0.94]])
    )
    html = body(page.render(study(moved, lonely)))
    assert html.count("There are no ratios.") == 2
    for index in (2, 3):
        for name in ("accuracy-against-saved-bytes", "time-parts", "learning-curves"):
            assert f'data-figure="g{index}-{name}"' in html
    assert "with 1 restart" in html
    assert "lonely: 4.0 points below the published run at epoch 2" in html
    assert html.count("<b>Temporal share of BPTT&#39;s gradient</b>: ") == 3


def alone(*runs: Run) -> Study:
    return Study(title="by hand", runs=runs)


KINDS = {"parameters": 4e6, "buffers": 0, "gradients": 4e6, "optimizer": 8e6, "teacher": 0}
TWO = {"world_size": 2, "images_per_s": 150.0}


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (
            alone(tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3)),
            ["No baseline: several BPTTs with different optimizer.lr; name one. There are no"],
        ),
        (
            study(claims=(CLAIM,), sweeps=(SWEEP,)),
            [
                "does not hold",
                *(f"sweep1-{what}-against-time-steps" for what in ("memory", "time")),
            ],
        ),
        (study(claims=[replace(CLAIM, about=f"rule {at}") for at in range(60)]), [">rule 59<"]),
        (
            study(run("SLTT", seed=2, device_j=3e6)),
            [
                "<h3>Other measurements</h3>",
                "joules of training, measured",
                ">3 MJ<",
                'download="by-hand-g1-beside.csv"',
            ],
        ),
        (
            study(run("OTTT-A", held=KINDS)),
            ["<h3>Memory in training</h3>", 'download="by-hand-g1-held.csv"'],
        ),
        (
            alone(run(), run("SLTT"), tuned("BPTT", 0.3), tuned("SLTT", 0.6)),
            [
                '<h2 id="g1">shared settings</h2>',
                '<h2 id="g2">tuned optimizer.lr</h2>',
                "<td>optimizer.lr=0.3</td>",
                "<td>optimizer.lr=0.6</td>",
            ],
        ),
        (
            alone(run(inference=None, activity=None)),
            [
                '<td class="none">not measured</td>',
                "<b>Accuracy against inference energy</b>",
            ],
        ),
        (
            alone(run(state="running"), run("SLTT", state="failed")),
            ["Learning curves", "No baseline", "of 100 batches"],
        ),
        (
            alone(run("SLTT"), run("SLTT", **TWO)),
            [
                "Scaling over workers</h3>",
                "measured, not estimated",
                'download="by-hand-scaling.csv"',
            ],
        ),
        (
            alone(run("SLTT"), run("SLTT", **TWO, own_cores=True)),
            ["<b>Scaling over workers</b>: no rule has finished with two numbers"],
        ),
        (
            study(sweeps=(LARGEST,)),
            [
                "Each rule's own largest batch",
                ">133.3<",
                'download="by-hand-sweep1-largest.csv"',
            ],
        ),
        (study(), ["spiketrain sweep RECIPE --steps 1,2,4,8,16 --format json"]),
        (
            study(run("SLTT", name="again", restart=True)),
            [
                "<li>the runs have different commits: abc, def</li><li>SLTT has 2 runs of seed 0:"
                " ratios and differences use their mean as one run",
            ],
        ),
    ],
)
def test_a_page_says(of: Study, said: list[str]):
    html = body(page.render(of))
    assert [text for text in said if text not in html] == []


@pytest.mark.parametrize(
    ("of", "unsaid"),
    [
        (
            study(),
            ["different commits", "<h3>Claims</h3>", "Memory in training"],
        ),
        (study(sweeps=(SWEEP,)), ["largest batch"]),
        (
            alone(tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3)),
            ["no run of BPTT in this group has finished"],
        ),
        (alone(run(state_bytes=None, startup_s=None)), ["Other measurements"]),
        (alone(run("SLTT"), run("SLTT", **TWO, own_cores=True)), ["Scaling over workers</h3>"]),
    ],
)
def test_a_page_does_not_say(of: Study, unsaid: list[str]):
    html = body(page.render(of))
    assert [text for text in unsaid if text in html] == []

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.report import page
from pipeline.report.results import Run
from pipeline.report.study import Study
from tests.helpers.hand_made import CLAIM, MACHINE, on, recipe, run, study
from tests.report.test_figures import LARGEST, SWEEP
from tests.report.test_tables import tuned

BAD = "<script>alert(1)</script>"


def body(html: str) -> str:
    """Without plotly.js."""
    return re.sub(r"<script>/\*\*.*?</script>", "", html, flags=re.DOTALL)


def test_written_whole(tmp_path: Path):
    out = page.write(study(), tmp_path / "a" / "report.html")
    assert out.read_text().startswith("<!doctype html>") and [
        each.name for each in out.parent.iterdir()
    ] == ["report.html"]


def test_names_from_outside_are_text():
    html = body(page.render(study(run(f"SLTT{BAD}", name=BAD), title=BAD, notes=(BAD,))))
    assert BAD not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("<script") == 2  # the drawings and the page's own
    [text] = re.findall(r'id="drawings">(.*?)</script>', html, re.DOTALL)
    drawings = json.loads(text)
    assert any(
        "alert(1)" in trace.get("name", "") for trace in drawings["g1-ratios"]["light"]["data"]
    )


def test_nothing_is_asked_of_the_network():
    html = body(page.render(study()))
    assert "default-src 'none'" in html
    assert (
        not re.findall(r"""(?:src|href|action)=["'](?!#|data:)""", html)
        and "url(" not in html
        and "@import" not in html
    )


def test_machines_are_apart_and_a_missing_baseline_is_named():
    elsewhere = [
        run(rule, hardware={**MACHINE, "gpu": "H100"}, name=f"gpu-{rule}")
        for rule in ("SLTT", "OTTT-A")
    ]
    html = body(page.render(study(*elsewhere)))
    assert html.count("No baseline in this group: no run of BPTT in this group has finished.") == 1
    assert "on H100" in html
    assert html.index('id="g1"') < html.index('id="g2"') < html.index('id="differences"')


def test_what_the_reader_of_its_means_must_know_stands_in_a_section():
    html = body(page.render(study(run("SLTT", name="again", restart=True))))
    section = html[html.index('<h2 id="g1">') : html.index("Conditions of each rule")]
    assert (
        "<li>the runs have different commits: abc, def</li><li>SLTT has 2 runs of seed 0: ratios"
        " and differences use their mean as one run" in section
    )


def test_a_run_alone_is_listed_and_drawn_and_not_divided():
    moved = run("SLTT", name="moved", restart=True, trained_on=[on(workers=2), on()])
    lonely = run(
        "SLTT", study="f" * 16, name="lonely", recipe=recipe("SLTT", published=[[2, 0.94]])
    )
    html = body(page.render(study(moved, lonely)))
    assert "The baseline is missing" not in html and 'id="g2"' not in html
    alone = html[html.index('id="alone"') : html.index('id="differences"')]
    names = ("time-parts", "learning-curves", "firing-rates")
    assert re.findall(r'data-figure="(.*?)"', alone) == [
        f"alone{index}-{name}" for index in (1, 2) for name in names
    ]
    assert re.findall("<summary>Figures of (.*?), Study .*</summary>", alone) == [
        "moved: SLTT",
        "lonely: SLTT",
    ]
    assert (
        "with 1 restart" in alone
        and "lonely: 4.0 points below the published run at epoch 2" in alone
    )
    assert (
        alone.count("<b>Temporal share of BPTT&#39;s gradient</b>: no run compared its gradient")
        == 2
    )
    assert '"alone2-time-parts":{"light"' in html


def alone(*runs: Run) -> Study:
    return Study(title="by hand", runs=runs)


KINDS = {"parameters": 4e6, "buffers": 0, "gradients": 4e6, "optimizer": 8e6, "teacher": 0}
TWO = {"world_size": 2, "images_per_s": 150.0}


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (
            alone(tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3)),
            [
                f"{group}: several BPTTs with different optimizer.lr; name one. {where}"
                for group, where in (
                    ("No baseline in this group", "The group has no ratios."),
                    ("The baseline is missing", "This page has no ratios."),
                )
            ],
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
                ">Study 01234567, shared settings, on a cpu",
                ">Study ffffffff, tuned optimizer.lr, on a cpu",
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
            ["Learning curves", "No baseline", "The baseline is missing"],
        ),
        (
            alone(run("SLTT"), run("SLTT", **TWO)),
            [
                '<h2 id="scaling">',
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
            ["different commits", 'id="claims"', "Memory in training"],
        ),
        (study(sweeps=(SWEEP,)), ["largest batch"]),
        (
            alone(tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3)),
            ["no run of BPTT in this group has finished"],
        ),
        (alone(run(state_bytes=None, startup_s=None)), ["Other measurements"]),
        (alone(run("SLTT"), run("SLTT", **TWO, own_cores=True)), ['id="scaling"']),
    ],
)
def test_a_page_does_not_say(of: Study, unsaid: list[str]):
    html = body(page.render(of))
    assert [text for text in unsaid if text in html] == []

import json
import re
from pathlib import Path

from pipeline.report import page
from pipeline.report.claims import Claim
from pipeline.report.study import Study
from tests.helpers.hand_made import CLAIM, MACHINE, on, recipe, run, study
from tests.report.test_figures import SWEEP
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
    assert html.count("No baseline in this group: no run of BPTT among these has finished.") == 1
    assert "on H100" in html
    assert html.index('id="g1"') < html.index('id="g2"') < html.index('id="differences"')


def test_several_tunings_of_the_baseline_are_not_called_unfinished():
    html = body(
        page.render(
            Study(
                title="t", runs=(tuned("BPTT", 0.1), tuned("BPTT", 0.3, seed=1), tuned("SLTT", 0.3))
            )
        )
    )
    said = "several BPTTs with different optimizer.lr; name one"
    assert f"No baseline in this group: {said}. Nothing here is divided." in html
    assert f"The baseline is missing: {said}. Nothing on this page is divided." in html
    assert "no run of BPTT among these has finished" not in html


def test_what_the_reader_of_its_means_must_know_stands_in_a_section():
    html = body(page.render(study(run("SLTT", name="again", restart=True))))
    section = html[html.index('<h2 id="g1">') : html.index("What stands behind the rows")]
    assert (
        "<li>the runs are of different commits: abc, def</li><li>SLTT has 2 runs of seed 0, which"
        " count as one" in section
    )
    assert "different commits" not in body(page.render(study()))


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
        alone.count("<b>Temporal share of BPTT&#39;s gradient</b>: no run compared gradients") == 2
    )
    assert '"alone2-time-parts":{"light"' in html


def test_claims_and_sweeps_where_there_are_any():
    html = body(page.render(study(claims=(CLAIM,), sweeps=(SWEEP,))))
    assert (
        "does not hold" in html
        and "sweep1-memory-against-time-steps" in html
        and "sweep1-time-against-time-steps" in html
    )
    bare = body(page.render(study()))
    assert (
        'id="claims"' not in bare
        and "spiketrain sweep RECIPE --steps 1,2,4,8,16 --format json" in bare
    )


def test_what_was_measured_beside_has_its_table_and_file():
    html = body(page.render(study(run("SLTT", seed=2, device_j=3e6))))
    assert (
        "<h3>Measured beside</h3>" in html
        and "joules of training, measured" in html
        and ">3 MJ<" in html
    )
    assert 'download="by-hand-g1-beside.csv"' in html
    bare = body(page.render(Study(title="t", runs=(run(state_bytes=None, startup_s=None),))))
    assert "Measured beside" not in bare


def test_what_training_holds_has_its_table():
    kinds = {"parameters": 4e6, "buffers": 0, "gradients": 4e6, "optimizer": 8e6, "teacher": 0}
    html = body(page.render(study(run("OTTT-A", held=kinds))))
    assert "<h3>What training holds</h3>" in html and 'download="by-hand-g1-held.csv"' in html
    assert "What training holds" not in body(page.render(study()))


def test_a_tuned_study_names_its_protocol_and_each_rules_rate():
    html = body(
        page.render(
            Study(title="t", runs=(run(), run("SLTT"), tuned("BPTT", 0.3), tuned("SLTT", 0.6)))
        )
    )
    titles = re.findall(r"<h2 id=.g\d+.>(.*?) on a cpu", html)
    assert titles == ["Study 01234567, shared settings,", "Study ffffffff, tuned optimizer.lr,"]
    assert "<td>optimizer.lr=0.3</td>" in html and "<td>optimizer.lr=0.6</td>" in html


def test_all_claims_are_shown():
    claims = tuple(
        Claim(about=f"rule {index}", claim="bytes", published="", bound="", ours="", holds=None)
        for index in range(60)
    )
    assert ">rule 59<" in body(page.render(study(claims=claims)))


def test_what_is_missing_says_so():
    html = body(page.render(Study(title="t", runs=(run(inference=None, activity=None),))))
    assert '<td class="none">not measured</td>' in html
    assert "<b>Accuracy against inference energy</b>" in html


def test_a_run_that_goes_on_has_a_page():
    html = body(
        page.render(Study(title="t", runs=(run(state="running"), run("SLTT", state="failed"))))
    )
    assert "Learning curves" in html and "No baseline" in html and "The baseline is missing" in html


def test_scaling_over_workers_is_shown_and_said_to_be_measured():
    one, two = run("SLTT"), {"world_size": 2, "images_per_s": 150.0}
    html = body(page.render(Study(title="by hand", runs=(one, run("SLTT", **two)))))
    assert (
        '<h2 id="scaling">' in html
        and "Measured, not a model" in html
        and 'download="by-hand-scaling.csv"' in html
    )
    apart = run("SLTT", **two, own_cores=True)
    bare = body(page.render(Study(title="by hand", runs=(one, apart))))
    assert (
        'id="scaling"' not in bare
        and "<b>Scaling over workers</b>: no rule has finished on two numbers" in bare
    )

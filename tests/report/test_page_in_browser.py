"""The page of runs that were really trained, opened in the system's Chromium."""

import csv
import io
from pathlib import Path
from typing import Literal, get_args

import pytest
from playwright.sync_api import Browser, Page

from pipeline.report import page as pages
from pipeline.report.page import shown
from pipeline.report.study import Study
from pipeline.report.suite import read_study
from pipeline.spiking.op_scope import OpScope
from tests.helpers.browser import Watch, on_the_first_screen, violations
from tests.helpers.events import RawJournal, event
from tests.helpers.hand_made import run, study
from tests.helpers.real_study import train_real_study
from tests.helpers.waiting import until
from tests.report.test_figures import SWEEP

WIDE, PHONE = (1440, 900), (390, 844)
PAPER = 640  # pixels between the margins of A4 and of letter, as page.js has it
FIGURES = 9
Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def real_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("real") / "runs"
    train_real_study(runs_dir)
    with RawJournal(
        runs_dir / "ottt-0" / "journal.jsonl", attempt=1
    ) as journal:  # killed after its end, and started again
        journal.write(
            event("start", rule="OTTT-A", study="s", step=16, steps_per_epoch=8, total_steps=16)
        )
        journal.write(event("finish", step=16))
    return runs_dir


@pytest.fixture(scope="module")
def real(real_runs: Path) -> tuple[Study, Path]:
    found, out, _ = read_study(real_runs)
    return found, pages.write(found, out)


@pytest.fixture(scope="module")
def opened_once(browser: Browser, real: tuple[Study, Path]) -> tuple[Page, Watch]:
    return opened(browser, real[1])


@pytest.fixture
def page(opened_once: tuple[Page, Watch]) -> Page:
    """The real study's, wide, light, at its top and with its tables closed, whatever was done to it
    before.
    """
    page, _ = opened_once
    page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
    page.emulate_media(color_scheme="light", media="screen")
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = false)")
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0) }")
    return page


@pytest.fixture
def watch(opened_once: tuple[Page, Watch]) -> Watch:
    return opened_once[1]


def opened(browser: Browser, path: Path) -> tuple[Page, Watch]:
    """With every figure drawn, those that are folded away, too."""
    size = {"width": WIDE[0], "height": WIDE[1]}
    page = browser.new_page(
        viewport=size, accept_downloads=True, reduced_motion="reduce", color_scheme="light"
    )
    watch = Watch()
    watch.over(page)
    page.goto(path.as_uri())
    for place in page.locator("[data-figure]:not(.off *)").all():
        # Not Playwright's own, which first waits for the place to lie still, while figures that are
        # drawn above it move it.
        place.evaluate("place => place.scrollIntoView()")
        place.locator(".main-svg").first.wait_for(state="attached")
    return page, watch


def drawn(page: Page, scheme: Scheme) -> None:
    page.wait_for_function(
        f"() => document.querySelectorAll('[data-theme={scheme}]').length === {FIGURES}"
    )


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        pytest.param("light", WIDE, id="light-wide"),
        pytest.param("dark", PHONE, id="dark-phone"),
        pytest.param("light", PHONE, marks=pytest.mark.full, id="light-phone"),
        pytest.param("dark", WIDE, marks=pytest.mark.full, id="dark-wide"),
    ],
)
def test_it_is_quiet_alone_and_accessible(
    page: Page, watch: Watch, real: tuple[Study, Path], size: tuple[int, int], scheme: Scheme
):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)
    drawn(page, scheme)
    page.locator("details").first.evaluate("node => node.open = true")
    assert (violations(page), watch.said, watch.asked) == ([], [], [real[1].as_uri()])
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_data_and_pictures_are_downloaded(page: Page):
    for figure in page.locator("figure").all():
        with page.expect_download() as csv_file:
            figure.get_by_role("link", name="CSV").click()
        rows = list(csv.reader(io.StringIO(csv_file.value.path().read_text())))
        table = figure.locator("table")
        assert rows[0] == table.locator("thead th").all_text_contents()
        shown = table.evaluate(
            "node => [...node.tBodies[0].rows].map(row => [...row.cells].map(cell =>"
            " cell.textContent))"
        )
        assert shown and [list(map(_as_told, row)) for row in rows[1 : len(shown) + 1]] == shown
    buttons = [figure.get_by_role("button", name="PNG") for figure in page.locator("figure").all()]
    assert len({button.get_attribute("data-png") for button in buttons}) == FIGURES
    with page.expect_download() as picture:
        buttons[0].click()
    assert picture.value.suggested_filename == "study-s-g1-accuracy-against-saved-bytes.png"
    assert picture.value.path().read_bytes().startswith(b"\x89PNG")


def _as_told(text: str) -> str:
    if text == "":
        return shown(None)
    try:
        return text if text.lstrip("-").isdecimal() else shown(float(text))
    except ValueError:
        return text


def test_the_keyboard_reaches_everything(page: Page):
    reached: set[str] = set()
    for _ in range(110):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.tagName + ' ' +"
                " document.activeElement.textContent.trim().slice(0, 60)"
            )
        )
    assert "A To the report" in reached
    assert "BUTTON SLTT" in reached  # shows the tiles of a rule
    for title in ("Learning curves", "Where the time goes"):
        for words in (f"BUTTON PNG of {title}", f"A CSV of {title}", f"SUMMARY Table of {title}"):
            assert any(text.startswith(words) for text in reached), words


def test_a_change_of_scheme_and_paper_redraw_the_figures(page: Page, watch: Watch):
    page.emulate_media(color_scheme="dark")
    drawn(page, "dark")
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    drawn(page, "light")
    page.emulate_media(media="print")
    assert not page.get_by_role("button", name="PNG").first.is_visible()
    assert watch.said == []


def test_the_first_screen_has_the_tiles_and_the_figure(page: Page):
    tiles, figure = ".tiles:not(.off)", ".main .panel:not(.off) .drawing"
    assert on_the_first_screen(page, WIDE, tiles, figure)
    assert on_the_first_screen(page, PHONE, tiles)


def test_the_figure_says_whose_a_point_is(page: Page):
    page.evaluate("() => window.scrollTo(0, 0)")
    point = page.locator(".main .scatterlayer .trace").nth(2).locator(".point").first
    label = page.locator(".main .hoverlayer", has_text="OTTT-A, seed 0")

    def is_labelled() -> bool:
        # Plotly drops a movement of the mouse that arrives while it draws.
        page.mouse.move(0, 0)
        point.hover(force=True)
        page.wait_for_timeout(200)
        return label.filter(has_text="compute time").is_visible()

    until(is_labelled, within=30)


def test_names_from_outside_stay_text(browser: Browser, tmp_path: Path):
    bad = "<script>alert(1)</script>"
    runs = (
        run(name=f"{bad}<img src=x onerror=alert(1)>"),
        run(f"</script>{bad}", seed=0),
        run("<b>bold</b>", seed=0),
    )
    page, watch = opened(
        browser, pages.write(Study(title=f"{bad}", runs=runs), tmp_path / "report.html")
    )
    assert bad in (page.locator(".kind").text_content() or "")
    assert page.locator("b b, p script, td script, img").count() == 0
    assert watch.said == [] and watch.asked == [(tmp_path / "report.html").as_uri()]


@pytest.mark.full
def test_a_page_of_several_groups_is_accessible(browser: Browser, tmp_path: Path):
    two = (
        run(rule, world_size=2, images_per_s=150.0, name=f"two-{rule}") for rule in ("BPTT", "SLTT")
    )
    page, watch = opened(browser, pages.write(study(*two), tmp_path / "report.html"))
    assert page.locator("h2#g2, h3:text('Scaling over workers')").count() == 2
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    assert violations(page) == [] and watch.said == []


def test_the_large_figure_switches_to_memory_against_time_steps(browser: Browser, tmp_path: Path):
    page, watch = opened(browser, pages.write(study(sweeps=(SWEEP,)), tmp_path / "report.html"))
    page.get_by_role("button", name="Memory against time steps").first.click()
    page.locator(".panel:not(.off) .main-svg").first.wait_for()
    with page.expect_download() as picture:
        page.locator(".panel:not(.off)").get_by_role("button", name="PNG").click()
    assert picture.value.suggested_filename.endswith("-memory-against-time-steps.png")
    assert violations(page) == [] and watch.said == []


@pytest.mark.full
def test_no_table_is_wider_than_paper(browser: Browser, tmp_path: Path):
    """With all that runs on cards tell, by rules that work for every purpose."""
    peaks = {f"peak_{what}_bytes": 12_345_678_901 for what in ("device", "reserved", "rss", "pss")}
    purposes = ("forward", "error", "weights", *get_args(OpScope))
    work = {
        each: {"multiplications": 1_234_567_890, "additions": 2_345_678_901} for each in purposes
    }
    inference = {
        "macs": 1e6,
        "acs": 2e7,
        "energy_j": 4e-6,
        "prices": "45 nm, fp32",
        "samples": 10,
        "counted_on": "the first share",
        "measured_j": 0.0123,
    }
    about = {**peaks, "operations": work, "net_s": 12.5, "device_j": 2512.5, "inference": inference}
    runs = [run(rule, seed=seed, **about) for rule in ("BPTT", "BPTT-chunk-1") for seed in (0, 1)]
    page, _ = opened(browser, pages.write(study(*runs), tmp_path / "report.html"))
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    page.set_viewport_size({"width": PAPER, "height": 900})
    page.emulate_media(media="print")
    found = page.evaluate(
        "() => [...document.querySelectorAll('table')].map(each =>"
        " each.getBoundingClientRect().right)"
    )
    assert len(found) > 10 and max(found) <= PAPER


@pytest.mark.full
def test_a_page_that_asks_the_network_is_seen(browser: Browser, tmp_path: Path):
    """Breaks what the tests above rest on: a request, an error, a picture without a text."""
    path = pages.write(study(), tmp_path / "report.html")
    broken = path.read_text().replace(
        "<main", "<img src='file:///nothing.png'><script>throw Error('broken')</script><main", 1
    )
    path.write_text(broken.replace("<meta http-equiv", "<meta name", 1))
    page, watch = opened(browser, path)
    assert any("broken" in line for line in watch.said) and "file:///nothing.png" in watch.asked
    assert any(line.startswith("image-alt") for line in violations(page))

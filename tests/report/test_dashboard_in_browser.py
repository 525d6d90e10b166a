"""The dashboard of runs that were really trained, as the command line serves it, opened in the
system's Chromium.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect
from werkzeug.serving import make_server

from pipeline.report.dashboard.app import make_app
from pipeline.report.dashboard.guard import guard
from pipeline.report.page import VIEWS
from pipeline.track.journal import read
from pipeline.track.mlflow import Mirror, sync
from tests.helpers.browser import Watch, on_the_first_screen, violations
from tests.helpers.events import RawJournal, event
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import CLAIM, KEY
from tests.helpers.real_study import train_real_study
from tests.report.test_figures import LARGEST

WIDE, PHONE = (1440, 900), (390, 844)
EVERY = 0.5
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(22, 26, 33)"
# Of the real study: words of each view, and how many figures it and the overview have
SHOWN = {
    "costs": ("Cost of each rule", 4),
    "learning": ("Learning curves", 2),
    "time": ("Where the time goes", 2),
    "gradients": ("Gradient fidelity", 4),
    "claims": ("no claims, sweep or report", 1),
    "runs": ("The hardware and commit", 1),
}
STUDY = "#main .column:first-child"
TOKEN, WIKI = "a-token", "http://wiki.example/"
expect.set_options(timeout=20_000)  # as long as a busy machine may take to redraw


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """Five runs of the study "s", and one that failed of another."""
    runs_dir = tmp_path_factory.mktemp("real") / "runs"
    train_real_study(runs_dir)
    shutil.copy(empty_store, runs_dir)
    for journal in runs_dir.glob(
        "*/journal.jsonl"
    ):  # as a launch tells runs apart, and what they have in common
        of_start = {"run_id": journal.parent.name, "family": "small"}
        told = [
            {**each, **(of_start if each["event"] == "start" else {})} for each in read(journal)
        ]
        journal.write_text("".join(json.dumps(event) + "\n" for event in told))
    (runs_dir / "failed-0").mkdir()
    with RawJournal(runs_dir / "failed-0" / "journal.jsonl", attempt=0) as journal:
        about = {"study": "f" * 16, "run_id": "failed", "family": "cifar"}
        journal.write(event("start", run="failed-0", rule="OPZO", seed=0, step=0, **about))
        journal.write(event("failed", error="it did not fit"))
    for folder in sorted(runs_dir.iterdir()):
        if folder.is_dir():
            sync(folder, uri=f"sqlite:///{runs_dir / 'mlflow.db'}")
    return runs_dir


@contextmanager
def served(runs: Path, *, token: str | None = None) -> Iterator[str]:
    """Its address, from the command that a user types."""
    words = f"-m pipeline dashboard --port 0 --every {EVERY} --runs".split()
    guarded = [] if token is None else ["--token", token]
    environment = {
        name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"
    }
    with subprocess.Popen(
        [sys.executable, *words, str(runs), *guarded],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            assert ("this machine only" if token is None else "everyone with the token") in line
            yield line.split()[0].removesuffix("/?token=TOKEN")
            server.send_signal(signal.SIGINT)
            assert server.wait(10) in (0, 130)
        finally:
            server.kill()


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with served(runs) as address:
        yield address


@contextmanager
def watched(browser: Browser, url: str) -> Iterator[tuple[Page, Watch]]:
    size = {"width": WIDE[0], "height": WIDE[1]}
    page = browser.new_page(viewport=size, reduced_motion="reduce", color_scheme="light")
    watch = Watch()
    watch.over(page)
    page.goto(url)
    page.locator("#list .note, #list p").first.wait_for(state="attached")
    yield page, watch
    page.close()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """A page that says nothing, whatever a test does in it."""
    with watched(browser, url) as (page, watch):
        yield page
        assert watch.said == []


@pytest.fixture(scope="module")
def opened_once(browser: Browser, address: str) -> Iterator[tuple[Page, Watch]]:
    with watched(browser, f"{address}/?study=s") as found:
        yield found


@pytest.fixture
def page(opened_once: tuple[Page, Watch], address: str) -> Iterator[Page]:
    """Wide and light, of the real study; whatever a test did in it, it said nothing and asked
    nobody else.
    """
    page, watch = opened_once
    page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
    page.emulate_media(color_scheme="light")
    yield page
    assert watch.said == []
    assert [url for url in watch.asked if not url.startswith(address + "/")] == []


def drawn(page: Page, count: int, paper: str = LIGHT) -> None:
    """That many figures, on the paper of a scheme. A figure is drawn when it is near."""
    page.wait_for_function(
        "([count, paper]) => { const all = [...document.querySelectorAll('[data-figure]')]"
        ".filter(each => !each.closest('.off')); const next = all.find(each =>"
        " each.querySelector('.main-svg:first-child')?.style.background !== paper);"
        " next?.scrollIntoView(); return all.length === count && !next }",
        arg=[count, paper],
    )


def viewed(page: Page, view: str, paper: str = LIGHT) -> None:
    """A view of the real study, drawn."""
    words, count = SHOWN[view]
    page.get_by_role("button", name=VIEWS[view], exact=True).click()
    expect(page.locator(STUDY)).to_contain_text(words)
    drawn(page, count, paper)


def accessible(page: Page) -> None:
    """With its tables open, and no wider than its window; axe knows the order of headings."""
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    assert violations(page) == []
    page.wait_for_function(
        "() => document.documentElement.scrollWidth <= window.innerWidth", timeout=5000
    )


def first_screen(page: Page) -> None:
    """What lies within it."""
    tiles, figure = ".tiles:not(.off)", ".main .panel:not(.off) .drawing"
    assert on_the_first_screen(page, WIDE, tiles, figure)
    assert on_the_first_screen(page, PHONE, tiles)


def studies(page: Page) -> Locator:
    return page.locator("#list li")


def link(page: Page, study: str) -> Locator:
    return page.locator(f"#list li[data-study={study}] a")


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "scheme", "paper"),
    [
        pytest.param(WIDE, "light", LIGHT, id="wide"),
        pytest.param(PHONE, "dark", DARK, id="phone"),
    ],
)
def test_each_view_is_accessible(
    page: Page, size: tuple[int, int], scheme: Literal["light", "dark"], paper: str
):
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)
    for view in VIEWS:
        viewed(page, view, paper)
        accessible(page)


def test_the_first_screen_has_the_tiles_and_the_figure(page: Page):
    viewed(page, "costs")
    first_screen(page)


@pytest.mark.parametrize("state", ["running", pytest.param("diverged", marks=pytest.mark.full)])
def test_the_first_screen_of_an_unfinished_study(browser: Browser, state: str):
    store = FakeStore()
    store.add_finished("bptt-0", "BPTT")
    store.add_unfinished("sltt-0", "SLTT", state=state)
    with served_here(store) as address, opened(browser, address) as page:
        drawn(page, 3)
        page.get_by_role("button", name="SLTT", exact=True).click()
        expect(page.locator(".tiles:not(.off)")).to_contain_text(state)
        first_screen(page)
        accessible(page)


def test_a_click_on_a_rule_shows_its_tiles_and_stays(page: Page):
    page.locator(".rules tr", has_text="OTTT-A").click()
    expect(page.locator(".tiles:not(.off)")).to_contain_text("OTTT-A against BPTT")
    expect(page.locator(".tiles:not(.off) .tile.uncertain")).to_have_count(4)  # one seed
    assert "rule=OTTT-A" in page.url
    viewed(page, "time")  # which the server renders anew
    expect(page.locator(".tiles:not(.off)")).to_contain_text("OTTT-A against BPTT")
    page.get_by_role("button", name="SLTT", exact=True).press("Enter")
    expect(page.locator(".tiles:not(.off)")).to_contain_text("SLTT against BPTT")


@pytest.mark.full
def test_two_studies_of_one_title_and_one_suite_keep_their_own_data(browser: Browser):
    store = FakeStore()
    for study, top1 in (("e" * 16, 0.5), (KEY, 0.9)):
        for rule in ("BPTT", "SLTT"):
            store.add_finished(f"{study[0]}-{rule}", rule, study=study, top1=top1, parent="suite")
    store.add_report("suite", CLAIM, sweeps=(LARGEST,))
    with served_here(store) as address, opened(browser, f"{address}&beside={'e' * 16}") as page:
        drawn(page, 8)
        [own, beside] = page.evaluate(_ACCURACIES)
        assert set(own) == {90.0} and set(beside) == {50.0}
        ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(each => each.id)")
        assert len(ids) == len({*ids})
        columns = page.locator("#main .column")
        columns.nth(1).get_by_role("button", name="Memory against time steps").click()
        for view in ("runs", "claims"):
            page.get_by_role("button", name=VIEWS[view], exact=True).first.click()
            expect(page.locator(".view").nth(1)).to_contain_text(SHOWN_TWICE[view])
            accessible(page)
            for column in columns.all():  # both follow the address
                expect(column.locator(".panel:not(.off)")).to_contain_text("BPTT saves 4 times")
        columns.nth(1).get_by_role("button", name="Accuracy against saved bytes").click()
        with page.expect_download() as download:
            columns.nth(1).locator("a[download]").first.click()
        assert ",0.5," in Path(download.value.path()).read_text()


SHOWN_TWICE = {"runs": "The hardware and commit", "claims": "does not hold"}
# The accuracies of the points in the large figure of each column
_ACCURACIES = """() => [...document.querySelectorAll('#main .column')].map(column => column
    .querySelector('.main .panel:not(.off) .js-plotly-plot').data.flatMap(trace => trace.y))"""


def test_two_studies_stand_side_by_side(browser: Browser):
    store = FakeStore()
    for rule in ("BPTT", "SLTT"):
        store.add_finished(f"old-{rule}", rule, params={"time_steps": "4"}, newest=1000.0)
        params = {"time_steps": "6"}
        store.add_finished(f"new-{rule}", rule, params=params, newest=3000.0, study="e" * 16)
    with served_here(store) as address, opened(browser, address.partition("?")[0]) as page:
        columns = page.locator("#main .column")
        expect(columns.nth(0)).to_contain_text("fashion: T = 6")  # the newest
        page.get_by_role("button", name="Beside the open study: fashion: T = 4").click()
        expect(columns.nth(1)).to_contain_text("Unlike the study beside it: time steps 4 instead")
        expect(columns.nth(0)).to_contain_text("Unlike the study beside it: time steps 6 instead")
        drawn(page, 8)
        columns.nth(1).locator(".runs tr", has_text="old-SLTT").click()
        expect(columns.nth(1).locator(".count")).to_have_text("1 of 2 picked")
        expect(columns.nth(0).locator(".count")).to_have_text("2 of 2 picked")
        for width, height in (WIDE, PHONE):
            page.set_viewport_size({"width": width, "height": height})
            accessible(page)
        with opened(browser, page.url) as other:
            expect(other.locator("#main .column").nth(1).locator(".count")).to_have_text(
                "1 of 2 picked"
            )
        page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
        page.get_by_role("button", name="Beside the open study: fashion: T = 4").click()
        expect(columns.nth(1)).to_be_hidden()


def _text(page: Page, what: str) -> str:
    return page.locator(what).first.inner_text()


def test_an_address_shows_the_same_to_whoever_opens_it(browser: Browser, address: str):
    with opened(browser, address) as page:
        link(page, "s").click()
        drawn(page, 4)
        page.get_by_role("checkbox", name="bptt-1").press(
            "Space"
        )  # at once: the page redraws twice a second
        expect(page.get_by_role("checkbox", name="bptt-1")).to_have_attribute(
            "aria-checked", "false"
        )
        expect(
            page.get_by_role("checkbox", name="bptt-1")
        ).to_be_focused()  # whoever uses a keyboard stays there
        page.get_by_role("button", name="Learning curves", exact=True).click()
        page.get_by_label("Filter by name").fill("sltt")
        drawn(page, 2)
        expect(studies(page)).to_have_count(1)
        with opened(browser, page.url) as other:
            drawn(other, 2)
            for what in ("main", "figcaption"):
                for _ in range(60):  # either may still be at it: figures may come before lists
                    if _text(page, what) == _text(other, what):
                        break
                    page.wait_for_timeout(500)
                assert _text(other, what) == _text(page, what)
            expect(other.get_by_label("Filter by name")).to_have_value("sltt")
            checked = '[role=checkbox][aria-checked="true"]'
            assert (
                other.locator(checked).all_text_contents()
                == page.locator(checked).all_text_contents()
                and other.locator(checked).count() == 4
            )
            other.go_back()
            page.go_back()
            expect(studies(page)).to_have_count(2)
            expect(page.get_by_label("Filter by name")).to_have_value("")


def test_presses_in_quick_succession_all_count(browser: Browser, address: str):
    """Faster than the server answers: each answer on its way is thrown away for the next
    question.
    """
    with opened(browser, f"{address}/?study=s") as page:
        checked = page.locator('[role=checkbox][aria-checked="true"]')
        expect(checked).to_have_count(5)
        names = page.get_by_role("checkbox").all_text_contents()
        for wanted in (0, 5):
            page.evaluate(
                "() => document.querySelectorAll('[role=checkbox]').forEach(each => each.click())"
            )
            expect(checked).to_have_count(wanted)
            expect(page.locator(".count")).to_have_text(f"{wanted} of {len(names)} picked")
        for view in (VIEWS[name] for name in ("time", "learning", "costs")):
            page.get_by_role("button", name=view, exact=True).click()
            expect(page.get_by_role("button", name=view, exact=True)).to_have_attribute(
                "aria-pressed", "true"
            )
        expect(studies(page)).to_have_count(2)
        drawn(page, 4)


@contextmanager
def served_here(store: FakeStore, *, token: str | None = None) -> Iterator[str]:
    """The address of a dashboard in this process, which looks five times a second."""
    app = make_app(store, name="store", every=0.2)
    guard(app, host="127.0.0.1", token=token)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/?study={KEY}"
    finally:
        server.shutdown()
        thread.join()


@pytest.mark.full
def test_a_store_that_answers_later_than_the_next_look_is_shown(browser: Browser):
    """And what the reports of two suites told, in a view of their own."""
    store = FakeStore(pause_s=0.3)
    store.add_finished("bptt-0", "BPTT", parent="first")
    store.add_finished("sltt-0", "SLTT", parent="second")
    for parent in ("first", "second"):
        store.add_report(parent, CLAIM, sweeps=(LARGEST,), printed="rule  top-1\nSLTT  91.28%\n")
    with served_here(store) as address, opened(browser, address) as page:
        drawn(page, 4)
        page.get_by_role("button", name=VIEWS["claims"]).click()
        drawn(page, 5)  # the large one, and memory and time of two suites
        expect(page.locator(".view h3")).to_contain_text(["second", "first"])
        expect(page.locator(STUDY)).to_contain_text("does not hold")
        page.get_by_role("button", name="Memory against time steps").first.click()
        expect(page.locator(".panel:not(.off)")).to_contain_text("BPTT saves 4 times as many")
        drawn(page, 5)
        for width, height in (WIDE, PHONE):
            page.set_viewport_size({"width": width, "height": height})
            accessible(page)
        store.trouble = "store x does not answer"
        expect(page.locator(STUDY)).to_contain_text("Store x does not answer.")


def test_looks_go_on_after_a_request_was_lost(browser: Browser):
    store = FakeStore()
    store.add_finished("bptt-0", "BPTT")
    with served_here(store) as address, watched(browser, address) as (page, _):
        lost: list[str] = []

        def lose(route: Route) -> None:
            lost.append(route.request.url)
            route.abort()

        page.route(lambda url: "/study" in url or "/list" in url, lose)
        for _ in range(200):  # on a busy machine a page asks late
            page.wait_for_timeout(100)
            if lost:
                break
        expect(page.get_by_text("The server does not answer")).to_be_visible()
        page.unroute_all()
        assert lost
        store.add_finished("sltt-0", "SLTT")
        expect(page.locator("#list")).to_contain_text("2 finished")
        expect(page.get_by_text("The server does not answer")).to_be_hidden()
        drawn(page, 4)


def test_whoever_reads_pauses_the_looks(browser: Browser):
    store = FakeStore()
    store.add_finished("bptt-0", "BPTT")
    with served_here(store) as address, opened(browser, address) as page:
        pause = page.get_by_role("button", name="Pause", exact=True)
        pause.click()
        expect(pause).to_have_attribute("aria-pressed", "true")
        page.wait_for_timeout(500)  # an answer may be on its way
        asked = len(store.asked)
        store.add_finished("sltt-0", "SLTT")
        page.wait_for_timeout(600)
        assert len(store.asked) == asked
        expect(page.locator("#list")).to_contain_text("1 finished")
        pause.click()
        expect(page.locator("#list")).to_contain_text("2 finished")


def test_a_study_that_is_picked_is_gone_on_from_and_names_the_window(
    browser: Browser, address: str
):
    with opened(browser, address) as page:
        link(page, "s").press("Enter")
        expect(page.locator(f"{STUDY} .title")).to_be_focused()
        expect(page).to_have_title(re.compile("^small.*, Costs, spiketrain dashboard$"))
        drawn(page, 4)
        page.get_by_role("button", name=VIEWS["time"], exact=True).click()
        expect(page).to_have_title(re.compile("Where the time goes, spiketrain dashboard$"))


def test_what_is_pressed_is_seen_without_colours_of_ours(page: Page):
    page.locator("tr.here").wait_for()
    page.emulate_media(forced_colors="active")
    ticked = (
        "each => [getComputedStyle(each, '::before').content.includes('\\u2713'), each.ariaPressed]"
    )
    found = [button.evaluate(ticked) for button in page.locator("[data-change]").all()]
    assert found.count([True, "true"]) == 1 and found.count([False, "false"]) == len(found) - 1
    assert (
        page.locator("tr.here").evaluate("each => getComputedStyle(each).outlineStyle") == "solid"
    )
    page.emulate_media(forced_colors="none")


def test_a_run_that_goes_on_draws_on(page: Page, runs: Path):
    folder = runs / "going-0"
    folder.mkdir()
    page.get_by_role("button", name="Learning curves", exact=True).click()
    drawn(page, 2)
    with RawJournal(folder / "journal.jsonl", attempt=0) as journal:
        about = {
            "study": "s",
            "run_id": "going",
            "family": "small",
            "steps_per_epoch": 8,
            "total_steps": 16,
        }
        journal.write(event("start", run="going-0", rule="OPZO", seed=0, step=0, **about))
        mirror = Mirror(folder, uri=f"sqlite:///{runs / 'mlflow.db'}", interval_s=0.2)
        for step in (1, 2):
            journal.write(event("step", step=step, metrics={"loss": 1.0, "top1": step / 20}))
        row = page.locator("tr[data-run]", has_text="going-0")
        expect(row).to_contain_text("running", timeout=30_000)
        expect(page.locator("#list")).to_contain_text("1 running")
        page.wait_for_function(_POINTS, arg=2, timeout=30_000)
        tiles = page.locator(".tiles:not(.off)", has_text="OPZO")
        expect(tiles).to_contain_text("2 of 16 batches")
        scrolled = page.evaluate("() => window.scrollY")
        asked = page.url
        for step in (3, 4, 5):
            journal.write(event("step", step=step, metrics={"loss": 0.5, "top1": step / 20}))
        page.wait_for_function(_POINTS, arg=5, timeout=30_000)
        expect(tiles).to_contain_text("5 of 16 batches")
        assert page.evaluate("() => window.scrollY") == scrolled
        journal.write(event("finish", step=16))
        assert mirror.close()
    expect(row).to_contain_text("finished", timeout=30_000)
    assert page.url == asked


_POINTS = """count => [...document.querySelectorAll('.js-plotly-plot')].some(
    plot => plot.data.some(trace => trace.name === 'OPZO' && trace.x.length === count))"""


@pytest.mark.full
def test_a_store_that_comes_later_is_waited_for(browser: Browser, runs: Path, tmp_path: Path):
    with (
        served(tmp_path) as address,
        opened(browser, f"{address}/?study=s&view=runs") as page,
    ):
        expect(page.locator("#list")).to_contain_text("does not exist; launch a run")
        expect(page.locator(STUDY)).to_contain_text("does not exist; launch a run")
        assert violations(page) == []
        part = tmp_path / "part"
        part.write_bytes((runs / "mlflow.db").read_bytes())
        part.rename(tmp_path / "mlflow.db")
        expect(studies(page)).to_have_count(2)
        expect(page.locator(STUDY)).to_contain_text("bptt-1")


def test_links_on_a_page_of_another_site_open_it(browser: Browser):
    """The one with the token, and from then on every permalink; what such a page posts comes
    without the cookie.
    """
    store = FakeStore()
    store.add_finished("bptt-0", "BPTT")
    with served_here(store, token=TOKEN) as address:
        links = (
            f'<a href="{address}&token={TOKEN}">first</a> <a'
            f' href="{address}&view=learning">permalink</a>'
        )
        form = (
            '<form method="post"'
            f' action="{address.partition("?")[0]}study"><button>post</button></form>'
        )
        page = browser.new_page()
        page.route(WIKI, lambda route: route.fulfill(body=links + form, content_type="text/html"))
        for link in ("first", "permalink"):
            page.goto(WIKI)
            page.get_by_role("link", name=link).click()
            expect(page.locator("#list li")).to_have_count(1)
        page.reload()
        expect(page.locator("#list li")).to_have_count(1)
        page.goto(WIKI)
        with page.expect_navigation() as posted:
            page.get_by_role("button", name="post").click()
        assert posted.value is not None and posted.value.status == 401
        page.close()


def test_behind_a_proxy_with_tls_the_cookie_is_for_tls_alone(tmp_path: Path):
    with served(tmp_path, token=TOKEN) as address:
        for scheme, is_secure in (
            ("https", True),
            ("http", False),
            ("https, http", True),
            ("wss", False),
        ):  # a list is of two
            connection = HTTPConnection(address.removeprefix("http://"))
            connection.request(
                "GET",
                f"/?token={TOKEN}",
                headers={"Host": "runs.example", "X-Forwarded-Proto": scheme},
            )
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Location"]) == (303, "/")
            assert ("; Secure;" in answer.headers["Set-Cookie"]) == is_secure
            connection.close()

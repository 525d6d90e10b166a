"""The dashboard asked as its page asks it: whom it refuses, what an address shows, and what it says
of a store in trouble.
"""

import gzip
import html
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from pipeline.report.dashboard.app import make_app
from pipeline.report.dashboard.guard import COOKIE, guard
from pipeline.report.dashboard.permalink import ViewState
from pipeline.report.page import VIEWS
from pipeline.report.stores import Store, StoredRun
from tests.helpers.fake_store import FakeStore
from tests.helpers.hand_made import CLAIM, KEY, study
from tests.helpers.small import Refused
from tests.report.test_figures import LARGEST

OTHER = "f" * 16
# of the runs by one worker
GROUP = study().groups[0].key
TOKEN = "a token of more than a word"


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    for seed in (0, 1):
        store.add_finished(f"bptt-{seed}", "BPTT", seed=seed, newest=2000.0 + seed)
        store.add_finished(f"sltt-{seed}", "SLTT", seed=seed, newest=2010.0 + seed)
    store.add(
        "other", study=OTHER, rule="OTTT-A", status="FAILED", experiment="cifar", newest=1500.0
    )
    return store


class Asking:
    """A page's questions to the server."""

    def __init__(
        self, store: Store, *, host: str = "127.0.0.1", token: str | None = None, every: float = 1
    ) -> None:
        app = make_app(store, name="store", every=every)
        guard(app, host=host, token=token)
        self.client: FlaskClient = app.test_client()

    def list(self, search: str = "", *, look: bool = True) -> str:
        return self.client.get(f"/list{search or '?'}{'&look=1' * look}").get_data(as_text=True)

    def study(self, search: str = "", *, seen: str = "") -> dict[str, Any]:
        """What the page is told; nothing where that is what it has seen."""
        answer = self.client.get(f"/study{search or '?'}&seen={seen}")
        assert answer.status_code in (200, 204), answer.get_data(as_text=True)
        return answer.get_json() if answer.status_code == 200 else {}

    def show(self, search: str = "", *, seen: str = "") -> str:
        return self.study(search, seen=seen).get("html", "")

    def picked(self, search: str) -> Sequence[str]:
        """The runs with a checked box."""
        return re.findall('aria-checked="true" id="run-([^"]*)"', self.show(search))


@pytest.fixture
def asking(store: FakeStore) -> Asking:
    return Asking(store)


# ---------------------------------------------------------------------------------- whom it answers


@pytest.mark.parametrize("path", ["/", "/list", "/study", "/csv", "/web/page.css", "/nothing"])
def test_a_token_is_asked_of_every_request(store: FakeStore, path: str):
    client = Asking(store, host="0.0.0.0", token=TOKEN).client
    refused = client.get(path)
    assert refused.status_code == 401 and refused.get_data(as_text=True).startswith(
        "dashboard: the first request must have the token"
    )
    assert store.asked == []
    wrong = client.get(path, query_string={"token": TOKEN[:-1]})
    assert (
        wrong.status_code == 401
        and "must be the server's --token" in wrong.get_data(as_text=True)
        and "Set-Cookie" not in wrong.headers
    )
    client.set_cookie(COOKIE, TOKEN)
    assert (
        client.get(path).status_code == 401
    )  # the cookie is made of the token, it is not the token


def test_the_token_once_then_a_cookie(store: FakeStore):
    client = Asking(store, host="0.0.0.0", token=TOKEN).client
    answer = client.get("/", query_string={"study": KEY, "token": TOKEN})
    assert (answer.status_code, answer.headers["Location"]) == (303, f"/?study={KEY}")
    cookie = answer.headers["Set-Cookie"]
    assert (
        "HttpOnly" in cookie
        and "SameSite=Lax" in cookie
        and "Secure" not in cookie
        and TOKEN not in cookie
    )
    assert client.get("/").status_code == client.get("/list").status_code == 200
    bare = Asking(store, host="0.0.0.0", token=TOKEN).client
    assert bare.get("/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    ("status", "hosts"),
    [
        (200, ["localhost", "LOCALHOST:8050", "127.0.0.1:1", "[::1]:8050"]),
        # names that somebody points here
        (
            403,
            [
                "evil.example",
                "evil.example:8050",
                "127.0.0.1.evil.example",
                "0.0.0.0",
                "[::2]:80",
            ],
        ),
    ],
)
def test_names_of_loopback_alone_are_answered(asking: Asking, status: int, hosts: list[str]):
    answers = [asking.client.get("/", headers={"Host": host}) for host in hosts]
    assert {answer.status_code for answer in answers} == {status}
    said = "without a --token, the host of the address must be localhost or a loopback address; got"
    assert {said in answer.get_data(as_text=True) for answer in answers} == {status == 403}


def test_an_answer_protects_its_reader(asking: Asking):
    answer = asking.client.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self';" in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == "no-store"
    assert re.findall("https?://", answer.get_data(as_text=True)) == []


def test_with_a_token_it_answers_to_the_name_that_a_proxy_keeps(store: FakeStore):
    client = Asking(store, token=TOKEN).client
    named = {"Host": "runs.example"}
    assert client.get("/", headers=named).status_code == 401
    assert client.get("/", headers={**named, "Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize(
    ("store", "words", "said"),
    [
        ("mlflow.db", ("--host", "0.0.0.0"), "token"),
        ("mlflow.db", ("--host", "::"), "token"),
        ("mlflow.db", ("--host", "a-name.example"), "token"),
        ("mlflow.db", ("--token", " "), "token"),
        ("mysql://host/x", (), "must be sqlite:///FILE or the address of a server"),
    ],
)
def test_another_host_takes_a_token(refused: Refused, store: str, words: tuple[str], said: str):
    assert said in refused("dashboard", "--store", store, *words)


# ------------------------------------------------------------------------------------ what is shown


def test_an_address_is_what_it_shows():
    place = ViewState(
        study=KEY, family="a b&c", runs=("01", "23"), view="learning", text="x=y", beside=OTHER
    )
    assert ViewState.at(place.search) == place
    assert ViewState.at("") == ViewState() and ViewState().search == ""
    assert ViewState.at(ViewState(runs=()).search).runs == ()
    assert ViewState.at("?view=nothing&sort=__class__&runs=none") == ViewState(runs=())
    second = ViewState.at(f"{place.search}&beside_family=b&beside_runs=45", second=True)
    other = {"study": OTHER, "family": "b", "runs": ("45",), "beside": KEY}
    assert second == replace(place, **other)


def test_the_list_filters_and_has_the_newest_first(store: FakeStore, asking: Asking):
    whole = asking.list()
    assert (
        whole.index(KEY[:8]) < whole.index(OTHER[:8])
        and "2 of 2 studies" in whole
        and "4 finished" in whole
    )
    for search, kept in (
        ("?text=sltt+fashion", KEY),
        ("?text=OTTT", OTHER),
        ("?text=failed", OTHER),
        ("?text=finished", KEY),
    ):
        found = asking.list(search)
        assert (
            "1 of 2 studies" in found
            and kept[:8] in found
            and ({KEY, OTHER} - {kept}).pop()[:8] not in found
        )
    assert set(store.asked) == {("runs",)}  # no journal is read for a list


def test_the_list_tells_the_protocols_apart_and_finds_them(store: FakeStore, asking: Asking):
    for letter, protocol in (("7", "tuned"), ("8", "trial")):
        tags = {"spiketrain.protocol": protocol, "spiketrain.tuned": '["optimizer.lr"]'}
        store.add(f"one-{protocol}", rule="SLTT", study=letter * 16, tags=tags)
    found = re.findall(r"SLTT \((t.*?)\)", asking.list())
    assert sorted(found) == ["trials of optimizer.lr", "tuned, optimizer.lr"]
    for text in ("trials", "tuned"):
        assert "1 of 4 studies" in asking.list(f"?text={text}")


def test_a_change_of_the_list_asks_the_store_for_no_other(store: FakeStore):
    asking = Asking(store, every=60)
    asking.list()
    for search in ("?text=sltt", "?view=time", "?text=failed", f"?study={KEY}&view=time"):
        assert "of 2 studies" in asking.list(search, look=False)
    assert store.asked == [("runs",)]
    store.add("new", study="e" * 16)
    assert "3 of 3 studies" in asking.list() and "3 of 3 studies" in asking.list(
        "?view=time", look=False
    )
    assert store.asked == 2 * [("runs",)]
    asking = Asking(store, every=0)  # the newest look is too long ago
    asking.list()
    store.add("newer", study="d" * 16)
    assert "4 of 4 studies" in asking.list("?view=time", look=False)


def test_the_figures_of_the_runs_that_are_picked(store: FakeStore, asking: Asking):
    whole = asking.study(f"?study={KEY}")
    assert len(asking.picked(f"?study={KEY}")) == whole["html"].count('role="checkbox"') == 4
    assert (
        "has the fewest saved bytes, 0.25 of the baseline" in whole["html"]
        and "Conditions of each rule" in whole["html"]
    )
    assert whole["html"].count("data-figure=") == len(whole["drawings"]) == 4
    some = asking.show(f"?study={KEY}&runs={store.members[1].id[:8]}")  # of SLTT
    assert some.count('role="checkbox"') == 4 and some.count('aria-checked="true"') == 1
    assert "No baseline" in some


def test_the_newest_study_is_open_and_says_how_it_differs(store: FakeStore, asking: Asking):
    params = {"model": "x.vgg", "time_steps": "4", "optimizer.lr": "0.1"}
    old = {"study": "d" * 16, "tags": {"spiketrain.recipe": "a-bptt"}, "newest": 1900.0}
    store.add("old", params={**params, "optimizer.lr": "0.03"}, **old)
    tags = {"spiketrain.recipe": "b-bptt", "hardware.gpu": "H100"}
    store.add("new", params=params, study="e" * 16, tags=tags, newest=3000.0)
    opened = asking.study()
    assert (opened["study"], opened["family"]) == ("e" * 16, "fashion")
    assert opened["window"] == "b-bptt: vgg, T = 4, Costs, spiketrain dashboard"
    assert ">b-bptt: vgg, T = 4</h2>" in opened["html"] and "lr 0.1 · H100" in opened["html"]
    beside = f"?beside={'d' * 16}&beside_family=fashion"
    differs = "lr 0.1 instead of 0.03, on H100"
    assert f"Unlike the study beside it:</span> {differs}" in asking.show(beside)
    second = asking.study(f"{beside}&study={'e' * 16}&second=1")
    assert second["study"] == "d" * 16
    assert "Unlike the study beside it:</span> lr 0.03 instead of 0.1, on" in second["html"]


def test_a_browser_keeps_plotly_whose_address_names_its_content(asking: Asking):
    address = re.findall('data-plotly="([^"]*)"', asking.client.get("/").get_data(as_text=True))
    answer = asking.client.get(address[0])
    assert answer.headers["Content-Encoding"] == "gzip"
    assert "immutable" in answer.headers["Cache-Control"]
    assert b"plotly.js" in gzip.decompress(answer.data)[:500]


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ("", "SLTT used 25 % of BPTT&#39;s memory and 75 % of its time"),
        ("?study=none", "no run of this study"),
        (f"?study={KEY}&runs=none", "Pick a run below"),
        (f"?study={KEY}&view=learning", "Learning curves"),
        (f"?study={KEY}&view=time", "Where the time goes"),
        (f"?study={KEY}&view=gradients", "Firing"),
        (f"?study={KEY}&view=runs", "a cpu"),
        (
            f"?study={KEY}&view=claims",
            "There are no claims, sweep or report of these runs; `spiketrain report SUITE`",
        ),
        (  # nobody picked the baseline, which has finished
            f"?study={KEY}&runs=sltt-1sl",
            "No baseline: no finished run of BPTT is shown. There are no ratios.",
        ),
    ],
)
def test_an_address_shows(asking: Asking, search: str, said: str):
    shown = asking.show(search)
    assert said in shown and "has finished" not in shown.partition("No baseline")[2]


def members(runs: dict[str, range]) -> list[StoredRun]:
    """One run of each rule and seed, the last of them started last and so first."""
    store = FakeStore()
    for rule, seeds in runs.items():
        for seed in seeds:
            store.add(f"{rule}-{seed}", rule=rule, seed=str(seed))
    return sorted(store.members, key=lambda run: int(run.seed), reverse=True)


@pytest.mark.parametrize(
    ("runs", "some_picked"),
    [
        # nine rules: two seeds whole, and the first of the oldest
        (
            dict.fromkeys(("BPTT", *(f"rule-{count}" for count in range(8))), range(3)),
            {
                *((seed, "BPTT") for seed in "012"),
                *((seed, f"rule-{count}") for seed in "12" for count in range(8)),
            },
        ),
        # a baseline that started first
        (
            {"BPTT": range(1), **{f"rule-{count}": range(1) for count in range(30)}},
            {("0", "BPTT"), ("0", "rule-29")},
        ),
        # a newest seed in which no baseline has begun
        (
            {"BPTT": range(1), **{f"rule-{count}": range(2) for count in range(23)}},
            {("0", "BPTT"), *(("1", f"rule-{count}") for count in range(23))},
        ),
    ],
)
def test_of_many_runs_24_of_the_newest_seeds_are_picked_baselines_first(
    runs: dict[str, range], some_picked: set[tuple[str, str]]
):
    picked = ViewState(study=KEY).picked(members(runs))
    assert len(picked) == 24 and some_picked <= {(run.seed, run.rule) for run in picked}


def test_which_boxes_are_checked_follows_what_is_picked(store: FakeStore, asking: Asking):
    for count in range(30):
        store.add_finished(f"{count:02}-ottt", "OTTT-A")
    picked = asking.picked(f"?study={KEY}")
    assert len(picked) == 24 and "No baseline" not in asking.show(f"?study={KEY}")
    ids = [run.id[:8] for run in store.members if run.study == KEY]
    assert picked[-1] == "bptt-0bp" and set(picked) < set(ids)
    assert asking.picked(f"?study={KEY}&runs={ids[3]}") == [ids[3]]


def test_an_address_that_names_no_runs_says_that_it_shows_the_newest(
    store: FakeStore, asking: Asking
):
    said = "The page shows the newest 24 of 34 runs, and means over these runs."
    assert "the newest" not in Asking(store).show(f"?study={KEY}")
    for count in range(30):
        store.add_finished(f"{count:02}-ottt", "OTTT-A", seed=count)
    for view in VIEWS:
        assert said in asking.show(f"?study={KEY}&view={view}")
    named = ".".join(run.id[:8] for run in store.members[:24])
    assert "The newest" not in asking.show(
        f"?study={KEY}&runs={named}"
    ) and "The newest" not in asking.show("?study=" + OTHER)


def test_nothing_is_drawn_again_without_news(store: FakeStore):
    asking = Asking(store)
    before = asking.study(f"?study={KEY}")["version"]
    assert asking.study(f"?study={KEY}", seen=before) == {}
    assert "Where the time goes" in asking.show(f"?study={KEY}&view=time", seen=before)
    store.add("going", rule="SLTT", status="RUNNING")
    asking = Asking(store)  # its list is kept for a second
    grown = asking.show(
        f"?study={KEY}&runs={'.'.join(run.id[:8] for run in store.members[1:])}", seen=before
    )
    assert grown.count('aria-checked="true"') == 4 and grown.count('role="checkbox"') == 5


def test_the_data_of_a_figure_is_a_file(store: FakeStore):
    client = Asking(store).client
    file = client.get(f"/csv?study={KEY}&name={GROUP}-ratios")
    assert file.mimetype == "text/csv" and file.get_data(as_text=True).startswith(
        "rule,quantity,divided by,ratio"
    )
    assert (
        client.get(f"/csv?study={KEY}&name={GROUP}-beside").get_data(as_text=True)
        == "rule,state bytes,start-up\nBPTT,1 kB ± 0 kB,0 ms ± 0 ms\nSLTT,1 kB ± 0"
        " kB,0 ms ± 0 ms\n"
    )
    assert (
        client.get(f"/csv?study={KEY}&name={GROUP}-held").status_code == 404
    )  # no run says what training holds
    for nothing in (
        f"study={KEY}&name=../../x",
        f"study={KEY}&name=g1-ratios",
        f"study={OTHER}&name={GROUP}-ratios",
    ):
        assert client.get(f"/csv?{nothing}").status_code == 404


def test_claims_and_sweeps_of_each_suite_are_a_view(store: FakeStore, asking: Asking):
    search = f"?study={KEY}&view=claims"
    for parent, seed in (("first", 2), ("second", 3)):
        tags = {
            "spiketrain.suite": f"launch-{seed}",
            "spiketrain.commit": "abc",
            "hardware.cpu": "a cpu",
        }
        store.add_finished(f"sltt-{seed}", "SLTT", seed=seed, parent=parent, tags=tags)
        claim = replace(CLAIM, ours=f"ours of launch {seed}")
        store.add_report(parent, claim, sweeps=(LARGEST,), printed=f"trials of launch {seed}\n")
    shown = asking.show(search)
    assert "<pre>trials of launch 3\n</pre>" in shown and "trials of launch 2" in shown
    assert (
        "does not hold" in shown
        and "Memory against time steps: small" in shown
        and shown.count("data-figure=") == 4 + 2 + 1  # and in the switch, and of all runs
    )
    file = "study-01234567-first-sweep1-memory-against-time-steps"
    assert "Each rule&#39;s own largest batch" in shown or "Each rule's own largest batch" in shown
    assert f'data-png="{file}"' in shown
    heads = [
        f"launch-{seed} ({parent}), commit abc, on a cpu"
        for parent, seed in (("second", 3), ("first", 2))
    ]
    places = [
        shown.index(text)
        for text in (f">{heads[0]}<", "ours of launch 3", f">{heads[1]}<", "ours of launch 2")
    ]
    assert places == sorted(places)  # whose a row is
    for name, text in (
        ("first-claims", "rule,claim,"),
        ("second-sweep1-largest", "rule,time steps,largest batch in 1 GB,"),
        ("second-claims", "ours of launch 3"),
    ):
        assert text in asking.client.get(f"/csv{search}&name={name}").get_data(as_text=True)
    before = asking.study(search)["version"]
    assert Asking(store).study(search, seen=before) == {}
    for parent in ("first", "second"):
        store.texts[parent, "report.json"] = "{}"
    assert "no claims, sweep or report" in Asking(store).show(search, seen=before)


def several_groups(store: FakeStore) -> None:
    """Runs by two workers beside those by one; each rule's are of a suite that tells one claim and
    one sweep, twice.
    """
    for rule in ("BPTT", "SLTT"):
        store.add_finished(f"two-{rule}", rule, parent=f"of-{rule}", workers=2)
        store.add_report(f"of-{rule}", CLAIM, sweeps=(LARGEST, LARGEST), printed="trials\n")


@pytest.mark.parametrize("view", VIEWS)
def test_each_table_of_a_view_has_a_name_of_its_own_and_each_file_is_there(
    store: FakeStore, asking: Asking, view: str
):
    """A table is a landmark, by which a screen reader tells it from the others."""
    several_groups(store)
    shown = asking.show(f"?study={KEY}&view={view}")
    assert {"costs": "Scaling over workers", "runs": "How the groups differ"}.get(view, "") in shown
    names = re.findall('role="region"[^>]* aria-label="([^"]*)"', shown)
    links = hrefs(shown.partition('class="view"')[2])  # the overview may have the same figures
    assert len(set(names)) == len(names) >= 2 and len(set(links)) == len(links) >= 2
    assert {asking.client.get(link).mimetype for link in hrefs(shown)} == {"text/csv"}


def hrefs(page: str) -> list[str]:
    return list(map(html.unescape, re.findall('href="([^"]*)"', page)))


def test_a_link_to_a_file_stays_the_groups_whatever_runs_come(store: FakeStore):
    """The group with most rules, then that of the run that started last, stands first."""
    several_groups(store)
    asking = Asking(store)
    two, one = _groups(asking)
    assert two[1] == one[1] == "study-01234567" and one[0] == GROUP
    file = f"/csv?study={KEY}&name={two[0]}-ratios"
    before = asking.client.get(file).get_data(as_text=True)
    store.add_finished("ottt", "OTTT-A")
    asking = Asking(store)  # its list is kept for a second
    assert (
        list(_groups(asking)) == [one, two]
        and asking.client.get(file).get_data(as_text=True) == before
    )


def _groups(asking: Asking) -> Iterator[tuple[str, str]]:
    """The key of each group in the order of the page, and how its files begin."""
    for text in re.findall('download="([^"]*)-costs.csv"', asking.show(f"?study={KEY}")):
        name, _, key = text.rpartition("-")
        yield key, name


def test_a_run_that_nobody_hears_of_says_so_beside_its_state(store: FakeStore):
    store.add_finished("going", "SLTT", status="RUNNING", newest=time.time() - 30)
    before = Asking(store).study(f"?study={KEY}")
    assert "<td>running</td>" in before["html"] and "no report" not in before["html"]
    store.add("going", rule="SLTT", status="RUNNING", newest=time.time() - 30.5 * 60)
    shown = Asking(store).study(f"?study={KEY}", seen=before["version"])
    assert "<td>running, no report for 30 min</td>" in shown["html"]
    assert "running, no report for 30 min" in Asking(store).show(f"?study={KEY}&view=runs")


def test_a_state_has_one_word_in_the_list_the_filter_the_boxes_and_the_figures(
    store: FakeStore, asking: Asking
):
    about: dict[str, Any] = {"study": OTHER, "experiment": "cifar", "status": "FAILED"}
    store.add_finished("lost", "SLTT", **about, tags={"spiketrain.diverged": "true"})
    store.add_finished("broken", "SLTT", **about, tags={"spiketrain.diverged": "false"})
    store.add_finished("ended", "SLTT", **{**about, "status": "KILLED"})
    assert "1 diverged, 2 failed, 1 stopped" in asking.list(
        "?text=diverged"
    ) and "0 of 2 studies" in asking.list("?text=killed")
    assert "1 of 2 studies" in asking.list("?text=diverged")
    shown, runs = (asking.study(f"?study={OTHER}&view={view}") for view in ("costs", "runs"))
    rows = [
        re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)[:5]
        for row in re.findall("<tr>(.*?)</tr>", runs["html"])
    ]
    for name, state in (("lost", "diverged"), ("broken", "failed"), ("ended", "stopped")):
        cells = f"{name}</button></th><td>SLTT</td><td>0</td><td>{state}</td>"
        assert cells in shown["html"]
        assert [name, "SLTT", "0", OTHER[:8], state] in rows
    assert "0, 1 failed, 1 stopped, 1 diverged" in shown["html"]


def test_the_list_tells_silent_runs_from_those_that_go_on(store: FakeStore, asking: Asking):
    store.add("dead", study=OTHER, status="RUNNING", experiment="cifar", newest=0.0)
    assert "1 failed, 1 silent" in asking.list("?text=silent") and "0 of 2 studies" in asking.list(
        "?text=running"
    )
    store.add("alive", study=OTHER, status="RUNNING", experiment="cifar", newest=time.time() - 30)
    found = asking.list("?text=running")
    assert (
        "1 of 2 studies" in found
        and OTHER[:8] in found
        and "1 failed, 1 running, 1 silent" in found
    )


def test_names_from_outside_stay_text(store: FakeStore, asking: Asking):
    script = "<script>alert(1)</script>"
    store.add(script, rule="<b>bold</b>", experiment='"><img src=x>')
    study = asking.study(f"?study={KEY}&view=runs")
    answers = [asking.list(), asking.list(f"?text={script}"), study["html"]]
    assert all("&lt;script&gt;" in answer and "&lt;b&gt;bold" in answer for answer in answers[2:])
    for answer in (
        *answers,
        asking.client.get(f"/?study={KEY}&text={script}").get_data(as_text=True),
    ):
        assert "<script>alert" not in answer and "<b>bold" not in answer and "<img" not in answer


# --------------------------------------------------------------------------------- store in trouble


def test_a_store_in_trouble_is_a_sentence_and_the_store_that_is_back_is_shown(store: FakeStore):
    asking = Asking(store)
    seen = asking.study(f"?study={KEY}")["version"]
    store.trouble = "store x does not exist"
    store.add_finished("new", "SLTT", seed=7)
    asking = Asking(store)
    assert "Store x does not exist." in asking.list() and "Store x does not exist." in asking.show(
        f"?study={KEY}", seen=seen
    )
    assert asking.client.get(f"/csv?study={KEY}&name={GROUP}-ratios").status_code == 503
    store.trouble = ""
    assert KEY[:8] in asking.list() and len(asking.picked(f"?study={KEY}")) == 5

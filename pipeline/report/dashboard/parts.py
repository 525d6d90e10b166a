"""The list of studies and the figures of one, as Dash's HTML components."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dash import dcc, html

from pipeline.core.units import counted
from pipeline.report import scaling, tables
from pipeline.report.dashboard import blocks
from pipeline.report.dashboard.place import ONLY, SORTS, VIEWS, Place, View, short, states_words
from pipeline.report.figure import Figure, Missing
from pipeline.report.figures import ratios, trade_off
from pipeline.report.figures_learning import learning_curves, standings
from pipeline.report.figures_maps import firing_rates, gradient_fidelity, temporal_share
from pipeline.report.figures_time import time_parts
from pipeline.report.live import SuiteReport
from pipeline.report.page import TRADED
from pipeline.report.silence import state_told
from pipeline.report.store import StoredRun, StoredStudy, state_of
from pipeline.report.study import Group, Study
from pipeline.report.swept import LARGEST_SAID, swept

SHOWN = 200
"""studies of a list"""
_COLUMNS = {
    "study": "study",
    "family": "family",
    "rules": "rules",
    "seeds": "seeds",
    "runs": "runs",
    "newest": "newest sign of life",
}
_NOT_PICKED = "no finished run of {} in this group is among those picked"
_NOT_TOLD = (
    "The store has no claims, sweep or report of these runs; `spiketrain report SUITE` puts there"
    " what a suite has."
)


def study_list(place: Place, studies: Sequence[StoredStudy]) -> list[Any]:
    """A table with a link to each study; its heads sort it."""
    found = place.listed(studies)
    if not studies:
        return [
            html.P(
                "The store has no run of spiketrain yet; `spiketrain launch RECIPE` makes one.",
                className="note",
            )
        ]
    count = f"{len(found)} of {counted(len(studies), 'study', 'studies')}"
    more = (
        "" if len(found) <= SHOWN else f"; the first {SHOWN} are shown, the filter finds the others"
    )
    rows = [_row(place, study) for study in found[:SHOWN]]
    return [
        html.P(count + more, className="aside", role="status"),
        blocks.scroll(
            [
                html.Caption("Studies: runs that may be compared", className="unseen"),
                html.Thead(html.Tr([_head(place, column) for column in SORTS])),
                html.Tbody(rows),
            ],
            "Studies",
        ),
    ]


def _head(place: Place, column: str) -> html.Th:
    here = place.sort == column
    down = not place.descending if here else column in ("newest", "runs", "seeds")
    arrow = ("\u2193" if place.descending else "\u2191") if here else ""
    told = blocks.aria(sort="descending" if place.descending else "ascending") if here else {}
    mark = html.Span(arrow, className="arrow", **blocks.aria(hidden="true"))
    link = dcc.Link(
        [_COLUMNS[column], mark],
        href="/" + (place.change(sort=column, descending=down).search or "?"),
    )
    return html.Th(link, scope="col", **told)


def _row(place: Place, study: StoredStudy) -> html.Tr:
    here = (place.study, place.family) == (study.study, study.experiment)
    there = place.change(
        study=study.study, family=study.experiment, runs=None if not here else place.runs
    )
    link = dcc.Link(study.study[:8] or "unknown", href="/" + there.search)
    rules = ", ".join(study.rules) + (f" ({study.protocol})" if study.protocol else "")
    cells = [study.experiment, rules, _seeds(study.seeds), states_words(study), _when(study.newest)]
    told = {**blocks.aria(current="true"), "className": "here"} if here else {}
    return html.Tr([html.Th(link, scope="row"), *map(html.Td, cells)], **told)


def only_buttons() -> html.Fieldset:
    return _choice("With a run that is", "only", {key: words for key, (words, _) in ONLY.items()})


def view_buttons() -> html.Fieldset:
    return _choice("View", "view", VIEWS)


def _choice(legend: str, what: str, names: Mapping[Any, str]) -> html.Fieldset:
    """One of a few: Dash 4.4's RadioItems and Checklist put roles on their labels that a screen
    reader cannot use.

    They are made once, and which one is pressed follows: a button that is exchanged for another
    loses the press it is under."""
    buttons = [
        html.Button(
            words,
            id={"change": what, "to": name},
            type="button",
            className="button",
            **blocks.aria(pressed=blocks.yes(False)),
        )
        for name, words in names.items()
    ]
    return html.Fieldset([html.Legend(legend), html.Div(buttons, className="choices")])


def run_boxes() -> html.Fieldset:
    """Which runs of a study are shown; its boxes come with a study."""
    all_or_none = [
        html.Button(
            [words, html.Span(" runs", className="unseen")],
            id={"change": "every", "to": name},
            type="button",
            className="button",
        )
        for name, words in (("all", "All"), ("none", "None"))
    ]
    return html.Fieldset(
        [
            html.Legend("Runs", id="picked"),
            html.Div(id="runs", className="boxes"),
            html.Div(all_or_none, className="actions"),
        ]
    )


def boxes(place: Place, members: Sequence[StoredRun]) -> list[html.Button]:
    picked = {run.id for run in place.picked(members)}
    return [
        html.Button(
            [html.B(run.name), f" {run.rule}, seed {run.seed or '?'}, {state_words(run)}"],
            id={"change": "runs", "to": short(run)},
            type="button",
            role="checkbox",
            **blocks.aria(checked=blocks.yes(run.id in picked)),
        )
        for run in members
    ]


def state_words(run: StoredRun) -> str:
    """`diverged`, or `running, no word for 25 min`"""
    return state_told(state_of(run), run.newest)


def figures(place: Place, study: Study, reports: Sequence[SuiteReport], theme: str) -> list[Any]:
    """What the view of a study shows, group by group, or suite by suite; what was not measured, and
    why, at its end.
    """
    notes = [html.P(note, className="note") for note in study.notes]
    if not study.runs:
        why = (
            "None of the runs that were picked can be shown."
            if notes
            else "Pick one of its runs above."
        )
        return [*notes, html.P(why, className="note")]
    if place.view == "runs":
        return [*notes, *_places(place, study)]
    if place.view == "claims":
        return [*notes, *_told_by_reports(place, reports, theme)]
    parts: list[Any] = [*notes]
    missing: list[Any] = []
    for group in study.groups:
        title = tables.named(group)
        parts.append(html.H3(title, id=group.key))
        if place.view == "costs":
            parts += list(_costs(place, group))
        if place.view == "learning" and (beside := standings(group)):
            parts += [html.H4("Beside the published run"), html.Ul(list(map(html.Li, beside)))]
        for each in drawn(place.view, group):
            if isinstance(each, Missing):
                missing.append(html.Li([html.B(each.title), f": {title}: {each.why}."]))
            else:
                parts.append(blocks.figure(place, group.key, each, theme, where=title))
    if place.view == "costs" and (scaled := scaling.scaling(study)) is not None:
        parts += [html.H3("Scaling over workers"), html.P(scaling.SAID, className="aside")]
        parts += [
            blocks.table(scaled, "Steady images/s over workers, measured"),
            blocks.csv_link(place, "scaling", "scaling over workers"),
        ]
    return [*parts, html.H3("Not measured"), html.Ul(missing)] if missing else parts


def newest_alone(
    place: Place, picked: Sequence[StoredRun], members: Sequence[StoredRun]
) -> list[Any]:
    """A note where the address names no runs and not all are shown: the same address shows others
    when a seed begins.
    """
    if place.runs is not None or len(picked) == len(members):
        return []
    told = (
        f"The newest {len(picked)} of {len(members)} runs; means are of these, and another seed"
        " that begins changes them."
    )
    return [html.P(f"{told} Whoever picks runs has them in the address.", className="note")]


def drawn(view: View, group: Group) -> Iterator[Figure | Missing]:
    """The figures of a view, or why there are none."""
    if view == "costs":
        if group.has_baseline:  # else a note says so
            yield ratios(group)
        for name in TRADED:
            yield trade_off(group, name)
    elif view == "learning":
        yield learning_curves(group)
    elif view == "time":
        yield time_parts(group)
    elif view == "gradients":
        yield gradient_fidelity(group)
        yield temporal_share(group)
        yield firing_rates(group)


def csv_of(place: Place, study: Study, reports: Sequence[SuiteReport], name: str) -> str | None:
    """The data of a figure or a table of this view, by its name; None where there is none."""
    if name == "runs":
        return tables.provenance(study).to_csv()
    if name == "differences" and len(study.groups) > 1:
        return tables.recipe_differences(study).to_csv()
    if name == "scaling" and (scaled := scaling.scaling(study)) is not None:
        return scaled.to_csv()
    for report in reports:
        if name == f"{report.key}-claims" and report.told.claims:
            return tables.claims(report.told.claims).to_csv()
        for each in swept(report.told.sweeps):
            for figure in each.figures:
                if name == f"{report.key}-{each.key}-{figure.name}":
                    return figure.table.to_csv()
            if name == f"{report.key}-{each.key}-largest" and each.largest is not None:
                return each.largest.to_csv()
    for group in study.groups:
        if name == f"{group.key}-costs":
            return tables.costs(group).to_csv()
        if name == f"{group.key}-beside":
            found = tables.beside(group)
            return None if found is None else found.to_csv()
        if name == f"{group.key}-held":
            found = tables.held(group)
            return None if found is None else found.to_csv()
        for each in drawn(place.view, group):
            if isinstance(each, Figure) and name == f"{group.key}-{each.name}":
                return each.table.to_csv()
    return None


def _costs(place: Place, group: Group) -> Iterator[Any]:
    if not group.has_baseline:
        why = group.several_baselines or _NOT_PICKED.format(group.against)
        yield html.P(f"No baseline: {why}. Nothing is divided.", className="note")
    lines = [html.Li([html.B(rule), f": {line}"]) for rule, line in tables.headlines(group)]
    if lines:
        yield html.Ul(lines, className="headlines")
    yield blocks.table(
        tables.costs(group),
        "Mean ± standard deviation over seeds, × the baseline over paired seeds",
        where=tables.named(group),
    )
    yield blocks.csv_link(place, f"{group.key}-costs", "costs", where=tables.named(group))
    if group.notes:
        yield html.Ul([html.Li(note) for note in group.notes], className="aside")
    yield html.H4("What stands behind the rows")
    yield blocks.table(
        tables.behind_the_rows(group),
        "The baseline of each row, as far as recipes tell",
        where=tables.named(group),
    )
    if (beside := tables.beside(group)) is not None:
        yield html.H4("Measured beside")
        yield html.P(tables.BESIDE_SAID, className="aside")
        yield blocks.table(
            beside,
            "What else was measured of each rule: mean ± standard deviation over seeds",
            where=tables.named(group),
        )
        yield blocks.csv_link(
            place, f"{group.key}-beside", "measured beside", where=tables.named(group)
        )
    if (held := tables.held(group)) is not None:
        yield html.H4("What training holds")
        yield html.P(tables.HELD_SAID, className="aside")
        caption = "What each rule holds, by kind: mean ± standard deviation over seeds"
        yield blocks.table(held, caption, where=tables.named(group))
        yield blocks.csv_link(
            place, f"{group.key}-held", "what training holds", where=tables.named(group)
        )


def _places(place: Place, study: Study) -> Iterator[Any]:
    yield html.H3("Hardware and commits")
    yield blocks.table(tables.provenance(study), "Each run, where it ran and at which commit")
    yield blocks.csv_link(place, "runs", "hardware and commits")
    if len(study.groups) > 1:
        yield html.H3("How the groups differ")
        yield blocks.table(tables.recipe_differences(study), "Fields that differ")
        yield blocks.csv_link(place, "differences", "how the groups differ")


def _told_by_reports(place: Place, reports: Sequence[SuiteReport], theme: str) -> Iterator[Any]:
    """Claims, sweeps and what a suite's own report prints, which `spiketrain report` puts into the
    store, of each suite by itself: they are of its runs alone."""
    found = [
        report
        for report in reports
        if report.told.claims or report.told.sweeps or report.printed or report.note
    ]
    for report in found:
        yield html.H3(report.title)
        if report.note:
            yield html.P(report.note, className="note")
        if report.told.claims:
            yield html.H4("Claims")
            caption = "What is published, what was measured here, and whether it holds"
            claimed = tables.claims(report.told.claims)
            yield blocks.table(claimed, caption, where=report.title, shown=len(claimed.rows))
            yield blocks.csv_link(place, f"{report.key}-claims", "claims", where=report.title)
        for count, each in enumerate(swept(report.told.sweeps), start=1):
            where, key = f"sweep {count}, {report.title}", f"{report.key}-{each.key}"
            for figure in each.figures:
                yield blocks.figure(place, key, figure, theme, where=where)
            if each.largest is not None:
                yield html.H4("Each rule's own largest batch")
                yield html.P(LARGEST_SAID, className="aside")
                yield blocks.table(each.largest, "Largest batch and its speed", where=where)
                yield blocks.csv_link(
                    place, f"{key}-largest", f"largest batches, {each.recipe}", where=where
                )
        if report.printed:
            yield html.H4("The suite's own report")
            yield blocks.printed(report.printed, f"The suite's own report, {report.title}")
    if not found:
        yield html.P(_NOT_TOLD, className="note")


def _seeds(seeds: Sequence[str]) -> str:
    return (
        ", ".join(seeds)
        if len(seeds) <= 6
        else f"{', '.join(seeds[:3])} ... {seeds[-1]} ({len(seeds)})"
    )


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))

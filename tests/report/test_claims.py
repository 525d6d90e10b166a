"""Claims against figures that were chosen to hold them just, and just not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.recipe import write_json
from pipeline.report.claims import Claim, Measured, flat_in_t, measured, print_claims, saved_bytes, time_at_most, time_of_k
from recipes.compare import claims_fashion


def rule(*, saved: float = 0.0, forward: float = 1.0, backward: float = 2.0) -> Measured:
    return Measured(saved_bytes=saved, forward_s=forward, backward_s=backward)


def test_means_over_runs_and_batches() -> None:
    summaries = [
        {"peak_saved_bytes": 10, "steady_forward_s": 2.0, "steady_backward_s": 4.0},
        {"peak_saved_bytes": 30, "steady_forward_s": 4.0, "steady_backward_s": 6.0},
    ]
    found = measured(summaries)
    assert found == Measured(saved_bytes=20, forward_s=3.0, backward_s=5.0)
    assert (found.compute_s, found.ratio) == (8.0, pytest.approx(5 / 3))


@pytest.mark.parametrize(("saved", "holds"), [(24.9, True), (25.1, False)])
def test_saved_bytes_are_held_to_one_in_t_and_a_twentieth(saved: float, holds: bool) -> None:
    assert saved_bytes("SLTT", rule(saved=saved), rule(saved=100), T=5, published="").holds is holds


@pytest.mark.parametrize(("largest", "holds"), [(102.9, True), (103.1, False)])
def test_flat_is_within_three_per_cent_of_the_least(largest: float, holds: bool) -> None:
    claim = flat_in_t("SLTT", {2: 101.0, 4: largest, 16: 100.0}, published="")
    assert claim.holds is holds and claim.claim == "saved bytes from T = 2 to 16"


@pytest.mark.parametrize(("seconds", "holds"), [(1.46, True), (1.47, False)])
def test_the_time_of_one_step_is_held_to_what_r_allows_of_the_faster_bptt(seconds: float, holds: bool) -> None:
    """T = 6, r = 2: 1.1 x 8/18 = .4889, of 3 s 1.4667; the slower BPTT would allow more."""
    one = rule(forward=seconds, backward=0.0)
    claim = time_of_k("SLTT-1", one, [rule(forward=2.0, backward=4.0), rule()], T=6, k=1, published="")
    assert claim.holds is holds and claim.bound == "<= 0.489 (r = 2.00)"


@pytest.mark.parametrize(("seconds", "holds"), [(2.99, True), (3.01, False)])
def test_sltt_may_take_as_long_as_the_faster_bptt(seconds: float, holds: bool) -> None:
    claim = time_at_most("SLTT", rule(forward=seconds, backward=0.0), [rule(forward=9.0), rule()], bound=1.0, published="")
    assert claim.holds is holds


def test_what_does_not_hold_is_shown_so_and_what_was_not_run_says_nothing() -> None:
    console = Console(file=io.StringIO(), width=200)
    broken = flat_in_t("SLTT", {2: 100.0, 16: 200.0}, published="constant")
    absent = Claim(about="SLTT, ImageNet", claim="top-1", published="66.19 %", bound="", ours="not run here", holds=None)
    print_claims([broken, absent], console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("does not hold" in line and "+100.0%" in line for line in lines)
    assert any("not run here" in line and "hold" not in line for line in lines)


def test_a_run_too_short_to_be_timed_is_none_to_judge_by() -> None:
    with pytest.raises(ValueError, match="neither its first nor counted; got none to take steady_forward_s of"):
        measured([{"peak_saved_bytes": 10, "steady_forward_s": None, "steady_backward_s": None}])


def test_fashions_claims_are_of_what_was_trained(tmp_path: Path) -> None:
    """Not of the sizes that its file was written with: `--set time_steps=4` is judged at T = 4, and so is its sweep."""
    changed = claims_fashion.recipe().override({"time_steps": 4, "model.neuron.leak": 0.25})
    trained = next(iter(changed.recipes))
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"peak_saved_bytes": 10, "steady_forward_s": 1.0, "steady_backward_s": 2.0}))
    points = [{"time_steps": T, "cost": {"rule": "SLTT", "peak_saved_bytes": 10}} for T in (2, 4)]
    (run / "sweep.json").write_text(json.dumps({"points": points}))
    swept = claims_fashion._swept(trained, beside=run)
    folders = {rule: [run] for rule in claims_fashion.RULES}
    saved, flat, time_of_one, time = claims_fashion._claims(trained, folders, [run], swept)
    assert (saved.about, saved.bound, saved.holds) == ("SLTT, leak 1/4, T = 4", "<= 0.300", False)
    assert (flat.claim, flat.holds) == ("saved bytes from T = 2 to 4", True)
    assert time_of_one.bound == "<= 0.550 (r = 2.00)" and time.holds
    assert saved.published == "0.30 of GPU memory (ImageNet), 0.36 of GPU memory (CIFAR-10)"
    assert time_of_one.published == "0.43 of training hours (ImageNet)" and time.published.startswith("0.91 of training hours")


@pytest.fixture
def on_two_machines(make_run: Callable, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Fashion's runs; of the first study the last seed was trained elsewhere, ten times as fast, and so was BPTT step by step."""
    monkeypatch.setattr(claims_fashion, "_imagenet", lambda: iter(()))
    monkeypatch.setattr(claims_fashion, "_swept", lambda trained, beside: SWEPT)
    runs = {}
    for recipe in claims_fashion.recipe().recipes:
        rule, study = recipe.rule.build().label, recipe.name.split("-")[3]
        is_elsewhere = study == "11" and (recipe.seed == 2 or rule == "BPTT-chunk-1")
        seconds = 0.1 if is_elsewhere else 1.0
        run = runs[recipe.name] = make_run(
            recipe.name,
            rule=rule,
            seed=recipe.seed,
            study=study * 8,
            steady_forward_s=seconds,
            steady_backward_s=2 * seconds if "1" not in rule else 0.1 * seconds,
            peak_saved_bytes=1000 if rule == "BPTT" else 100,
            hardware={"cpu": "a fast cpu" if is_elsewhere else "a cpu", "cores": 2, "gpu": "none"},
        )
        write_json(run / "recipe.json", recipe.to_json())
    return runs


SWEPT = {"points": [{"time_steps": T, "cost": {"rule": "SLTT", "peak_saved_bytes": 10}} for T in (2, 4)]}


def test_fashions_claims_are_judged_on_one_machine(on_two_machines: dict[str, Path]) -> None:
    console = Console(file=io.StringIO(), width=200)
    told = claims_fashion.report(on_two_machines, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert [len(told["studies"][study]) for study in claims_fashion.STUDIES] == [2, 1]
    assert "leak-1-11: claims are judged on a cpu, 2 cores; 2 workers alone; elsewhere: claims-leak-1-11-bptt-2," in said
    assert said.count("claims are judged on") == 1
    first, second = told["claims"][:4], told["claims"][4:]
    assert [claim["holds"] for claim in first] == [True, True, True, True] and len(second) == 4
    # Folded BPTT beside it takes 3 s; the faster one elsewhere, 0.11 s, is nobody's divisor.
    assert first[3]["ours"] == "1.000"


def test_fashions_claims_without_bptt_beside_them_are_not_judged(on_two_machines: dict[str, Path]) -> None:
    trained = next(iter(claims_fashion.recipe().recipes))
    run = on_two_machines["claims-leak-1-11-sltt-0"]
    found = list(claims_fashion._claims(trained, {"sltt": [run], "bptt": [], "sltt-1": []}, [], SWEPT))
    assert [claim.holds for claim in found] == [None, True, None, None]
    assert found[0].ours == "no run beside BPTT's on one machine"


def test_imagenets_rows_say_which_precision_each_figure_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = SimpleNamespace(rules=[SimpleNamespace(rule="SLTT", memory_bytes=9.5e9, hours=60.0)])
    monkeypatch.setattr(claims_fashion, "plan", lambda *given, **about: planned)
    rows = {(claim.about.split(",")[0], claim.claim): claim for claim in claims_fashion._imagenet()}
    memory = rows["SLTT", "memory"]
    assert (memory.published, memory.ours) == ("8.47 GB, AMP", "not run here; plan in fp32: 9.5 GB, 60 h")
    assert rows["BPTT", "time"].published == "73.8 h, AMP" and "no plan fits one card" in rows["BPTT", "time"].ours

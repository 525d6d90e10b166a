"""What a suite's own report returns beside its figures: claims, and sweeps over time steps.

As the report itself has them, as `sweep --format json` prints one, and as MLflow keeps them beside
the page (report.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from pipeline.measure.memory import format_hardware
from pipeline.report.claims import Claim
from pipeline.report.runs import ReportError

_NUMBERS = ("peak_saved_bytes", "forward_s", "backward_s")


@dataclass(frozen=True, kw_only=True)
class Returned:
    """What `Study` shows of it."""

    claims: tuple[Claim, ...] = ()
    sweeps: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "claims": [asdict(claim) for claim in self.claims],
            "sweeps": [dict(sweep) for sweep in self.sweeps],
        }


def returned(value: Any, where: str) -> Returned:
    """Of what a report returned, its "claims" and its "sweeps", each a list or a mapping of them.

    Raises:
        ReportError: a claim or a sweep that is none.
    """
    told = value if isinstance(value, Mapping) else {}
    return Returned(
        claims=tuple(_claim(each) for each in _objects(told.get("claims"))),
        sweeps=tuple(sweep_of(each, where) for each in _objects(told.get("sweeps"))),
    )


def sweep_of(value: Any, where: str) -> Mapping[str, Any]:
    """What pages show of a sweep; its largest batches, and what they cost, where it looked for
    them.

    Raises:
        ReportError: it is none; `where` it came from.
    """
    try:
        kept: dict[str, Any] = {name: str(value[name]) for name in ("recipe", "commit")}
        kept |= {"samples": int(value["samples"]), "hardware": dict(value["hardware"])}
        format_hardware(kept["hardware"])  # as pages do
        if value.get("memory_bytes") is not None:
            kept["memory_bytes"] = int(value["memory_bytes"])
        return {**kept, "points": [_point(point) for point in value["points"]]}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ReportError(
            f"report: {where} must hold what sweep --format json prints; {error!r}"
        ) from error


def _point(value: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"time_steps": int(value["time_steps"]), "cost": _cost(value["cost"])}
    if value.get("largest_batch") is not None:
        kept["largest_batch"] = int(value["largest_batch"])
    if value.get("at_largest") is not None:
        kept["at_largest"] = cost = _cost(value["at_largest"])
        if not float(cost["forward_s"]) + float(cost["backward_s"]):
            raise ValueError("at_largest must have taken seconds; got 0")
    return kept


def _cost(value: Any) -> dict[str, Any]:
    cost = dict(value)
    cost["rule"]
    for name in (*_NUMBERS, *(("state_bytes",) if cost.get("state_bytes") is not None else ())):
        if (
            not 0 <= float(cost[name]) < math.inf
        ):  # of a suite's report.json, null where it is not finite
            raise ValueError(f"{name} must be a number from 0; got {cost[name]!r}")
    return cost


def _objects(value: Any) -> list[Mapping[str, Any]]:
    values = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return [each for each in values if isinstance(each, Mapping)]


def _claim(value: Mapping[str, Any]) -> Claim:
    needed = [each.name for each in fields(Claim) if each.default is MISSING]
    if missing := [name for name in needed if name not in value]:
        raise ReportError(
            f"report: a claim must have {', '.join(needed)}; there is no {missing[0]}"
        )
    return Claim(**{each.name: value[each.name] for each in fields(Claim) if each.name in value})

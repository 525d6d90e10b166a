"""Every rule that is found in `pipeline/rules`, with the small network that its own tests export.

`tests/rules/test_x.py` exports for `pipeline/rules/x.py`:

    smallest_model()     optional: a fresh network from [T, B, 6] to [T, B, 3], with the same
                         weights at each call; it runs in float64 and float32; without it,
                         lif_network()
    contract_rules()     optional: fresh rules to test; without it, the rule's class called without
                         arguments
    quiet_rules()        optional: the same rules in the same order, with their noise off; without
                         it, contract_rules()
    contract_exceptions  optional: the name of a contract test, and why the rule cannot promise it
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

import pipeline.rules
from pipeline.rules.base import Rule
from tests.helpers.rule_networks import lif_network

FOLDER = Path(next(iter(pipeline.rules.__path__)))
FILES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))


@dataclass(frozen=True)
class Case:
    name: str
    rule: Callable[[], Rule]
    quiet: Callable[[], Rule]
    model: Callable[[], nn.Module]
    exceptions: dict[str, str]


def rule_classes(stem: str) -> list[type[Rule]]:
    module = importlib.import_module(f"pipeline.rules.{stem}")
    mine = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Rule) and c.__module__ == module.__name__
    ]
    return [c for c in mine if not c.__name__.startswith("_")]


def cases() -> list[Case]:
    found = []
    for stem in FILES:
        if not (Path(__file__).parents[1] / "rules" / f"test_{stem}.py").exists():
            continue  # test_discovery says so
        beside = importlib.import_module(f"tests.rules.test_{stem}")
        build = getattr(
            beside, "contract_rules", lambda stem=stem: [c() for c in rule_classes(stem)]
        )
        quiet = getattr(beside, "quiet_rules", build)
        for index, example in enumerate(build()):
            found.append(
                Case(
                    name=f"{stem}-{index}-{example.label}",
                    rule=lambda build=build, index=index: build()[index],
                    quiet=lambda quiet=quiet, index=index: quiet()[index],
                    model=getattr(beside, "smallest_model", lif_network),
                    exceptions=getattr(beside, "contract_exceptions", {}),
                )
            )
    return found


CASES = cases()

"""Studies in words: `fashion-demo: vgg_sws on fashion, T = 10`, and how two studies differ.

The fields of a recipe are texts by dotted key, as in recipe.json (`fields_of`) and as the
parameters of a run in MLflow.
"""

import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import PurePath

from pipeline.core.units import first_few, rounded
from pipeline.recipe.json import flat
from pipeline.recipe.recipe import Role, roles
from pipeline.report.results import Run, describe_conditions

MACHINE = "machine"  # a field beside those of the recipe
_FOLDERS = ("data.folder", "data.path", "data.root")


def fields_of(run: Run) -> dict[str, str]:
    """The fields of a run's recipe, and its machine and workers."""
    return {**dict(flat(dict(run.recipe))), MACHINE: describe_conditions(run)}


def title_of(fields: Mapping[str, str], names: Iterable[str], family: str = "") -> str:
    """A title such as `fashion-demo: vgg_sws on fashion, T = 10`, of what is known.

    Args:
        fields: of one recipe.
        names: the names of all recipes, of which the title has the common beginning.
        family: takes the place of a common beginning.
    """
    parts = [name.split("-") for name in dict.fromkeys(names)]
    common = takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))
    name = "-".join(each[0] for each in common)
    if len(parts) > 1:  # a number at the end of what all names begin with is half of a value
        name = name.rstrip("-0123456789")
    name = name or family or fields.get("family", "")
    folder = next((fields[key] for key in _FOLDERS if key in fields), fields.get("data", ""))
    network, data = _last(fields.get("model", "")), PurePath(_last(folder)).name
    on = " on ".join(filter(None, (network, data)))
    about = ", ".join(
        filter(None, (on, f"T = {fields['time_steps']}" if "time_steps" in fields else ""))
    )
    return ": ".join(filter(None, (name, about)))


def shared_fields(all_fields: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The entries that are the same in all mappings."""
    first, *others = all_fields
    return {
        key: text for key, text in first.items() if all(each.get(key) == text for each in others)
    }


def facts_of(fields: Mapping[str, str]) -> str:
    """The settings that a reader asks for first, and the machine."""
    named = (("batch_size", "batch {}"), ("optimizer.lr", "lr {}"), ("epochs", "epochs {}"))
    texts = [text.format(fields[key]) for key, text in named if key in fields]
    return " · ".join(filter(None, (*texts, fields.get("precision"), fields.get(MACHINE))))


def difference(fields: Mapping[str, str], others: Mapping[str, str]) -> str:
    """How a study differs from another one: `lr 0.1 instead of 0.03`. Empty if it does not.

    Fields in which runs of one study may differ are left out, and so are the paths of files.
    """
    own, other = (_tuned(each) for each in (fields, others))
    texts = []
    if own != other:
        texts.append(f"tuned {', '.join(own)}" if own else "shared settings")
    for key in dict.fromkeys((*fields, *others)):
        pair = [_short(each.get(key, "none")) for each in (fields, others)]
        if pair[0] == pair[1] or key in (*own, *other) or not _is_shared(key):
            continue
        name = key.rpartition(".")[2].replace("_", " ")
        words = f"on {pair[0]}" if key == MACHINE else f"{name} {pair[0]} instead of {pair[1]}"
        texts.append(words)
    return first_few(texts, 4)


def _tuned(fields: Mapping[str, str]) -> list[str]:
    try:
        return json.loads(fields.get("tuned", "[]")) or []
    except ValueError:  # MLflow takes any text, and one run must not hide the others
        return []


def _is_shared(key: str) -> bool:
    role = roles().get(key) or roles().get(key.partition(".")[0], Role.STUDY)
    return Role.STUDY in role and key not in ("tuned", "protocol")


def _last(text: str) -> str:
    """The name at the end of a dotted name; other texts stay."""
    return text.rpartition(".")[2] if text.replace(".", "").isidentifier() else text


def _short(value: str) -> str:
    if value.startswith("/"):
        return "a path"
    try:
        return rounded(float(value), digits=3)
    except ValueError:
        return _last(value)

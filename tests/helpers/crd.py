"""The fields and types of KubeRay's resources, and what in a manifest does not fit them.

`tests/golden/kuberay.json` holds the facts: `kinds` are what may be written, `types` what several
of them share. A type is `string`, `integer`, `number`, `boolean`, `integer-or-string` or `object`
(anything), `string:a|b` for one of these words, `[type]` for a list, `{"*": type}` for free keys,
`{field: type}` for known ones, `field!` for one that must be there; or a name in `types`. Of pod
templates there is what our manifests use, no more: a field that is added there is looked up and
added here.

tools/kuberay_facts.py writes the file.
"""

from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "kuberay.json"

TYPES = {
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "string": str,
    "integer-or-string": int | str,
}


def misfits(manifest: Any, facts: dict[str, Any]) -> list[str]:
    """What is unknown, missing or of another type, each with its path; none of a manifest that
    fits.
    """
    kind = manifest.get("kind")
    if kind not in facts["kinds"]:
        return [f"kind: must be one of {', '.join(facts['kinds'])}; got {kind!r}"]
    return _misfits(manifest, facts["kinds"][kind], facts["types"], kind)


def _misfits(value: Any, type_: Any, types: dict[str, Any], path: str) -> list[str]:
    if isinstance(type_, str):
        name, _, words = type_.partition(":")
        if name in types:
            return _misfits(value, types[name], types, path)
        if name == "object":
            return [] if isinstance(value, dict) else [f"{path}: must be an object; got {value!r}"]
        if not isinstance(value, TYPES[name]) or (isinstance(value, bool) and name != "boolean"):
            return [f"{path}: must be {name}; got {value!r}"]
        return (
            []
            if not words or value in words.split("|")
            else [f"{path}: must be one of {words}; got {value!r}"]
        )
    if isinstance(type_, list):
        if not isinstance(value, list):
            return [f"{path}: must be a list; got {value!r}"]
        return [
            each
            for index, item in enumerate(value)
            for each in _misfits(item, type_[0], types, f"{path}[{index}]")
        ]
    if not isinstance(value, dict):
        return [f"{path}: must be an object; got {value!r}"]
    fields = {name.removesuffix("!"): each for name, each in type_.items()}
    found = [
        f"{path}.{name.removesuffix('!')}: is missing"
        for name in type_
        if name[-1] == "!" and name[:-1] not in value
    ]
    for name, each in value.items():
        if name in fields or "*" in fields:
            found += _misfits(each, fields.get(name, fields.get("*")), types, f"{path}.{name}")
        else:
            found.append(f"{path}.{name}: is unknown")
    return found

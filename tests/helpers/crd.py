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

from jsonschema import Draft202012Validator

GOLDEN = Path(__file__).parents[1] / "golden" / "kuberay.json"


def misfits(manifest: Any, facts: dict[str, Any]) -> list[str]:
    """What is unknown, missing or of another type, each with its path; none of a manifest that
    fits.
    """
    kind = manifest.get("kind")
    if kind not in facts["kinds"]:
        return [f"kind: must be one of {', '.join(facts['kinds'])}; got {kind!r}"]
    types = {name: _schema(type_) for name, type_ in facts["types"].items()}
    checked = Draft202012Validator({"$defs": types, **_schema(facts["kinds"][kind])})
    return [f"{each.json_path}: {each.message}" for each in checked.iter_errors(manifest)]


def _schema(type_: Any) -> dict[str, Any]:
    if isinstance(type_, list):
        return {"type": "array", "items": _schema(type_[0])}
    if isinstance(type_, dict):
        fields = {name.removesuffix("!"): _schema(each) for name, each in type_.items()}
        return {
            "type": "object",
            "additionalProperties": fields.pop("*", False),
            "properties": fields,
            "required": [name[:-1] for name in type_ if name[-1] == "!"],
        }
    name, _, words = type_.partition(":")
    if words:
        return {"enum": words.split("|")}
    if name in ("string", "integer", "number", "boolean", "object"):
        return {"type": name}
    return {"type": ["integer", "string"]} if "-or-" in name else {"$ref": f"#/$defs/{name}"}

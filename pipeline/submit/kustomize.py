"""What `kubectl kustomize` makes of the folders in `infra/`, without kubectl.

Of kustomize's format: `resources` (files and folders), `patches` as lists of JSON 6902 operations for a target of one kind, and
`images`. Anything else is refused. Strategic patches are, too: of kinds that it has no schema of, such as KubeRay's, kustomize
replaces a list whole, so a patch of one container's memory would take its volumes away.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

FILE = "kustomization.yaml"


def build(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a folder with a kustomization.yaml, patched, in the order in which it names them.

    Raises:
        ValueError: a file is missing or damaged, says what is not supported, or patches what is not there.
    """
    file = folder / FILE
    told = _one(file)
    unknown = sorted(set(told) - {"apiVersion", "kind", "resources", "patches", "images"})
    if unknown:
        raise ValueError(f"{file}: may say resources, patches and images; got {', '.join(unknown)}")
    manifests: list[dict[str, Any]] = []
    for name in told.get("resources") or ():
        path = folder / name
        manifests += build(path) if path.is_dir() else _read(path)
    for patch in told.get("patches") or ():
        _patch(manifests, patch, file)
    for image in told.get("images") or ():
        if "name" not in image or set(image) - {"name", "newName", "newTag", "digest"}:
            raise ValueError(f"{file}: an image must say name, and newName, newTag or digest; got {image}")
        for manifest in manifests:
            _rename_images(manifest, image)
    return manifests


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        found = list(yaml.safe_load_all(file.read_text()))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: must be YAML: {' '.join(str(error).split())}") from error
    if not found or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{file}: must hold mappings, divided by ---")
    return found


def _one(file: Path) -> dict[str, Any]:
    found = _read(file)
    if len(found) != 1:
        raise ValueError(f"{file}: must hold one document; got {len(found)}")
    return found[0]


# ------------------------------------------------------------------------------------------------------------------- patches


def _patch(manifests: list[dict[str, Any]], patch: dict[str, Any], file: Path) -> None:
    target = patch.get("target")
    if set(patch) != {"target", "patch"} or not isinstance(target, dict) or set(target) != {"kind"}:
        raise ValueError(f"{file}: a patch must say patch, and its target's kind; got {', '.join(sorted(patch))} and {target}")
    try:
        operations = yaml.safe_load(patch["patch"])
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: a patch must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(operations, list) or not all(isinstance(each, dict) for each in operations):
        raise ValueError(f"{file}: a patch must be a list of op, path and value (JSON 6902); that of {target['kind']} is not")
    meant = [each for each in manifests if each.get("kind") == target["kind"]]
    if not meant:  # kustomize says nothing here, and the patch would be lost
        raise ValueError(f"{file}: a patch must have a target; got one for {target['kind']}, of which there is none")
    for manifest in meant:
        for operation in operations:
            _apply(manifest, operation, file)


def _apply(manifest: dict[str, Any], operation: dict[str, Any], file: Path) -> None:
    """One operation of JSON 6902, in place."""
    op, path = operation.get("op"), str(operation.get("path", ""))
    keys = [key.replace("~1", "/").replace("~0", "~") for key in path.split("/")[1:]]
    if op not in ("add", "replace", "remove") or not keys or path[0] != "/" or (op != "remove" and "value" not in operation):
        raise ValueError(f"{file}: an operation must be an add, replace or remove of a path like /spec/x; got {operation}")
    value = copy.deepcopy(operation.get("value"))
    try:
        holder: Any = manifest
        for key in keys[:-1]:
            holder = holder[int(key)] if isinstance(holder, list) else holder[key]
        last: Any = keys[-1]
        if isinstance(holder, list):
            if op == "add":
                holder.insert(len(holder) if last == "-" else int(last), value)
                return
            last = int(last)
        if op == "remove":
            del holder[last]
            return
        if op == "replace":
            holder[last]  # must be there
        holder[last] = value
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: cannot {op} {path} of {manifest.get('kind')}: {error} is not there") from error


# -------------------------------------------------------------------------------------------------------------------- images


def _rename_images(node: Any, image: dict[str, str]) -> None:
    """As kustomize does it in any kind: in whatever is called containers or initContainers, without tag and digest."""
    for container in containers(node):
        name, mark, rest = _divided(str(container.get("image", "")))
        if name == image["name"]:
            if "digest" in image:
                mark, rest = "@", image["digest"]
            elif "newTag" in image:
                mark, rest = ":", str(image["newTag"])
            container["image"] = f"{image.get('newName', name)}{mark}{rest}"


def containers(node: Any) -> list[dict[str, Any]]:
    """Every container that a manifest names, whatever its kind, for reading and for writing."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in ("containers", "initContainers") and isinstance(value, list):
            found += value
        else:
            found += containers(value)
    return found


def _divided(image: str) -> tuple[str, str, str]:
    """`host:5000/name:tag` as its name, the mark (`:` or `@`) and what follows it."""
    if "@" in image:
        return image.partition("@")
    start = image.rfind("/") + 1  # a colon before it is a port's
    name, mark, tag = image[start:].partition(":")
    return image[:start] + name, mark, tag

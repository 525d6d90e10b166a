"""The fields and types of KubeRay's resources, and what in a manifest does not fit them.

`tests/golden/kuberay.json` holds the facts: `kinds` are what may be written, `types` what several
of them share. A type is `string`, `integer`, `number`, `boolean`, `integer-or-string` or `object`
(anything), `string:a|b` for one of these words, `[type]` for a list, `{"*": type}` for free keys,
`{field: type}` for known ones, `field!` for one that must be there; or a name in `types`. Of pod
templates there is what our manifests use, no more: a field that is added there is looked up and
added here.

After a new KubeRay, with its ray.io_rayjobs.yaml and ray.io_rayclusters.yaml
(ray-operator/config/crd/bases) in one folder:

    .venv/bin/python tests/helpers/crd.py v1.7.0 FOLDER > tests/golden/kuberay.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

GOLDEN = Path(__file__).parents[1] / "golden" / "kuberay.json"

POD = {
    "affinity",
    *(
        "automountServiceAccountToken",
        "containers",
        "imagePullSecrets",
        "nodeSelector",
        "priorityClassName",
        "restartPolicy",
    ),
    *(
        "runtimeClassName",
        "securityContext",
        "serviceAccountName",
        "terminationGracePeriodSeconds",
        "tolerations",
        "volumes",
    ),
}
CONTAINER = {
    *(
        "args",
        "command",
        "env",
        "envFrom",
        "image",
        "imagePullPolicy",
        "lifecycle",
        "name",
        "ports",
        "resources",
        "securityContext",
    ),
    *("volumeMounts", "workingDir"),
}
AFFINITY = {"nodeAffinity"}
VOLUME = {"configMap", "emptyDir", "name", "persistentVolumeClaim", "secret"}
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


# ----------------------------------------------------------------------------- the facts, condensed


def condensed(version: str, folder: Path) -> dict[str, Any]:
    """The facts, from two of KubeRay's CustomResourceDefinitions. Kinds of others are told here, by
    hand.
    """
    job, cluster = (_spec(folder / f"ray.io_{name}.yaml") for name in ("rayjobs", "rayclusters"))
    group = cluster["properties"]["workerGroupSpecs"]["items"]["properties"]
    pod = group["template"]["properties"]["spec"]
    claim = pod["properties"]["volumes"]["items"]["properties"]["ephemeral"]["properties"][
        "volumeClaimTemplate"
    ]
    rules = cluster["properties"]["networkPolicy"]["properties"]["head"]["properties"]
    selector = rules["ingressRules"]["items"]["properties"]["from"]["items"]["properties"][
        "podSelector"
    ]
    _keep(pod, POD)
    _keep(pod["properties"]["containers"]["items"], CONTAINER)
    _keep(pod["properties"]["volumes"]["items"], VOLUME)
    _keep(pod["properties"]["affinity"], AFFINITY)
    metadata = {
        "name!": "string",
        "namespace": "string",
        "labels": {"*": "string"},
        "annotations": {"*": "string"},
    }
    policy = {
        "podSelector!": _type(selector),
        "policyTypes": ["string:Ingress|Egress"],
        "ingress": [_type(rules["ingressRules"]["items"])],
        "egress": [_type(rules["egressRules"]["items"])],
    }
    endpoint = {
        "port": "string",
        "relabelings": [{"replacement": "string", "targetLabel": "string"}],
    }
    monitor = {
        "selector!": _type(selector),
        "podMetricsEndpoints": [endpoint],
    }  # of prometheus-operator's podmonitor_types.go
    return {
        "version": f"KubeRay {version}",
        "kinds": {
            "RayCluster": _kind("ray.io/v1", "RayClusterSpec"),
            "RayJob": _kind("ray.io/v1", _type(job)),
            "NetworkPolicy": _kind("networking.k8s.io/v1", policy),
            "PersistentVolumeClaim": _kind("v1", _type(claim["properties"]["spec"])),
            "PodMonitor": _kind("monitoring.coreos.com/v1", monitor),
        },
        "types": {
            "Metadata": metadata,
            "RayClusterSpec": _type(cluster),
            "PodTemplateSpec": {
                "metadata": {"labels": {"*": "string"}, "annotations": {"*": "string"}},
                "spec!": _type(pod),
            },
        },
    }


def _spec(file: Path) -> dict[str, Any]:
    versions = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    return next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"][
        "properties"
    ]["spec"]


def _kind(version: str, spec: Any) -> dict[str, Any]:
    return {
        "apiVersion!": f"string:{version}",
        "kind!": "string",
        "metadata!": "Metadata",
        "spec!": spec,
    }


def _keep(schema: dict[str, Any], names: set[str]) -> None:
    schema["properties"] = {name: schema["properties"][name] for name in sorted(names)}


def _type(schema: dict[str, Any], name: str = "") -> Any:
    if name in ("template", "submitterPodTemplate"):
        return "PodTemplateSpec"
    if name == "rayClusterSpec":
        return "RayClusterSpec"
    if schema.get("x-kubernetes-int-or-string"):
        return "integer-or-string"
    if schema["type"] == "array":
        return [_type(schema["items"])]
    if schema["type"] != "object":
        return ":".join([schema["type"], *(["|".join(schema["enum"])] if "enum" in schema else [])])
    if "additionalProperties" in schema:
        return {"*": _type(schema["additionalProperties"])}
    if name == "headService" or "properties" not in schema:
        return "object"
    required = schema.get("required", ())
    return {
        f"{key}!" if key in required else key: _type(each, key)
        for key, each in sorted(schema["properties"].items())
    }


def _written(value: Any, indent: int = 0) -> str:
    """JSON with what fits into a line on one line."""
    flat = json.dumps(value)
    if len(flat) + indent < 110 or not isinstance(value, dict | list):
        return flat
    items = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    lines = [
        f"{json.dumps(key)}: {_written(each, indent + 1)}" if key else _written(each, indent + 1)
        for key, each in items
    ]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return (
        f"{start}\n"
        + ",\n".join(" " * (indent + 1) + line for line in lines)
        + f"\n{' ' * indent}{end}"
    )


if __name__ == "__main__":
    print(_written(condensed(sys.argv[1], Path(sys.argv[2]))))

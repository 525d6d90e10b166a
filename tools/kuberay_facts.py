"""Write tests/golden/kuberay.json, the fields and types of KubeRay's resources that tests of
manifests go by (tests/helpers/crd.py).

After a new KubeRay, with its ray.io_rayjobs.yaml and ray.io_rayclusters.yaml
(ray-operator/config/crd/bases) in one folder:

    .venv/bin/python tools/kuberay_facts.py v1.7.0 FOLDER > tests/golden/kuberay.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

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

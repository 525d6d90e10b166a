from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.submit.kustomize import build

PODS = """
kind: Pods
metadata: {name: a}
spec:
  containers:
    - {name: x, image: "app:1"}
    - {name: y, image: "host:5000/app"}
  deep:
    - initContainers:
        - {name: z, image: "app@sha256:00"}
"""


def write(folder: Path, kustomization: str, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(kustomization)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def patched(tmp_path: Path, operations: str) -> dict:
    patch = "resources: [pods.yaml]\npatches:\n  - target: {kind: Pods}\n    patch: |-\n"
    return build(write(tmp_path, patch + "".join(f"      {line}\n" for line in operations.splitlines()), pods=PODS))[0]


def test_resources_are_files_and_folders_in_order(tmp_path: Path) -> None:
    write(tmp_path / "base", "resources: [two.yaml]", two="kind: A\n---\nkind: B\n")
    over = write(tmp_path / "over", "resources: [own.yaml, ../base]", own="kind: C")
    assert [each["kind"] for each in build(over)] == ["C", "A", "B"]


def test_operations_of_json_6902(tmp_path: Path) -> None:
    pods = patched(
        tmp_path,
        """\
- {op: replace, path: /metadata/name, value: b}
- {op: add, path: /metadata/labels, value: {}}
- {op: add, path: /metadata/labels/a~1b~0c, value: d}
- {op: remove, path: /spec/deep}
- {op: remove, path: /spec/containers/0}
- {op: add, path: /spec/containers/-, value: {name: last}}
- {op: add, path: /spec/containers/0, value: {name: first}}
- {op: replace, path: /spec/containers/1/name, value: middle}""",
    )
    assert pods["metadata"] == {"name": "b", "labels": {"a/b~c": "d"}}
    assert [each["name"] for each in pods["spec"]["containers"]] == ["first", "middle", "last"]
    assert "deep" not in pods["spec"]


@pytest.mark.parametrize(
    ("image", "names"),
    [
        ("{name: app, newTag: 2}", ["app:2", "host:5000/app", "app:2"]),
        ("{name: app, newName: r.example/app}", ["r.example/app:1", "host:5000/app", "r.example/app@sha256:00"]),
        ("{name: 'host:5000/app', newTag: '2'}", ["app:1", "host:5000/app:2", "app@sha256:00"]),
        ("{name: app, digest: 'sha256:11'}", ["app@sha256:11", "host:5000/app", "app@sha256:11"]),
    ],
)
def test_images_are_renamed_wherever_containers_are(tmp_path: Path, image: str, names: list[str]) -> None:
    spec = build(write(tmp_path, f"resources: [pods.yaml]\nimages: [{image}]", pods=PODS))[0]["spec"]
    assert [each["image"] for each in (*spec["containers"], *spec["deep"][0]["initContainers"])] == names


@pytest.mark.parametrize(
    ("kustomization", "said"),
    [
        ("namePrefix: x-", "kustomization.yaml: may say resources, patches and images; got namePrefix"),
        ("resources: [nowhere.yaml]", "nowhere.yaml: cannot be read: No such file or directory"),
        ("resources: [empty.yaml]", "empty.yaml: must hold mappings, divided by ---"),
        ("a: b\n---\nc: d", "kustomization.yaml: must hold one document; got 2"),
        ("a: [b", "kustomization.yaml: must be YAML: while parsing"),
        ("images: [{newTag: '2'}]", "an image must say name, and newName, newTag or digest; got {'newTag': '2'}"),
        ("patches: [{path: p.yaml}]", "a patch must say patch, and its target's kind; got path and None"),
        ("patches: [{target: {kind: Pods}, patch: 'kind: Pods'}]", "must be a list of op, path and value (JSON 6902)"),
        ("patches: [{target: {kind: Pods}, patch: '- [' }]", "a patch must be YAML"),
        (
            "patches: [{target: {kind: Pods}, patch: '[]' }]",
            "a patch must have a target; got one for Pods, of which there is none",
        ),
    ],
)
def test_what_is_not_supported_or_not_there_is_refused(tmp_path: Path, kustomization: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        build(write(tmp_path, kustomization, empty=""))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ("- {op: replace, path: /spec/nothing, value: 1}", "cannot replace /spec/nothing of Pods: 'nothing' is not there"),
        ("- {op: add, path: /spec/nothing/x, value: 1}", "cannot add /spec/nothing/x of Pods: 'nothing' is not there"),
        ("- {op: replace, path: /spec/containers/2/image, value: 1}", "cannot replace /spec/containers/2/image of Pods"),
        ("- {op: remove, path: /spec/nothing}", "cannot remove /spec/nothing of Pods: 'nothing' is not there"),
        ("- {op: move, path: /spec, from: /x}", "an operation must be an add, replace or remove of a path like /spec/x"),
        ("- {op: add, path: /spec/x}", "an operation must be an add, replace or remove of a path like /spec/x"),
        ("- {op: add, path: spec/x, value: 1}", "an operation must be an add, replace or remove of a path like /spec/x"),
    ],
)
def test_an_operation_that_finds_nothing_is_refused(tmp_path: Path, operation: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        patched(tmp_path, operation)
    assert said in str(refused.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kustomization.yaml: cannot be read"):
        build(tmp_path / "nowhere")

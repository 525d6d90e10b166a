"""Image files with pages of a few samples, of which a test damages some."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.ffcv import manifest as manifests
from pipeline.data.ffcv.format import BetonWriter


def write_pages(
    path: Path,
    images: Sequence[bytes],
    *,
    page_bytes: int,
    labels: Sequence[int],
    classes: list[str],
    **about: Any,
) -> manifests.Manifest:
    """Write stored images, of which `about` says mode, height and width, with their manifest."""
    writer = BetonWriter(path, capacity=len(images), page_bytes=page_bytes)
    content = manifests.ContentHash(classes)
    for image, label in zip(images, labels, strict=True):
        for each in (writer, content):
            each.add(image, label=label, **about)
    writer.finish()
    manifest = manifests.describe(
        path, name=path.name, content=content.hexdigest(), classes=classes, labels=[*labels]
    )
    manifest.write(path.with_name(path.name + manifests.SUFFIX))
    return manifest

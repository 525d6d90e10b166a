"""Every module, object and file that tracked text names is there, whoever was renamed last."""

import re
import subprocess
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from tests.test_contributing import EXAMPLES

ROOT = Path(__file__).parents[1]
# These name what has gone. tests/test_inventory.py checks the last one.
HISTORY = ("CHANGELOG.md", "docs/LOG.md", "tests/inventory.toml")
KINDS = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".sbatch", ".json", ".css", ".js"}
TEXTS = {
    name: (ROOT / name).read_text()
    for name in subprocess.run(
        ("git", "ls-files"), cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    if (Path(name).suffix in KINDS or "." not in Path(name).name)
    and name not in HISTORY
    and (ROOT / name).is_file()
}

# A name that goes on behind a brace or a star, as `tests/rules/test_*.py`, is a pattern: skipped.
DOTTED = re.compile(r"(?<![\w./-])(?:pipeline|benchmarks)(?:\.[A-Za-z_]\w*)+(?![\w{*<])")
PATH = re.compile(
    r"(?<![\w/.-])(?:pipeline|tests|docs|recipes|benchmarks|infra|tools)/[\w./-]*\w(?![\w{*</-])"
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
# Tests give these to runs that they write by hand; users and `make docs` make the last two.
INVENTED = {
    "pipeline.data.Fashion",
    "pipeline.models.vgg.vgg",
    "recipes/fashion/mlp.py",
    "recipes/it",
    "infra/mlflow/.env",
    "docs/_build",
}


def is_example(name: str) -> bool:
    """Whether a reader puts a name of his own there, or an example of CONTRIBUTING makes it."""
    parts = re.split(r"[./]", name.removesuffix(".py"))
    return (
        name in INVENTED
        or name.startswith("docs/_build/")
        or bool({"x", "X", "test_x", "GROUP", "SIZE"} & set(parts))
        or any(name in (example, f"{example.replace('.', '/')}.py") for example in EXAMPLES)
    )


@cache
def resolved(dotted: str) -> Any:
    """A module or an object; None where there is no such one."""
    try:
        return resolve_name(dotted)
    except (ImportError, AttributeError):
        return None


def is_there(dotted: str) -> bool:
    """Also as a field that a class declares without a value."""
    holder, _, name = dotted.rpartition(".")
    fields = getattr(resolved(holder), "__annotations__", {})
    return resolved(dotted) is not None or name in fields


def named(pattern: re.Pattern[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for file, text in TEXTS.items():
        for name in pattern.findall(text):
            found.setdefault(name, file)
    return found


def test_every_dotted_name_can_be_imported() -> None:
    names = named(DOTTED)
    assert len(names) > 300
    assert {n: f for n, f in names.items() if not is_example(n) and not is_there(n)} == {}


def test_every_path_exists() -> None:
    paths = named(PATH)
    assert len(paths) > 150
    assert {p: f for p, f in paths.items() if not is_example(p) and not (ROOT / p).exists()} == {}


@pytest.mark.parametrize("page", [*(each for each in TEXTS if each.endswith(".md")), "docs/LOG.md"])
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    for link in LINK.findall((ROOT / page).read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


def test_the_log_has_each_entry_in_its_index() -> None:
    index, *entries = re.split(r"\n## (?=\d)", (ROOT / "docs/LOG.md").read_text())
    links = LINK.findall(index)
    headings = [anchor_of(entry.splitlines()[0]) for entry in entries]
    assert len(headings) > 80 and sorted(links) == sorted(f"#{each}" for each in headings)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), flags=re.MULTILINE)
    return {anchor_of(each) for each in headings}


def anchor_of(heading: str) -> str:
    """As GitHub makes it: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")

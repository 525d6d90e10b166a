"""The examples of CONTRIBUTING.md, which a contributor copies first. Saved in a copy of the tree,
each in the file that it names, they pass their tests and the contracts.
"""

import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from tests.helpers.loaders import read, same
from tests.helpers.small import finished, small_recipe, train_inline

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL))
EXAMPLES = [name.removesuffix(".py").replace("/", ".") for name in FILES]


def added(section: str) -> list[str]:
    """The files that a section has a contributor write or edit."""
    _, _, text = TEXT.partition(f"\n### {section}\n")
    return re.findall(r"^`([\w/]+\.py)`", re.split(r"\n##+ ", text)[0], flags=re.MULTILINE)


def test_a_part_is_one_file_and_its_test():
    for section in ("A rule", "A model", "A data set", "A command"):
        code, test = added(section)
        assert code.startswith("pipeline/") and test.startswith("tests/"), section
    assert len(added("A recipe")) == 1


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what git tracks, and the examples in it."""
    parts = ("pipeline", "recipes", "tests", "pyproject.toml")
    tracked = subprocess.run(("git", "ls-files", *parts), cwd=ROOT, capture_output=True, text=True)
    names = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    texts = {name: (ROOT / name).read_text() for name in names}
    assert len(texts) > 400 and not texts.keys() & FILES.keys()
    texts |= FILES
    diffs = re.findall(r"`([\w/]+\.py)`[^`]*\n\n```diff\n (.*)\n\+(.*)\n```", TEXT)
    assert len(diffs) == TEXT.count("```diff") == 2
    for name, before, line in diffs:
        assert texts[name].count(f"{before}\n") == 1
        texts[name] = texts[name].replace(f"{before}\n", f"{before}\n{line}\n")
    [function] = re.findall(r"gets this function:\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    texts[added("A command")[0]] += f"\n\n{function}"
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.full
def test_in_a_copy_of_the_tree_they_pass_their_tests_and_the_contracts(tree: Path):
    tests = [
        *(name for name in FILES if name.startswith("tests/")),
        *("tests/rules/test_contract.py", "tests/cli/test_examples.py"),
    ]
    mine = "LastStep or where or looked_at or not (contract or examples)"
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-k", mine, *tests),
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 20


def test_a_batch_walks_as_the_page_says(tmp_path: Path):
    chapter = re.split(r"\n## ", TEXT.partition("\n## The walk of a batch\n")[2])[0]
    walk = re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", chapter, flags=re.MULTILINE)
    assert len(walk) > 10
    seen: dict[tuple[str, str], None] = {}

    def note(frame: types.FrameType, event: str, _: object) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if event == "call" and path.startswith(str(ROOT)):
            call = (str(Path(path).relative_to(ROOT)), name)
            if call == walk[0] or walk[0] in seen:
                seen.setdefault(call)

    sys.setprofile(note)
    try:
        train_inline(tmp_path / "run", small_recipe(stop_after=1))
    finally:
        sys.setprofile(None)
    assert [call for call in seen if call in walk] == walk


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The recipe of the examples, as if each had been saved under its name."""
    for name in EXAMPLES:
        if not name.startswith("tests."):
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            block = FILES[f"{name.replace('.', '/')}.py"]
            exec(compile(block, f"CONTRIBUTING.md: {name}", "exec"), module.__dict__)
    return sys.modules["recipes.digits.sltt"]


def test_the_recipe_of_the_examples_trains(digits: types.ModuleType, tmp_path: Path):
    recipe = replace(digits.recipe(), backend="plain", stop_after=2)
    assert finished(tmp_path / "run", recipe)["steps"] == 2


def test_its_data_source_gives_every_sample_once_and_hashes_its_content(
    digits: types.ModuleType, monkeypatch: pytest.MonkeyPatch
):
    data, (x_NP, target_N) = digits.recipe().data.build(), load_digits(return_X_y=True)
    sizes = [{"rank": rank, "world": 2, "threads": 1} for rank in range(2)]
    trained = [data.train(seed=1, batch_size=60, micro_batch=15, **each) for each in sizes]
    evaluated = [data.val(micro_batch=40, **each) for each in sizes]
    assert [each.steps_per_epoch for each in trained] == [1500 // 60] * 2
    for loaders, first, count in ((trained, 0, 1500), (evaluated, 1500, 297)):
        batches = [batch for loader in loaders for batch in read(loader)]
        x, target, index = (
            np.concatenate([getattr(batch, name).numpy() for batch in batches])
            for name in ("x", "target", "index")
        )
        assert sorted(index) == list(range(count)) and x.dtype == np.float32
        assert ((x + 1) * 8).reshape(count, 64) == pytest.approx(x_NP[first + index])
        assert np.array_equal(target, target_N[first + index])
    # Of 15 samples on either rank.
    assert same(read(trained[0], start=60), read(trained[0])[2:])
    found = data.fingerprint()
    x_NP[7, 9] += 1
    module = sys.modules["pipeline.data.datasets.digits"]
    monkeypatch.setattr(module, "load_digits", lambda return_X_y: (x_NP, target_N))
    assert data.fingerprint() != found

"""The examples of CONTRIBUTING.md, which a contributor copies first. Saved in a copy of the tree,
each in the file that it names, they pass their tests and the contracts.
"""

import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from pipeline.data.base import Data
from pipeline.spiking.state import fresh_state
from tests.helpers.rule_networks import batch, cross_entropy, learn, lif_network
from tests.helpers.small import small_recipe, train_inline

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL))
"""what each file of the examples holds"""
EXAMPLES = [name.removesuffix(".py").replace("/", ".") for name in FILES]
CODE = [name for name in EXAMPLES if not name.startswith("tests.")]


@pytest.fixture
def modules(monkeypatch) -> list[types.ModuleType]:
    """As if each example had been saved under its name."""
    made = []
    for name in CODE:
        made.append(types.ModuleType(name))
        monkeypatch.setitem(sys.modules, name, made[-1])
        block = FILES[f"{name.replace('.', '/')}.py"]
        exec(compile(block, f"CONTRIBUTING.md: {name}", "exec"), made[-1].__dict__)
    return made


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
    tracked = subprocess.run(
        ("git", "ls-files", "pipeline", "recipes", "tests", "pyproject.toml"),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    for name, code in FILES.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    command, _ = added("A command")
    [function] = re.findall(r"gets this function:\n\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    diffs = re.findall(r"`([\w/]+\.py)`[^`]*\n\n```diff\n (.*)\n\+(.*)\n```", TEXT)
    assert len(diffs) == TEXT.count("```diff") == 2
    for name, before, line in diffs:
        text = (tmp_path / name).read_text()
        assert text.count(f"{before}\n") == 1
        (tmp_path / name).write_text(text.replace(f"{before}\n", f"{before}\n{line}\n"))
    with (tmp_path / command).open("a") as file:
        file.write(f"\n\n{function}")
    return tmp_path


def test_in_a_copy_of_the_tree_they_pass_their_tests_and_the_contracts(tree: Path):
    tests = [name for name in FILES if name.startswith("tests/")]
    tests += ["tests/rules/test_contract.py", "tests/cli/test_examples.py"]
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


def test_the_examples_run(modules):
    rule, model, (x_TBC, target) = modules[0].LastStep(), lif_network(), batch(3)
    rule.attach(model)
    assert len(learn(rule.loss_terms(model, x_TBC, cross_entropy(target)))) == 3
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()
    )

    recipe = modules[3].recipe()
    network = recipe.model.build()
    recipe.rule.build().attach(network)
    with fresh_state(network):
        assert network(torch.rand(2, 3, 1, 8, 8)).shape == (2, 3, 10)


def test_its_data_source_gives_every_sample_once(modules):
    digits = modules[3].recipe().data.build()
    assert isinstance(digits, Data)
    digits.check()
    x_NP, target_N = load_digits(return_X_y=True)
    trained = [
        digits.train(seed=1, rank=rank, world=2, batch_size=60, micro_batch=15, threads=1)
        for rank in range(2)
    ]
    evaluated = [digits.val(rank=rank, world=2, micro_batch=40, threads=1) for rank in range(2)]
    assert [each.steps_per_epoch for each in trained] == [1500 // 60] * 2
    for loaders, first, count in ((trained, 0, 1500), (evaluated, 1500, 297)):
        seen = []
        for loader in loaders:
            with loader.epoch(0) as batches:
                for each in batches:
                    row_B = first + each.index.numpy()
                    assert each.x.shape[1:] == digits.shape and each.x.dtype == torch.float32
                    assert ((each.x.flatten(1) + 1) * 8).numpy() == pytest.approx(x_NP[row_B])
                    assert each.target.tolist() == target_N[row_B].tolist()
                    seen += each.index.tolist()
        assert sorted(seen) == list(range(count))
    with trained[0].epoch(0, start=60) as later, trained[0].epoch(0) as whole:
        assert len(list(later)) == len(list(whole)) - 2  # of 15 samples on either rank
    for loader in (*trained, *evaluated):
        loader.close()


def test_its_fingerprint_is_of_the_content(modules):
    digits, (x_NP, target_N) = modules[3].recipe().data.build(), load_digits(return_X_y=True)
    found = digits.fingerprint()
    x_NP[7, 9] += 1
    modules[2].load_digits = lambda return_X_y: (x_NP, target_N)
    assert digits.fingerprint() != found

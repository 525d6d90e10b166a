"""A run remembers where its own code lies; nobody's path takes a folder that they did not ask
for.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import pipeline
from pipeline.launch import suite as launch
from pipeline.launch.cluster import Cluster
from pipeline.launch.driver import Inline
from pipeline.launch.prepare import prepare
from pipeline.recipe import own_code
from pipeline.recipe.own_code import needed
from pipeline.recipe.recipe import Recipe, spec
from pipeline.recipe.recipe_files import load_recipe, refuse_unnamed, trust_of
from pipeline.recipe.suite import Suite, SuiteFile
from pipeline.train.export import export_run
from tests.helpers.small import make_run, small_recipe

NETS = """
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear
from torch import nn

class Flat(nn.Module):
    def forward(self, x_TBCHW):
        return x_TBCHW.flatten(2)

def network(classes):
    return nn.Sequential(Flat(), Linear(64, 4), LIF(), Linear(4, classes))
"""
RECIPE = """
from own_nets.nets import network
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(model=spec(network, classes=10), epochs=1, stop_after=2)
"""


OWN = ("own_nets",)
NOT_TRUSTED = r"own_nets\.nets\.network is not in a trusted package"


def load(lab: Path) -> Recipe:
    made = load_recipe(lab / "own_recipe.py")
    assert isinstance(made, Recipe)
    return made


def forget() -> None:
    """As a process that has just begun."""
    for name in list(sys.modules):
        if name.startswith(("own_nets", "own_recipe")):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if not entry.endswith(("/lab", "/new"))]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "lab" / "own_nets").mkdir(parents=True)
    (tmp_path / "lab" / "own_nets" / "__init__.py").touch()
    (tmp_path / "lab" / "own_nets" / "nets.py").write_text(NETS)
    (tmp_path / "lab" / "own_recipe.py").write_text(RECIPE)
    yield tmp_path / "lab"
    forget()


@pytest.fixture
def run(lab: Path, tmp_path: Path) -> Path:
    """As it was launched in another process."""
    made = load(lab)
    trust = trust_of(made, [lab / "own_recipe.py"], ["own_nets"])
    assert prepare(made, Cluster(inline=True), tmp_path, name="run", trust=trust).trust == OWN
    forget()
    return tmp_path / "run"


def test_a_package_is_trusted_once_and_where_a_part_comes_from_it() -> None:
    targets = ["a.nets.Net", "b.rule", "pipeline.rules.sltt.SLTT"]
    for trust, wanted in (
        (["a", "b", "a"], ("a", "b")),
        (["a.nets", "a", "a.nets.Net", "b.rule"], ("a", "b.rule")),
        (["c", "a.net", "rule"], ()),
    ):
        assert needed(trust, targets) == wanted


def test_a_run_finds_the_package_that_its_user_trusts(run: Path, lab: Path) -> None:
    assert json.loads((run / "code.json").read_text()) == {"own_nets": str(lab)}
    for trust in ([], ["other", "own"]):
        with pytest.raises(ValueError, match=NOT_TRUSTED):
            Recipe.read(run / "recipe.json", trust=trust)
    assert str(lab) not in sys.path
    assert Recipe.read(run / "recipe.json", trust=OWN).model.target.__name__ == "network"
    assert sys.path[-1] == str(lab)
    forget()
    Recipe.read(run / "recipe.json", trust=["own_nets.nets"])  # less than the whole of it


def test_of_what_a_folder_says_the_trusted_package_alone_joins_the_path(
    run: Path, lab: Path
) -> None:
    (foreign := lab.parent / "new").mkdir()
    noted = json.loads((run / "code.json").read_text())
    noted["foreign"] = str(foreign)
    (run / "code.json").write_text(json.dumps(noted))
    Recipe.read(run / "recipe.json", trust=OWN)
    assert str(lab) in sys.path and str(foreign) not in sys.path


def test_a_suite_finds_it_too(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_train", lambda suite, *_: suite.folder)
    suite = Suite((load(lab), small_recipe(name="plain")))
    folder = launch.launch_suite(
        suite, Cluster(inline=True), tmp_path, stem="s", name="s", trust=OWN
    )
    # A run of it that has no part of the package does not ask for it.
    prepare(suite.recipes[1], Cluster(inline=True), tmp_path, name="plain", trust=OWN)
    assert (own_code.names(folder), own_code.names(tmp_path / "plain")) == (OWN, ())
    forget()
    assert SuiteFile.read(folder, trust=["own_nets"]).suite.recipes[0].model == load(lab).model


def test_an_export_finds_it_wherever_the_file_is(lab: Path, tmp_path: Path) -> None:
    with Inline() as launcher:
        launcher.run(replace(make_run(tmp_path / "trained", load(lab)), trust=OWN), "test")
    exported = export_run(
        tmp_path / "trained", tmp_path / "net.safetensors", trust=["own_nets", "own_recipe"]
    )
    forget()
    assert str(exported).endswith(
        f"\nload    pipeline.load('{tmp_path}/net.safetensors', trust=['own_nets'])"
    )
    with pytest.raises(ValueError, match=NOT_TRUSTED):
        pipeline.load(exported.file)
    assert str(lab) not in sys.path
    assert len(list(pipeline.load(exported.file, trust=["own_nets"]).parameters())) == 4


def test_code_that_is_gone_is_refused_in_one_line(run: Path, lab: Path) -> None:
    lab.rename(lab.parent / "new")
    with pytest.raises(ValueError) as refusal:
        Recipe.read(run / "recipe.json", trust=OWN)
    assert str(refusal.value) == (
        f"{run}: own_nets must be in {lab}, where it was at the launch; it is not there: put it"
        " back, or name its new folder in PYTHONPATH"
    )


def test_workers_with_different_files_of_it_tell_each_other(run: Path, lab: Path) -> None:
    Recipe.read(run / "recipe.json", trust=OWN)
    before = own_code.digest(OWN)
    assert own_code.digest(OWN) == before != own_code.digest([])
    (lab / "own_nets" / "nets.py").write_text(NETS + "\n")
    assert own_code.digest(OWN) != before


def test_what_is_of_the_installation_is_noted_without_a_folder(tmp_path: Path) -> None:
    names = ("torch.optim", "pipeline.rules")
    assert own_code.folders_of(names) == dict.fromkeys(names)
    own_code.write(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_an_init_file_and_one_module(lab: Path) -> None:
    (lab / "own_nets" / "__init__.py").unlink()
    made = load(lab)
    assert trust_of(made, [lab / "own_recipe.py"], ["own_nets"]) == OWN
    said = "^--trust: must name a package or module that can be imported; got no_such_package$"
    with pytest.raises(ValueError, match=said):
        trust_of(made, [lab / "own_recipe.py"], ["own_nets", "no_such_package"])
    names = ("own_nets", "own_recipe")
    assert own_code.folders_of(names) == dict.fromkeys(names, str(lab))


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[]",
        '{"own_nets": "lab"}',
        '{"own_nets": 3}',
        '{"--runs": "/lab"}',
    ],
)
def test_a_damaged_file_is_refused_in_one_line(run: Path, text: str) -> None:
    (run / "code.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{run}: {run / 'code.json'}: .*$"):
        Recipe.read(run / "recipe.json", trust=OWN)
    assert own_code.names(run) == ()
    with pytest.raises(ValueError, match=NOT_TRUSTED):  # who trusts nothing does not read it
        Recipe.read(run / "recipe.json")


# ---------------------------------------------------------------------- what a recipe file asks for


def test_a_file_that_only_imports_values_asks_for_nothing(lab: Path) -> None:
    """A path or a name that begins as the file does is no part of it."""
    (lab / "own_nets" / "values.py").write_text("EPOCHS = 3\n")
    file = lab / "own_recipe.py"
    file.write_text(
        "from own_nets.values import EPOCHS\n"
        "from tests.helpers.small import small_recipe\n"
        "def recipe():\n"
        "    return small_recipe(name='own_recipe.1', init='own_recipe.pt', epochs=EPOCHS)\n"
    )
    for named in ([], ["own_nets", "own_recipe"]):
        assert trust_of(load(lab), [file], named) == ()


def test_what_lies_beside_a_file_can_be_imported_whatever_the_path_is(
    lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(lab.parent)])
    assert load(lab).model == spec(sys.modules["own_nets.nets"].network, classes=10)
    for name in [name for name in sys.modules if name == "lab" or name.startswith("lab.")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_file_whose_name_cannot_be_imported_may_not_define_parts(lab: Path) -> None:
    file = lab / "own-recipe.py"
    file.write_text(NETS + RECIPE.replace("from own_nets.nets import network", ""))
    made = load_recipe(file)
    said = r"own-recipe\.py: a file that defines parts must have an importable name"
    with pytest.raises(ValueError, match=said):
        refuse_unnamed(made, [file])
    file.write_text(RECIPE)
    refuse_unnamed(load_recipe(file), [file])

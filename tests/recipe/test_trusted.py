"""What recipe.json may import reads and writes no file of its own accord, and recipes hold values.

Whoever writes a recipe.json chooses every keyword of its parts.
"""

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from pipeline.recipe.json import imported, is_inside, is_trusted
from pipeline.recipe.recipe import TRUSTED
from pipeline.recipe.spec import is_path

READERS = {
    "pipeline.models.teachers.cache.Cache",  # keeps answers in the folder that it is given
    "pipeline.models.teachers.network.network_teacher",
    "pipeline.models.teachers.timm.timm_teacher",  # by what its `weights` are
    "pipeline.models.teachers.probe.Probe",  # trains a head on answers that a Cache keeps
    "pipeline.models.teachers.weights.File",
    "pipeline.models.teachers.weights.Hub",
    "pipeline.models.teachers.weights.Package",
    "pipeline.models.teachers.weights.Untrained",
}
BUILTINS = {"open", "eval", "exec", "compile", "__import__"}
METHODS = {
    "open",
    "load",
    "loads",
    "save",
    "savez",
    "dump",
    "fromfile",
    "tofile",
    "memmap",
    "loadtxt",
    "savetxt",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "rmdir",
    "touch",
    "symlink_to",
    "rename",
    "load_state_dict_from_url",
    "create_model",
    "import_module",
}
MODULES = {
    "os", "pickle", "shutil", "subprocess", "socket", "urllib", "tempfile", "importlib",
    "runpy", "safetensors", "huggingface_hub", "requests", "mmap", "timm.create_model",
    "pipeline.core.files", "pipeline.recipe.json",
    "pipeline.core.tensor_file.read_state", "pipeline.core.tensor_file.load_deepspeed",
}  # fmt: skip
ITS_OWN = {"layer.open"}  # methods of ours that have the name of one that opens a file
# What data sets may import: it reads the files that they name, for a loader.
READER_OF_DATA = "pipeline.data.ffcv"


def modules() -> list[ModuleType]:
    """The modules of this package that are trusted whole."""
    found = []
    for name in (each for each in TRUSTED if each.startswith("pipeline.") and each not in READERS):
        module = importlib.import_module(name)
        found.append(module)
        inner = pkgutil.walk_packages(getattr(module, "__path__", ()), f"{name}.")
        names = [each.name for each in inner if is_trusted(each.name, TRUSTED)]
        found += map(importlib.import_module, names)
    return found


def imported_by(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (module + each.name for each in node.names)


def touches_files(source: str) -> Iterator[str]:
    """The calls and imports in a source by which it could read or write a file, or run code."""
    tree = ast.parse(source)
    for name in imported_by(tree):
        if is_inside(name, MODULES | {READER_OF_DATA}):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            name = called.rpartition(".")[2]
            if called in BUILTINS or ("." in called and name in METHODS and called not in ITS_OWN):
                yield f"calls {called}"


def test_trusted_modules_read_and_write_no_file() -> None:
    found = modules()
    rooms = {module.__name__.rsplit(".", 1)[0] for module in found}
    assert {f"pipeline.{room}" for room in ("data.datasets", "models", "rules", "spiking")} <= rooms
    assert [
        (module.__name__, text)
        for module in found
        for text in touches_files(Path(str(module.__file__)).read_text())
        if READER_OF_DATA not in text or not is_inside(module.__name__, ["pipeline.data"])
    ] == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("open('x')", "calls open"),
        ("torch.load(path)", "calls torch.load"),
        ("Path(folder).read_bytes()", "calls Path(folder).read_bytes"),
        ("import os", "imports os"),
        ("from os import path", "imports os.path"),
        ("def f():\n    from pickle import loads", "imports pickle.loads"),
        (
            "from pipeline.core.tensor_file import misfits, read_state",
            "imports pipeline.core.tensor_file.read_state",
        ),
        ("from pipeline.data.ffcv.reader import open_beton", "imports pipeline.data.ffcv.reader"),
    ],
)
def test_a_reader_is_found(source: str, said: str) -> None:
    [found] = touches_files(source)
    assert found.startswith(said)


def test_of_the_teachers_only_what_is_named_is_trusted() -> None:
    assert {name for name in TRUSTED if name.startswith("pipeline.models.teachers.")} == READERS
    teachers = "pipeline.models.teachers"
    name = f"{teachers}.cache.CachedPredictions"
    assert not is_trusted(name, TRUSTED) and not is_trusted(teachers, TRUSTED)
    assert is_trusted("pipeline.models.vgg.vgg_sws", TRUSTED)
    # A user may trust what is refused by name.
    assert is_trusted(name, (*TRUSTED, name)) and is_trusted(name, (*TRUSTED, teachers))


def test_of_what_is_trusted_only_data_and_teachers_take_a_path() -> None:
    named = [imported(name, TRUSTED) for name in READERS]
    made = {
        each
        for module in modules()
        for each in vars(module).values()
        if getattr(each, "__module__", "") == module.__name__
    }
    takes = {
        (each.__qualname__, key)
        for each in {*made, *named}
        for key in getattr(each.__init__ if isinstance(each, type) else each, "__annotations__", {})
        if is_path(each, key)
    }
    assert len(made) > 200
    assert takes == {
        ("Beton", "folder"),
        ("Events", "folder"),
        ("Cache", "folder"),
        ("File", "path"),
        ("network_teacher", "weights"),
    }


def test_no_recipe_starts_a_run_or_a_measurement() -> None:
    """None imports what trains or measures, not even for its report."""
    never = ("pipeline.launch", "pipeline.forecast", "pipeline.train.trainer", "subprocess", "ray")
    files = sorted(Path("recipes").rglob("*.py"))
    imports = {file: list(imported_by(ast.parse(file.read_text()))) for file in files}
    assert sum(map(len, imports.values())) > 200
    assert [
        (file, name) for file, names in imports.items() for name in names if is_inside(name, never)
    ] == []

"""From a run to one file and back: the same logits, bits 8 to a byte, and one line for a file that
cannot be read.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pipeline
from pipeline.data.pictures import Pretrained
from pipeline.launch.prepare import write_job
from pipeline.models.convnet import convnet
from pipeline.models.ms_resnet import MSResNet
from pipeline.models.nir import from_nir
from pipeline.models.qkformer import QKFormer
from pipeline.models.transforms import binarized
from pipeline.recipe.json import encode
from pipeline.recipe.recipe import Checkpointing, Recipe, Spec, spec
from pipeline.spiking.binary import binary_synapses
from pipeline.spiking.neuron import LIF
from pipeline.spiking.norm import BatchNorm
from pipeline.spiking.state import fresh_state
from pipeline.spiking.synapse import effective_weight
from pipeline.train.export import _digest, export_run, load_export, pack, unpack
from tests.helpers.small import Done, Refused, make_run, recipes_of, small_recipe, train_inline

NET = spec(convnet, classes=10, in_channels=1, stages=((5,), (6, 7), (7,)), kernel=3)


def recipe(weights: str = "scaled", part: str = "all_but_ends", **network: object) -> Recipe:
    """Two steps on a network whose numbers of weights 8 does not divide."""
    inside = NET.with_(**network)
    return small_recipe(
        model=spec(binarized, network=inside, part=part, weights=weights),
        stop_after=2,
        checkpoints=Checkpointing(every=0),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of every kind of 1-bit weights, one without norms, and one of full
    precision.
    """
    folder = tmp_path_factory.mktemp("runs")
    kinds = {weights: recipe(weights) for weights in ("scaled", "centred", "ir", "learnable")}
    kinds |= {"bare": recipe(norm="none"), "full": replace(recipe(), model=NET)}
    kinds["hard"] = replace(recipe(), model=NET.with_(neuron=spec(LIF, reset="zero")))
    for name, made in kinds.items():
        train_inline(folder / name, made)
    return folder


def logits(network: nn.Module, *, pixels: int = 8) -> torch.Tensor:
    x_TBCHW = torch.randn(3, 16, 1, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), fresh_state(network):
        return network(x_TBCHW)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def awake(network: nn.Module) -> nn.Module:
    """With gains and shifts under which every block has something to say, and the statistics of a
    few batches under them.
    """
    generator = torch.Generator().manual_seed(1)
    for norm in [module for module in network.modules() if isinstance(module, BatchNorm)]:
        nn.init.uniform_(norm.weight, 1, 3, generator=generator)
        nn.init.uniform_(norm.bias, 0.5, 2, generator=generator)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            with fresh_state(network):
                network(torch.randn(3, 8, 1, 16, 16, generator=generator))
    return network.eval()


@pytest.mark.parametrize("name", ["scaled", "centred", "ir", "learnable", "bare"])
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_it_comes_back_to_the_same_logits(
    name: str, layout: str, runs: Path, tmp_path: Path
) -> None:
    run, file = runs / name, tmp_path / "net.safetensors"
    told = export_run(run, file, format=layout)  # type: ignore[arg-type]
    trained, reloaded = pipeline.load(run), pipeline.load(file)
    expected = logits(trained)
    assert expected.abs().max() > 0.1 and not reloaded.training
    assert torch.equal(logits(reloaded), expected)
    if layout == "plain":
        assert all(
            torch.equal(value, reloaded.state_dict()[key])
            for key, value in trained.state_dict().items()
        )
        assert binary_synapses(reloaded).keys() == binary_synapses(trained).keys()
        return
    assert told.bit_synapses == 3
    for key, synapse in binary_synapses(trained).items():
        ours = effective_weight(reloaded.get_submodule(key))  # type: ignore[arg-type]
        assert torch.equal(ours, effective_weight(synapse))


def repacked(network: nn.Module) -> nn.Module:
    """Another network of the tensors that `pack` gives for a network."""
    another = copy.deepcopy(network)
    another.load_state_dict(unpack(another, pack(network)))
    return another


QKFORMER = spec(
    QKFormer, channels=32, depth=4, heads=2, classes=10, in_channels=1, shortcut="multiple"
)
MS_RESNET = spec(
    MSResNet, blocks=(2, 1), width=6, classes=10, in_channels=1, stem_stride=1, over="step"
)


@pytest.mark.parametrize(
    ("network", "part", "synapses"),
    [
        (QKFORMER, "ffn", 2 * 4),
        (MS_RESNET, "all_but_ends", 3 * 2),
        (MS_RESNET.with_(shortcut="multiple"), "all_but_ends", 3 * 2),
    ],
    ids=["QKFormer", "MS-ResNet", "MS-ResNet, multiple"],
)
def test_streams_of_real_numbers_come_back_to_the_same_logits(
    network: Spec, part: Any, synapses: int
) -> None:
    torch.manual_seed(0)
    trained = awake(binarized(network.build(), part=part))
    reloaded = repacked(trained)
    assert len(binary_synapses(trained)) == synapses
    expected = logits(trained, pixels=16)
    assert torch.equal(logits(reloaded, pixels=16), expected)
    for name in binary_synapses(trained):  # each of them counts
        weight: Any = reloaded.get_submodule(name).weight
        weight.data.neg_()
        assert (logits(reloaded, pixels=16) - expected).abs().max() > 1e-3, name
        weight.data.neg_()


def test_a_byte_holds_eight_weights_and_the_file_says_so(runs: Path, tmp_path: Path) -> None:
    told = export_run(runs / "scaled", tmp_path / "net.safetensors", format="packed")
    tensors = load_file(told.file)
    trained = pipeline.load(runs / "scaled")
    sizes = {"stages.1.0.conv": 270, "stages.1.1.conv": 378, "stages.2.0.conv": 441}
    assert binary_synapses(trained).keys() == sizes.keys()
    for name, synapse in binary_synapses(trained).items():
        bits, signs = tensors[f"{name}.bits"], synapse.weight.flatten() > 0
        assert (len(signs), len(bits)) == (sizes[name], -(-sizes[name] // 8))
        assert bits[0] == sum(2**place for place, is_set in enumerate(signs[:8]) if is_set)
    whole = sum(value.nbytes for value in trained.state_dict().values())
    stored = sum(value.nbytes for value in tensors.values())
    packed = (34 + 48 + 56) + 4 * (6 + 7 + 7)  # bits, and a scale for each filter
    assert told.plain_bytes == whole and whole - stored == 4 * 1089 - packed
    assert told.bit_parameters == 1089 and told.file.stat().st_size > stored
    metadata = metadata_of(told.file)
    wanted = {"format": "spiketrain", "version": "2", "layout": "packed", "time_steps": "3"}
    assert metadata.items() >= wanted.items()
    assert json.loads(metadata["model"])["target"] == "pipeline.models.transforms.binarized"
    # The latent weights are not in it, not even their sizes.
    added = {f"{name}.{part}" for name in sizes for part in ("bits", "scale")}
    assert tensors.keys() - trained.state_dict().keys() == added


@pytest.fixture(scope="module")
def packed(runs: Path) -> Path:
    return export_run(runs / "scaled", runs / "scaled" / "net.safetensors", format="packed").file


def test_a_truncated_file_is_refused(packed: Path, tmp_path: Path) -> None:
    cut, said = tmp_path / "cut.safetensors", "must be a whole file of spiketrain export; it could"
    for size in (0, 4, 100, packed.stat().st_size - 1):
        cut.write_bytes(packed.read_bytes()[:size])
        with pytest.raises(ValueError, match=rf"cut\.safetensors: {said} not be read"):
            load_export(cut)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_flipped_bit_goes_unseen(
    packed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(packed.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    damaged = tmp_path_factory.mktemp("bit") / "bit.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"bit\.safetensors: "):
        load_export(damaged)


CONV = "stages.1.0.conv"
NO_BITS = r"must fit the model; the bits or the scale of stages\.1\.0\.conv"
RUNS = '{"target": "subprocess.run", "kwargs": {"args": "true"}}'


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"model": RUNS}, {}, r"subprocess\.run is not in a trusted package"),
        (
            {"version": "1"},
            {},
            "must be a file of spiketrain export, of version 2 .*; got .* version '1', layout",
        ),
        ({"layout": "sparse"}, {}, "got format .*, version '2', layout 'sparse'"),
        ({"format": "other"}, {}, "must be a file of .*; got format 'other', version"),
        ({}, {f"{CONV}.bits": None}, NO_BITS),
        ({}, {f"{CONV}.bits": torch.zeros(3, dtype=torch.uint8)}, NO_BITS),
        ({}, {f"{CONV}.scale": torch.ones(3)}, NO_BITS),
        ({}, {"classifier.weight": None}, r"must fit the model; got 1 missing: classifier\.weight"),
        ({}, {"more": torch.ones(3)}, r"must fit the model; got 1 unknown: more"),
        (
            {},
            {"classifier.weight": torch.ones(3)},
            r"got 1 of another shape: classifier\.weight \(\[3\] instead of \[10, 7\]\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    metadata: dict[str, str], tensors: dict[str, Any], said: str, packed: Path, tmp_path: Path
) -> None:
    """The file with other metadata or tensors, or without a tensor, and a checksum that fits."""
    metadata = {**metadata_of(packed), **metadata}
    del metadata["sha256"]
    tensors = {name: x for name, x in {**load_file(packed), **tensors}.items() if x is not None}
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, {**metadata, "sha256": _digest(metadata, tensors)})
    with pytest.raises(ValueError, match=said):
        load_export(other)


def test_what_cannot_be_loaded_is_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"load: which must be 'last' for a file, .*; got which='best'"
    ):
        pipeline.load(packed, which="best")
    with pytest.raises(
        ValueError, match=r"load: .* a run's folder, with a recipe\.json; it has none"
    ):
        pipeline.load(tmp_path)


# --------------------------------------------------------------------------------- the command line


def test_export_and_evaluate(runs: Path, tmp_path: Path, done: Done, refused: Refused) -> None:
    here = ("--runs", str(runs))
    file, nowhere = tmp_path / "net.safetensors", tmp_path / "no" / "net.safetensors"
    packed = ("export", "learnable", "--format", "packed", "--out", file, *here)
    out = done(*packed)
    assert out.startswith(f"{file}: ") and out.endswith(f"\nload    pipeline.load('{file}')\n")
    assert "1,089 of 1,284 parameters are bits, in 3 synapses\n" in out
    out = done("export", "learnable", *here)
    assert "learnable/weights.safetensors: " in out and "1,284 parameters" in out
    for words, got in ((packed, file), (("export", "full", "--out", nowhere, *here), nowhere)):
        taken = "export: the file must be a new one in a folder that exists; got"
        assert refused(*words).startswith(f"{taken} {got}")
    assert refused("export", "full", "--format", "packed", *here) == (
        "export: --format packed needs 1-bit weights, and the network has none; omit it, or"
        " train a model of spec(binarized, ...) (pipeline/models/transforms.py)"
    )

    write_job(make_run(tmp_path / "again", recipe("learnable")))
    (tmp_path / "again" / "job.json").rename(runs / "learnable" / "job.json")
    evaluate = ("evaluate", "learnable", *here)
    from_run, from_file = done(*evaluate), done(*evaluate, "--weights", file)
    measured = [out.split(": ", 1)[1].split(" in ")[0] for out in (from_run, from_file)]
    assert measured[0] == measured[1]
    file.write_bytes(file.read_bytes()[:-1])
    full = export_run(runs / "full", tmp_path / "full.safetensors").file
    for weights, said in (
        (file, "could not be read"),
        (tmp_path / "none.safetensors", ""),
        (full, "the file must contain binarized("),
    ):
        assert said in refused(*evaluate, "--weights", weights)


def test_other_formats(runs: Path, done: Done, refused: Refused) -> None:
    """What they compute: tests/models/test_nir.py and test_program.py."""
    here = ("--runs", str(runs))
    out = done("export", "hard", "--format", "nir", *here)
    assert out.endswith(f"load    nir.read('{runs / 'hard' / 'network.nir'}')\n")
    network, graph = pipeline.load(runs / "hard"), nir.read(runs / "hard" / "network.nir")
    expected = logits(network)
    assert torch.allclose(logits(from_nir(graph)), expected, rtol=0, atol=1e-5)
    out = done("export", "hard", "--format", "torch", *here)
    assert out.endswith(f"load    torch.export.load('{runs / 'hard' / 'network.pt2'}')\n")
    program = torch.export.load(runs / "hard" / "network.pt2").module()
    x_TBCHW = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(program(x_TBCHW), expected, rtol=0, atol=1e-6)
    said = "to_nir: stages.0.0.neuron: neurons of NIR are LIF or IF with reset to a value; got LIF"
    assert refused("export", "full", "--format", "nir", *here).startswith(said)
    assert not (runs / "full" / "network.nir").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, refused: Refused) -> None:
    train_inline(tmp_path / "run", recipe())
    for file in tmp_path.glob("run/checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    said = refused("export", "run", "--runs", str(tmp_path))
    assert "must hold a checkpoint that verifies; got none" in said
    assert not list((tmp_path / "run").glob("*.safetensors"))


NETWORK = """
from torch import nn
from pipeline.spiking.neuron import LIF
from pipeline.spiking.synapse import Linear

class Flat(nn.Module):
    def forward(self, x_TBCHW):
        return x_TBCHW.flatten(2)

def network(classes):
    return nn.Sequential(Flat(), Linear(64, 8), LIF(), Linear(8, classes))
"""
MADE_OF_IT = """
from pipeline.recipe.recipe import spec
from tests.helpers.small import small_recipe

def recipe():
    return small_recipe(model=spec(network, classes=10))
"""


def test_a_network_of_ones_own_is_evaluated_from_its_recipe_and_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Done, refused: Refused
) -> None:
    """Of the recipe file itself, which was trusted when it was run, and of a package beside it,
    which has to be named.
    """
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "export_lab.py").write_text(NETWORK)
    (tmp_path / "of_the_lab.py").write_text("from export_lab import network\n" + MADE_OF_IT)
    (tmp_path / "of_itself.py").write_text(NETWORK + MADE_OF_IT)
    trust = ("--trust", "export_lab")
    for name, words in (("of_the_lab", trust), ("of_itself", ())):
        [made] = recipes_of(tmp_path / f"{name}.py")
        tensors = made.model.build().state_dict()
        told = {"format": "spiketrain", "version": "2", "layout": "plain", "time_steps": "3"}
        told["model"] = json.dumps(encode(made.model, paths=True))
        told["pretrained"] = json.dumps(Pretrained(3, (), None).to_json())
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file, {**told, "sha256": _digest(told, tensors)})
        said = done("evaluate", tmp_path / f"{name}.py", "--weights", file, *words)
        assert "on 20 samples" in said
    plain = tmp_path / "plain.safetensors"
    save_file(tensors, plain)
    for weights, words, said in (
        (tmp_path / "of_the_lab.safetensors", (), "export_lab.network is not in a trusted package"),
        (plain, trust, "evaluate: --trust must only be given with a file of spiketrain export,"),
    ):
        assert said in refused("evaluate", tmp_path / "of_the_lab.py", "--weights", weights, *words)

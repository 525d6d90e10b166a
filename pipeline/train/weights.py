"""Loads the weights of a run or a file, for evaluation or as the start of another run.

It also hashes the files that a study's key depends on.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.core.tensor_file import describe_mismatch, read_state
from pipeline.data.pictures import Pretrained, Transform
from pipeline.models.published import to_our_names
from pipeline.recipe.recipe import Recipe, read_json
from pipeline.recipe.spec import Spec, is_path
from pipeline.spiking.binary import Binarizer, binary_synapses
from pipeline.spiking.neuron import PLIF, learnt_decays
from pipeline.spiking.rate import RateNeuron
from pipeline.train.checkpoint import WEIGHTS, CheckpointStore, store_at, verified_checkpoint


def load_run(
    run: str | os.PathLike[str], *, which: str = "last", trust: Collection[str] = ()
) -> nn.Module:
    """See `pipeline.load`."""
    folder = Path(run)
    file = RunFolder(folder).recipe
    require(
        file.is_file(),
        f"load: {folder} must be a run's folder, with a {file.name}; it has none",
    )
    recipe = Recipe.read(file, trust=trust)
    network: nn.Module = recipe.model.build()
    network.load_state_dict(
        read_state(verified_checkpoint(store_of(folder), which) / WEIGHTS, subject="load")
    )
    network.pretrained = pretrained(folder, recipe)  # type: ignore[assignment]
    return network.eval()


def pretrained(run: Path, recipe: Recipe) -> Pretrained:
    """What the networks of a run expect, from its job.json and its recipe."""
    file = RunFolder(run).job
    job = read_json(file) if file.exists() else {}
    options = job.get("picture_options")
    return Pretrained(
        recipe.time_steps,
        tuple(job.get("class_names", ())),
        None if options is None else Transform(recipe.data, options),
    )


def load_weights(network: nn.Module, file: Path) -> nn.Module:
    """Load all weights of a network from a file. Returns the network in evaluation mode.
    Tensors may have the network's published names.

    Raises:
        ValueError: the file cannot be read, or weights do not fit. The message names the first
            ones.
    """
    tensors = _read(file, network, subject="evaluate")
    mismatch = describe_mismatch(tensors, network.state_dict())
    require(not mismatch, f"evaluate: {file} must fit the network; got {mismatch}")
    network.load_state_dict(tensors)
    return network.eval()


def store_of(run: Path) -> CheckpointStore:
    job = RunFolder(run).job
    return store_at(read_json(job).get("checkpoints", "") if job.exists() else "", run)


def weights_file(start: Path) -> Path:
    """The weights file of a recipe's `init`. If `start` is a file, it is returned. If `start` is a
    run's folder, the weights file of its newest verified checkpoint is returned.

    Raises:
        ValueError: `start` does not exist, or the run has no intact checkpoint.
    """
    if start.is_dir():
        return verified_checkpoint(store_of(start)) / WEIGHTS
    require(
        start.is_file(),
        f"init: must be a run's folder or a weights file; got {start}, which does not exist",
    )
    return start


def copy_of_weights(run: Path) -> Path:
    """Copy the weights of a finished run to its folder, so that a recipe.json may name the file.

    The folder of a fetched checkpoint is deleted later, so its file must not be named.
    """
    source = weights_file(run)  # raises if no checkpoint of the run is intact
    copy = run / WEIGHTS
    if not copy.exists():
        write_whole(copy, source.read_bytes())
    return copy


def load_start(network: nn.Module, file: Path) -> tuple[str, ...]:
    """Load the file of `weights_file` into a network that may have other time steps and classes.

    These weights are not taken from the file:

        head          if a shape in it differs. It is the network's `classifier`, or the last module
                      that has weights other than those below
        thresholds    of rate-coded neurons, if the file has none (the weights of an ANN have none)
        decays        if they are learnt and the file has none
        scales        of 1-bit weights, if they are learnt and the file has none: computed anew

    Tensors may have the network's published names. Returns the keys that were not loaded.

    Raises:
        ValueError: the file cannot be read, or keys do not match. The message names the first ones.
    """
    tensors = _read(file, network, subject="init")
    expected = network.state_dict()
    with_weights = [
        name
        for name, module in network.named_modules()
        if list(module.parameters(recurse=False))
        and not isinstance(module, (RateNeuron, PLIF, Binarizer))
    ]
    has_classifier = isinstance(getattr(network, "classifier", None), nn.Module)
    head = "classifier" if has_classifier else with_weights[-1]
    thresholds = {
        f"{name}.threshold"
        for name, module in network.named_modules()
        if isinstance(module, RateNeuron)
    }
    decays = {f"{name}.decay_logit" for name in learnt_decays(network)}
    synapses = {
        f"{name}.binarizer.scale": synapse
        for name, synapse in binary_synapses(network).items()
        if f"{name}.binarizer.scale" in expected
    }
    absent = {
        key
        for keys in (thresholds, decays, synapses.keys())
        if not keys & tensors.keys()
        for key in keys
    }
    in_head = {key for key in expected if key.startswith(head + ".")}
    is_reshaped = any(
        key in tensors and tensors[key].shape != expected[key].shape for key in in_head
    )
    not_loaded = (absent | in_head) if is_reshaped else absent
    loaded = {key: value for key, value in tensors.items() if key not in not_loaded}
    mismatch = describe_mismatch(
        loaded, {key: value for key, value in expected.items() if key not in not_loaded}
    )
    require(
        not mismatch,
        f"init: {file} must fit the network up to the shapes of {head}; got {mismatch}",
    )
    network.load_state_dict(loaded, strict=False)
    for key in synapses.keys() & absent:
        synapses[key].binarizer.reset(synapses[key].weight)  # type: ignore[operator, union-attr]
    return tuple(key for key in expected if key in not_loaded)


def _read(file: Path, network: nn.Module, *, subject: str) -> Mapping[str, Tensor]:
    return to_our_names(read_state(file, subject=subject), network)


def study_inputs(recipe: Recipe, fingerprint: str) -> dict[str, str]:
    """Content hashes of the recipe's inputs: its data (`fingerprint`), and the files of `init` and
    of its teacher.
    """
    files: dict[str, Path] = {}
    if recipe.init is not None:
        files["init"] = weights_file(Path(recipe.init))
    if recipe.teacher is not None:
        files |= _files(recipe.teacher, "teacher.")
    return {"data": fingerprint} | {
        key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()
    }


def _files(part: Spec, prefix: str) -> Iterator[tuple[str, Path]]:
    """The files, but not the folders, that are arguments of a part or of a part inside it. The key
    of a file is `prefix` with the dotted name of the argument.
    """
    for key, value in part.kwargs.items():
        if isinstance(value, Spec):
            yield from _files(value, f"{prefix}{key}.")
        elif value is not None and is_path(part.target, key) and Path(value).is_file():
            yield prefix + key, Path(value)

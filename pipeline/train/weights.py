"""Weights of a run or a file, loaded for evaluation or as the start of another run."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.core.tensor_file import describe_mismatch, read_state
from pipeline.models.qkformer import QKFormer, is_published, renamed
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
        f"load: {folder} must be a run's folder, which holds {file.name}; it does not",
    )
    network: nn.Module = Recipe.read(file, trust=trust).model.build()
    network.load_state_dict(
        read_state(verified_checkpoint(store_of(folder), which) / WEIGHTS, who="load")
    )
    return network.eval()


def load_weights(network: nn.Module, file: Path) -> nn.Module:
    """Load all weights of a network from a file. Returns the network in evaluation mode. The names
    in a published file of QKFormer are accepted.

    Raises:
        ValueError: the file cannot be read, or names the first weight that does not fit.
    """
    tensors = _read(file, network, who="evaluate")
    mismatch = describe_mismatch(tensors, network.state_dict())
    require(not mismatch, f"evaluate: {file} must fit the network; got {mismatch}")
    network.load_state_dict(tensors)
    return network.eval()


def store_of(run: Path) -> CheckpointStore:
    """The store of a run's checkpoints."""
    job = RunFolder(run).job
    return store_at(read_json(job).get("checkpoints", "") if job.exists() else "", run)


def weights_file(start: Path) -> Path:
    """The weights file of `init`: `start` itself, or the weights in the newest verified checkpoint
    of a run's folder.
    """
    if start.is_dir():
        return verified_checkpoint(store_of(start)) / WEIGHTS
    require(
        start.is_file(),
        f"init: must be a run's folder or a weights file; got {start}, which does not exist",
    )
    return start


def lasting_weights(run: Path) -> Path:
    """The weights of a finished run, in a file of its folder that a recipe.json may name. The
    folder of a fetched checkpoint is deleted later.
    """
    source, lasting = weights_file(run), run / WEIGHTS
    if not lasting.exists():
        write_whole(lasting, source.read_bytes())
    return lasting


def load_start(network: nn.Module, file: Path) -> tuple[str, ...]:
    """Load the file of `weights_file` into a network that may have other time steps and classes.

    Only the head may differ in shape: the network's `classifier`, or its last module with weights
    of its own (thresholds and the like are none). It keeps its fresh weights and is listed in the
    result. So are thresholds of rate-coded neurons and learnt decays if the file has none: it may
    hold an ANN with the same layers, or plain neurons. Learnable scales of 1-bit weights are
    computed from the weights if the file has none: it has full precision. The names in a published
    file of QKFormer are accepted.

    Returns:
        The keys that keep their initial values.

    Raises:
        ValueError: the file cannot be read, or names the first key that does not match.
    """
    tensors = _read(file, network, who="init")
    expected = network.state_dict()
    *_, head = (
        name
        for name, module in network.named_modules()
        if list(module.parameters(recurse=False))
        and not isinstance(module, (RateNeuron, PLIF, Binarizer))
    )
    if isinstance(getattr(network, "classifier", None), nn.Module):
        head = "classifier"
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
    unknown = {
        key
        for keys in (thresholds, decays, synapses.keys())
        if not keys & tensors.keys()
        for key in keys
    }
    in_head = {key for key in expected if key.startswith(head + ".")}
    is_reshaped = any(
        key in tensors and tensors[key].shape != expected[key].shape for key in in_head
    )
    replaced = unknown | in_head if is_reshaped else unknown
    kept = {key: value for key, value in tensors.items() if key not in replaced}
    mismatch = describe_mismatch(
        kept, {key: value for key, value in expected.items() if key not in replaced}
    )
    require(
        not mismatch, f"init: {file} must fit the network but for its head, {head}; got {mismatch}"
    )
    network.load_state_dict(kept, strict=False)
    for key in synapses.keys() & unknown:
        synapses[key].binarizer.reset(synapses[key].weight)  # type: ignore[operator, union-attr]
    return tuple(key for key in expected if key in replaced)


def _read(file: Path, network: nn.Module, *, who: str) -> Mapping[str, Tensor]:
    tensors = read_state(file, who=who)
    if isinstance(network, QKFormer) and is_published(tensors):
        try:
            return renamed(tensors, network)
        except ValueError as error:
            raise ValueError(f"{who}: {file}: {error}") from error
    return tensors


def study_inputs(recipe: Recipe, fingerprint: str) -> dict[str, str]:
    """Content hashes of the files that a recipe names."""
    files: dict[str, Path] = {}
    if recipe.init is not None:
        files["init"] = weights_file(Path(recipe.init))
    if recipe.teacher is not None:
        files |= _files(recipe.teacher, "teacher.")
    return {"data": fingerprint} | {
        key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()
    }


def _files(part: Spec, prefix: str) -> Iterator[tuple[str, Path]]:
    """The files that the keywords of a part, and of parts inside it, name; not the folders."""
    for key, value in part.kwargs.items():
        if isinstance(value, Spec):
            yield from _files(value, f"{prefix}{key}.")
        elif value is not None and is_path(part.target, key) and Path(value).is_file():
            yield prefix + key, Path(value)

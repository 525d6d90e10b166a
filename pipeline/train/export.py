"""Writes a trained network as one safetensors file that describes the network, and loads it again.

    layout      tensors
    "plain"     the network's `state_dict`; 1-bit synapses have their latent weights and can train
    "packed"    the same, but each 1-bit synapse X has its signs alone and, if it has one, its scale
                    X.bits     uint8 [ceil(numel / 8)], 1 for +: 8 signs to a byte, the first in
                               the lowest bit
                    X.scale    [out], unless the batch norm that directly follows X includes it
                               (`spiking/binary.py`)

The metadata hold format, version, layout, the recipe's `model` as JSON, its `time_steps`, where the
user's own code of the model is (`code`, see own_code.py), and the sha256 of all this and the
tensors.

A packed network computes the same as the trained one up to rounding, which folding changes.
Rounding may change a spike if a potential equals its threshold to the last bits. Another batch size
or another machine may also change such a spike.
"""

import copy
import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.checks import require
from pipeline.core.files import write_whole
from pipeline.core.run_folder import RunFolder
from pipeline.core.tensor_file import describe_mismatch
from pipeline.core.units import counted
from pipeline.recipe import own_code
from pipeline.recipe.json import decode, encode, targets
from pipeline.recipe.recipe import TRUSTED, Recipe, Spec
from pipeline.spiking.binary import (
    SMALLEST_SCALE,
    Binarizer,
    binary_synapses,
    fold,
    following_norms,
    unbinarize,
)
from pipeline.spiking.encode import over_steps
from pipeline.train.tasks import tasks_of
from pipeline.train.weights import load_run

FORMAT = "spiketrain"
VERSION = "1"

Layout = Literal["plain", "packed"]


@dataclass(frozen=True)
class Exported:
    """The file of an export. As text: its size, and the line of Python that loads the network."""

    file: Path
    whole: int  # bytes before packing
    parameters: int
    bits: int = 0
    synapses: int = 0
    folded: int = 0  # synapses whose scales a norm includes
    trust: tuple[str, ...] = ()  # the user's own packages that the network needs

    def __str__(self) -> str:
        holds = f", {self.parameters:,} parameters"
        if self.bits:
            holds = (
                f" against {self.whole / 1e6:.4g} MB; {self.bits:,} of {self.parameters:,}"
                f" parameters are bits, of {counted(self.synapses, 'synapse')}, {self.folded} of"
                " them with their scales folded into the norm behind"
            )
        trust = f", trust={list(self.trust)}" if self.trust else ""
        return (
            f"{self.file}: {self.file.stat().st_size / 1e6:.4g} MB{holds}\n"
            f"load    pipeline.load({str(self.file.absolute())!r}{trust})"
        )


def export_run(
    folder: Path,
    out: Path | None = None,
    *,
    layout: Layout = "plain",
    which: str = "last",
    trust: Collection[str] = (),
) -> Exported:
    """Write the trained network of a run, by default into the run's folder.

    Raises:
        ValueError: the run's network cannot be loaded, `out` exists or its folder does not, or the
            layout is "packed" and no weight has 1 bit.
    """
    files = RunFolder(folder)
    recipe = Recipe.read(files.recipe, trust=trust)
    out = files.weights(layout) if out is None else out
    require(
        out.parent.is_dir() and not out.exists(),
        f"export: the file must be a new one in a folder that exists; got {out}: name another with"
        " --out",
    )
    network = load_run(folder, which=which, trust=trust)
    state, packed = network.state_dict(), {}
    whole = sum(value.nbytes for value in state.values())
    if layout == "packed":
        synapses = binary_synapses(network)
        require(
            synapses,
            "export: --packed stores 1-bit weights, and the network has none; leave --packed"
            " out, or train a model of spec(binarized, ...) (pipeline/models/transforms.py)",
        )
        task = tasks_of(recipe)[0]
        task.choose_head(network)
        silence_TB = over_steps(torch.zeros(1, *task.data.shape), recipe.time_steps)
        state, folded = pack(network, following_norms(network, synapses, silence_TB))
        packed = {
            "bits": sum(synapse.weight.numel() for synapse in synapses.values()),
            "synapses": len(synapses),
            "folded": folded,
        }
    tensors = {name: value.detach().contiguous().clone() for name, value in state.items()}
    model = encode(recipe.model, paths=True)
    own = own_code.needed(trust, targets(model))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layout": layout,
        "model": json.dumps(model),
        "time_steps": str(recipe.time_steps),
        **({"code": json.dumps(own_code.describe_packages(own))} if own else {}),
    }
    write_whole(out, save(tensors, {**metadata, "sha256": _digest(metadata, tensors)}))
    return Exported(
        file=out,
        whole=whole,
        parameters=sum(p.numel() for p in network.parameters()),
        trust=own,
        **packed,
    )


def is_export(file: Path) -> bool:
    """Whether the metadata say that `export_run` wrote the file. It may be damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def load_export(file: Path, *, model: Spec | None = None, trust: Collection[str] = ()) -> nn.Module:
    """The network of a file that `export_run` wrote, in evaluation mode. The 1-bit weights of a
    packed network become plain numbers.

    `model`: the model that the file must hold; None: any.

    Raises:
        ValueError: another file or format, a byte has changed, or the weights do not fit the model.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            names = opened.keys()  # `opened` is no mapping
            tensors = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: must be a whole file of spiketrain export; it could not be read: {error}"
        ) from error
    kind = tuple(metadata.get(key) for key in ("format", "version", "layout"))
    require(
        kind in ((FORMAT, VERSION, "plain"), (FORMAT, VERSION, "packed")),
        f"{file}: must be a file of spiketrain export, of version {VERSION} and layout 'plain' or"
        f" 'packed'; got format {kind[0]!r}, version {kind[1]!r}, layout {kind[2]!r}",
    )
    require(
        metadata.pop("sha256", None) == _digest(metadata, tensors),
        f"{file}: is damaged; its tensors or metadata differ from what was written",
    )
    try:
        code = (
            own_code.packages(json.loads(metadata.get("code", "{}")), subject="code")
            if trust
            else {}
        )
        with own_code.importable(code, trust, owner=file.name):
            written_model: Spec = decode(json.loads(metadata["model"]), (*TRUSTED, *trust))
        if model is not None and model != written_model:
            raise ValueError(
                f"the weights must be of {model.label}; they are of {written_model.label}"
            )
        network: nn.Module = written_model.build()
        if metadata["layout"] == "packed":
            tensors = unpack(network, tensors)
        mismatch = describe_mismatch(tensors, network.state_dict())
        require(not mismatch, f"the weights must fit the model; got {mismatch}")
        network.load_state_dict(tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return network.eval()


def load(
    run: str | os.PathLike[str],
    *,
    which: Literal["last", "best"] = "last",
    trust: Collection[str] = (),
) -> nn.Module:
    """Load the trained network of a run or an export, ready for evaluation.

    It needs neither Ray nor DeepSpeed. The network is time first, `[T,B,...]` to `[T,B,K]`, and is
    called inside `fresh_state`:

        network = pipeline.load("runs/fashion-sltt")
        with torch.no_grad(), fresh_state(network):
            logits_BK = network(repeat(x_BCHW, 6)).mean(0)

    A network with a head for each task answers with the first head until
    `models.transforms.select_head` chooses another.

    Args:
        run: the run's folder, or a file of `spiketrain export`.
        which: the newest checkpoint, or the one with the best top-1.
        trust: packages outside spiketrain that the recipe may import from.

    Raises:
        ValueError: the folder is not a run's, none of its checkpoints is intact, or the file is
            damaged or not an export.
    """
    if Path(run).is_file():
        if which != "last":
            raise ValueError(
                f"load: which chooses a checkpoint, and the file {run} has none; got"
                f" which={which!r}"
            )
        return load_export(Path(run), trust=trust)
    return load_run(run, which=which, trust=trust)


def pack(network: nn.Module, norms: Mapping[str, str]) -> tuple[dict[str, Tensor], int]:
    """The packed tensors of `network`, and the number of synapses whose scales the norm behind them
    includes. `norms`: names of synapses to names of norms.
    """
    network = copy.deepcopy(network)
    packed, latent, folded = {}, set(), 0
    for name, synapse in binary_synapses(network).items():
        assert isinstance(synapse.binarizer, Binarizer)
        is_positive, scale_O = synapse.binarizer.split(synapse.weight)
        signs = is_positive.flatten().numpy()
        packed[f"{name}.bits"] = torch.from_numpy(np.packbits(signs, bitorder="little"))
        latent |= {f"{name}.weight", f"{name}.binarizer.scale"}
        if scale_O is not None and name in norms and scale_O.min() >= SMALLEST_SCALE:
            norm: Any = network.get_submodule(norms[name])
            fold(scale_O, synapse.bias, norm)
            folded += 1
        elif scale_O is not None:
            packed[f"{name}.scale"] = scale_O
    state = network.state_dict()
    return {key: state[key] for key in state if key not in latent} | packed, folded


def unpack(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the 1-bit synapses of `network` plain. Returns the `state_dict` for the plain network.

    Raises:
        ValueError: bits or scales are missing or have another shape.
    """
    state = dict(tensors)
    for name, synapse in binary_synapses(network).items():
        shape, filters = synapse.weight.shape, len(synapse.weight)
        bits = state.pop(f"{name}.bits", None)
        scale_O = state.pop(f"{name}.scale", torch.ones(filters))
        if (
            bits is None
            or bits.dtype != torch.uint8
            or bits.shape != ((shape.numel() + 7) // 8,)
            or scale_O.shape != (filters,)
        ):
            raise ValueError(f"the weights must fit the model; got no bits, or others, for {name}")
        unbinarize(synapse)
        signs = np.unpackbits(bits.numpy(), count=shape.numel(), bitorder="little")
        scale = scale_O.view(-1, *[1] * (len(shape) - 1))
        state[f"{name}.weight"] = (2.0 * torch.from_numpy(signs).view(shape) - 1) * scale
    return state


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()

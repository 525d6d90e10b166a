"""Writes a trained network as one file, and loads it again.

    format          file
    "plain"         safetensors, see below
    "packed"        the same, with 1-bit weights 8 to a byte
    "nir"           NIR, for SpikingJelly, snnTorch, norse and chips (`models/nir.py`)
    "torch"         a program of torch that runs without spiketrain: all T steps
    "torch-step"    the same, but one step (`models/program.py`)

A safetensors file describes the network, and `load` reads it:

    layout      tensors
    "plain"     the network's `state_dict`, with the latent weights of 1-bit synapses. The network
                can train further
    "packed"    the same, but these tensors replace the latent weights of each 1-bit synapse X:
                    X.bits     uint8 [ceil(numel / 8)], 1 for +: 8 signs to a byte, the first in
                               the lowest bit
                    X.scale    [out]; absent if X has no scale

The metadata contain the format, the version, the layout, the recipe's `model` as JSON, its
`time_steps`, the names of its classes and how pictures become its input (`pretrained`, see
data/pictures.py), the folders of the user's own code of the model (`code`, see own_code.py), and
the sha256 of the other metadata and the tensors.

A packed network computes the same bits as the run's network on a CPU.
"""

import hashlib
import io
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.core.checks import refuse_unless_one_of, require
from pipeline.core.files import write_whole
from pipeline.core.run_folder import ExportFormat, RunFolder
from pipeline.core.tensor_file import describe_mismatch
from pipeline.core.units import counted
from pipeline.data.pictures import Pretrained
from pipeline.models.program import to_program
from pipeline.recipe import own_code
from pipeline.recipe.json import decode, encode, targets
from pipeline.recipe.recipe import TRUSTED, Recipe, Spec
from pipeline.spiking.binary import Binarizer, binary_synapses, unbinarize
from pipeline.train.tasks import tasks_of
from pipeline.train.weights import load_run, pretrained

FORMAT = "spiketrain"
VERSION = "2"


@dataclass(frozen=True)
class ExportedFile:
    """The file of an export. As text: its size, and the line of Python that loads the network."""

    file: Path
    loader: str  # what loads the file
    parameters: int
    # the next three: of a packed network
    plain_bytes: int = 0  # size of the tensors before packing
    bit_parameters: int = 0
    bit_synapses: int = 0
    trust: tuple[str, ...] = ()  # the user's own packages that the network needs

    def __str__(self) -> str:
        content = f", {self.parameters:,} parameters"
        if self.bit_parameters:
            content = (
                f" (unpacked {self.plain_bytes / 1e6:.4g} MB); {self.bit_parameters:,} of"
                f" {self.parameters:,} parameters are bits, in"
                f" {counted(self.bit_synapses, 'synapse')}"
            )
        trust = f", trust={list(self.trust)}" if self.trust else ""
        return (
            f"{self.file}: {self.file.stat().st_size / 1e6:.4g} MB{content}\n"
            f"load    {self.loader}({str(self.file.absolute())!r}{trust})"
        )


def export_run(
    folder: Path,
    out: Path | None = None,
    *,
    format: ExportFormat = "plain",
    which: str = "last",
    trust: Collection[str] = (),
) -> ExportedFile:
    """Write the trained network of a run, by default into the run's folder.

    Raises:
        ValueError: the run's network cannot be loaded, `out` exists, its folder does not exist, or
            the format cannot have the network.
    """
    refuse_unless_one_of("export", get_args(ExportFormat), format=format)
    files = RunFolder(folder)
    recipe = Recipe.read(files.recipe, trust=trust)
    out = files.export(format) if out is None else out
    require(
        out.parent.is_dir() and not out.exists(),
        f"export: the file must be a new one in a folder that exists; got {out}: choose another"
        " with --out",
    )
    network = load_run(folder, which=which, trust=trust)
    if format not in ("plain", "packed"):
        return _export_without_us(network, recipe, out, format)
    state, packed = network.state_dict(), {}
    if format == "packed":
        synapses = binary_synapses(network)
        require(
            synapses,
            "export: --format packed needs 1-bit weights, and the network has none; omit it, or"
            " train a model of spec(binarized, ...) (pipeline/models/transforms.py)",
        )
        state = pack(network)
        packed = {
            "plain_bytes": sum(value.nbytes for value in network.state_dict().values()),
            "bit_parameters": sum(synapse.weight.numel() for synapse in synapses.values()),
            "bit_synapses": len(synapses),
        }
    tensors = {name: value.detach().contiguous().clone() for name, value in state.items()}
    model = encode(recipe.model, paths=True)
    own = own_code.needed(trust, targets(model))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layout": format,
        "model": json.dumps(model),
        "time_steps": str(recipe.time_steps),
        "pretrained": json.dumps(pretrained(folder, recipe).to_json()),
        **({"code": json.dumps(own_code.folders_of(own))} if own else {}),
    }
    write_whole(out, save(tensors, {**metadata, "sha256": _digest(metadata, tensors)}))
    parameters = sum(p.numel() for p in network.parameters())
    return ExportedFile(out, "pipeline.load", parameters, trust=own, **packed)


def _export_without_us(
    network: nn.Module, recipe: Recipe, out: Path, format: ExportFormat
) -> ExportedFile:
    """Write a file that is read without spiketrain."""
    task = tasks_of(recipe)[0]
    task.choose_head(network)
    # Recordings have a time axis.
    shape, steps = task.data.shape[-3:], recipe.time_steps if format == "torch" else None
    content: Any = io.BytesIO()
    if format == "nir":
        import nir

        from pipeline.models.nir import to_nir

        nir.write(content, to_nir(network, shape))
    else:
        torch.export.save(to_program(network, shape, steps=steps), content)
    write_whole(out, content.getvalue())
    loader = "nir.read" if format == "nir" else "torch.export.load"
    return ExportedFile(out, loader, sum(p.numel() for p in network.parameters()))


def is_export(file: Path) -> bool:
    """Whether the metadata say that `export_run` wrote the file. Its tensors may be damaged."""
    try:
        with safe_open(file, framework="pt") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def read_export(file: Path, *, trust: Collection[str] = ()) -> tuple[Spec, Pretrained]:
    """The model of an export, and what it expects. Its tensors are not read.

    Raises: ValueError as `load_export`, except for damage.
    """
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    _check_header(file, metadata)
    return _decoded(file, metadata, trust)


def _check_header(file: Path, metadata: Mapping[str, str]) -> None:
    header = {key: metadata.get(key) for key in ("format", "version", "layout")}
    require(
        header["format"] == FORMAT
        and header["version"] == VERSION
        and header["layout"] in ("plain", "packed"),
        f"{file}: must be a file of spiketrain export, of version {VERSION} and layout 'plain' or"
        f" 'packed'; got {', '.join(f'{key} {value!r}' for key, value in header.items())}",
    )


def _decoded(
    file: Path, metadata: Mapping[str, str], trust: Collection[str]
) -> tuple[Spec, Pretrained]:
    trusted = (*TRUSTED, *trust)
    try:
        if trust:
            code = json.loads(metadata.get("code", "{}"))
            own_code.make_importable(own_code.checked(code, subject="code"), trust)
        return decode(json.loads(metadata["model"]), trusted), Pretrained.from_json(
            json.loads(metadata["pretrained"]),
            time_steps=int(metadata["time_steps"]),
            trusted=trusted,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_export(file: Path, *, model: Spec | None = None, trust: Collection[str] = ()) -> nn.Module:
    """Load the network of a file that `export_run` wrote. Returns it in evaluation mode. The 1-bit
    weights of a packed network become floats.

    `model`: the model that the file must contain; None: any.

    Raises:
        ValueError: the file is not an export of this version, it is damaged, its network cannot be
            built (for example, its code is outside `trust`), or the model or the weights do not
            fit.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: must be a whole file of spiketrain export; it could not be read: {error}"
        ) from error
    _check_header(file, metadata)
    require(
        metadata.pop("sha256", None) == _digest(metadata, tensors),
        f"{file}: is damaged; its tensors or metadata differ from what was written",
    )
    written_model, pretrained = _decoded(file, metadata, trust)
    try:
        if model is not None and model != written_model:
            raise ValueError(
                f"the file must contain {model.label}; it contains {written_model.label}"
            )
        network: nn.Module = written_model.build()
        network.pretrained = pretrained  # type: ignore[assignment]
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
    """Load the trained network of a run or an export, in evaluation mode.

    Ray and DeepSpeed are not needed. The network is time first, `[T,B,...]` to `[T,B,K]`. Call it
    inside `fresh_state`:

        network = pipeline.load("runs/fashion-sltt")
        with torch.no_grad(), fresh_state(network):
            logits_BK = network(repeat(x_BCHW, 6)).mean(0)

    `network.pretrained` has the number of `time_steps`, the `class_names` of the data set, and, if
    the data were pictures in files, the `transform` from files of pictures to `x_BCHW`.

    A network with a head for each task uses the first head until
    `models.transforms.select_head` selects another.

    Args:
        run: the run's folder, or a file of `spiketrain export`.
        which: "last" is the newest checkpoint, "best" the checkpoint with the best top-1.
        trust: packages outside spiketrain that the recipe may import from.

    Raises:
        ValueError: the folder is not a run's, it has no intact checkpoint, its recipe needs a
            package outside `trust`, `load_export` refuses the file, or `which` is not "last" for
            a file.
    """
    if Path(run).is_file():
        if which != "last":
            raise ValueError(
                f"load: which must be 'last' for a file, which has one network; got which={which!r}"
                f" and {run}"
            )
        return load_export(Path(run), trust=trust)
    return load_run(run, which=which, trust=trust)


def pack(network: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of `network`, with bits and scales instead of the 1-bit synapses' latent
    weights.
    """
    state = network.state_dict()
    for name, synapse in binary_synapses(network).items():
        assert isinstance(synapse.binarizer, Binarizer)
        is_positive, scale_O = synapse.binarizer.split(synapse.weight)
        bits = np.packbits(is_positive.flatten().numpy(), bitorder="little")
        del state[f"{name}.weight"]
        state.pop(f"{name}.binarizer.scale", None)
        state[f"{name}.bits"] = torch.from_numpy(bits)
        if scale_O is not None:
            state[f"{name}.scale"] = scale_O
    return state


def unpack(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the 1-bit synapses of `network` with plain ones. Returns the `state_dict` for them.

    Raises:
        ValueError: the bits of a synapse are missing or of another type or shape, or its scale has
            another shape.
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
            raise ValueError(
                f"the weights must fit the model; the bits or the scale of {name} are missing or of"
                " another shape or type"
            )
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

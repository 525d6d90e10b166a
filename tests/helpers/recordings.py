"""Small files of recordings, in the layout of each published format."""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TYXP = tuple[NDArray[np.int64], ...]  # times in microseconds, rows, columns, polarities


def some_events(
    seed: int, height: int, width: int, *, count: int = 50, last_us: int = 300_000
) -> TYXP:
    rng = np.random.default_rng(seed)
    t_N = np.sort(rng.integers(0, last_us, count))
    return (
        t_N,
        rng.integers(0, height, count),
        rng.integers(0, width, count),
        rng.integers(0, 2, count),
    )


def write_bin(path: Path, events: TYXP) -> None:
    """N-MNIST, N-Caltech101: x, y, polarity and 23 bits of time, most significant first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = [
        bytes([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255])
        for t, y, x, p in zip(*(each.tolist() for each in events), strict=True)
    ]
    path.write_bytes(b"".join(packed))


def write_npy(path: Path, events: TYXP) -> None:
    """DVS-Gesture as tonic hands it out: x, y, polarity, milliseconds."""
    t_N, y_N, x_N, p_N = events
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack([x_N, y_N, p_N, t_N // 1000], 1).astype(np.float64))


def write_aedat4(path: Path, events: TYXP, *, width: int, height: int) -> None:
    """CIFAR10-DVS as tonic hands it out: AEDAT 4, one packet, not compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = (
        '<dv version="2.0"><node name="outInfo" path="/"><node name="0" path="/0/"><attr'
        ' key="compression" type="string">NONE</attr><attr key="typeIdentifier"'
        ' type="string">EVTS</attr><node name="info" path="/0/info/"><attr key="sizeX"'
        f' type="int">{width}</attr><attr key="sizeY"'
        f' type="int">{height}</attr></node></node></node></dv>'
    ).encode()
    # Flatbuffers, both with their size in front: root offset, identifier, vtable, table.
    header = struct.pack("<I4s6x", 24, b"IOHE") + struct.pack("<5H", 10, 20, 4, 12, 8)
    header += struct.pack("<iiIq", 10, 0, 12, -1) + struct.pack("<I", len(info)) + info + b"\0"
    packed = b"".join(
        struct.pack("<qhh?3x", t, x, y, bool(p))
        for t, y, x, p in zip(*(each.tolist() for each in events), strict=True)
    )
    packet = struct.pack("<I4s2x", 16, b"EVTS") + struct.pack("<3H", 6, 8, 4)
    packet += struct.pack("<iI4x", 6, 8) + struct.pack("<I", len(events[0])) + packed
    sized = struct.pack("<I", len(packet)) + packet
    content = (
        b"#!AER-DAT4.0\r\n"
        + struct.pack("<I", len(header))
        + header
        + struct.pack("<ii", 0, len(sized))
        + sized
    )
    path.write_bytes(content)

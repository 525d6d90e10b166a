"""The benchmark beside SpikingJelly runs on a CPU, with a small QKFormer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peer
from benchmarks.peer_networks import NETWORKS, Network
from tests.helpers import peers
from tests.helpers.peers import small_qkformer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "pixels"), [(NETWORKS["sew18"], 32), (small_qkformer(), 64)], ids=["sew", "qk"]
)
def test_gradients_are_equal(
    network: Network, pixels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    peer.compare_gradients(network, peer.batch(2, pixels, CPU))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["BPTT", "SLTT"]
    assert all(float(line.split()[-3]) < 1e-10 for line in said)


def test_a_wrong_weight_ends_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours_of = peer.ours_of

    def wrong(*arguments: Any) -> nn.Module:
        own: Any = ours_of(*arguments)
        with torch.no_grad():
            own.classifier.weight[0, 0] += 1e-3
        return own

    monkeypatch.setattr(peer, "ours_of", wrong)
    with pytest.raises(SystemExit, match="BPTT: the gradients must differ by less than 1e-05"):
        peer.compare_gradients(small_qkformer(), peer.batch(2, 64, CPU))
    assert float(capsys.readouterr().out.split()[-3]) > 1e-5  # not NaN


@pytest.mark.full
def test_its_tables_have_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peer, "share_of_products", lambda *_: 0.5)  # the profiler takes seconds
    peers.run(monkeypatch, device="cpu", memory_mb=40)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    names = ["SpikingJelly", "BPTT", "SLTT", "SLTT, bits", "SLTT-1", "SLTT-1, bits"]
    # In two tables each has one row with all columns.
    rows = [line for line in lines if line.endswith("%")]
    assert [row[: len(name)] for row, name in zip(rows, 2 * names, strict=True)] == 2 * names
    images, _, of_the_first, _, saved, _, share, _ = zip(
        *(r.split()[-8:] for r in rows), strict=True
    )
    assert set(images[:6]) == {"2"} and int(images[6]) < int(images[11])
    assert of_the_first[0] == of_the_first[6] == "1.00" and share[0] == share[6] == "1.000"
    assert float(saved[3]) < float(saved[2]) < float(saved[1]) < float(saved[0])


@pytest.mark.full
def test_the_largest_batch_is_within_the_budget() -> None:
    of = partial(peer.batch, pixels=64, on=CPU)
    trained = peer.contestants(small_qkformer(), CPU)
    for each in trained[:3]:
        images = peer.largest_batch(each, 40e6, of)
        assert peer.held(each, of(images)).total <= 40e6 < peer.held(each, of(images + 2)).total
    with pytest.raises(SystemExit, match="SpikingJelly: one image needs 15"):
        peer.largest_batch(trained[0], 1e6, of)


def trained_by(act: Callable[[Tensor], object]) -> peer.Trained:
    return peer.Trained("", nn.Identity(), lambda x_B, *_: act(x_B), lambda _: 0)  # type: ignore


def test_the_share_of_products_is_that_of_their_time() -> None:
    data = torch.ones(512, 512), torch.ones(512)
    kernel = torch.ones(8, 512, 9)
    assert peer.share_of_products(trained_by(lambda x_B: x_B @ x_B), data) > 0.8
    convolve = lambda x_B: torch.conv1d(x_B, kernel)
    assert peer.share_of_products(trained_by(convolve), data) > 0.8
    assert peer.share_of_products(trained_by(torch.exp), data) == 0
    bptt = peer.contestants(small_qkformer(), CPU)[1]
    assert 0.05 < peer.share_of_products(bptt, peer.batch(2, 64, CPU)) < 0.95

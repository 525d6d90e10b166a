"""The benchmark beside SpikingJelly runs on a card."""

import pytest

from tests.helpers import peers
from tests.helpers.cards import device_of

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(600)  # Triton compiles the kernels of both
def test_each_implementation_of_spikingjelly_has_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device_of("cuda")
    peers.run(monkeypatch, device="cuda", memory_mb=2000)
    said = capsys.readouterr().out
    for name in ("SpikingJelly triton", "SpikingJelly torch", "BPTT", "SLTT", "SLTT-1, bits"):
        rows = [line for line in said.splitlines() if line.startswith(f"{name}  ")]
        assert len(rows) >= 2  # one in each table
    assert "SpikingJelly torch, NHWC" in said and "peak MB" in " ".join(said.split())
    assert all(0 < int(share.rstrip("%")) < 100 for share in said.split() if share.endswith("%"))

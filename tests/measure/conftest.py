import pytest

from pipeline.measure import clock


class Host:
    """A host whose time passes only where a test says so: a machine that stalls adds nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """What the clock of a batch reads."""
    made = Host()
    monkeypatch.setattr(clock, "time", made)
    return made

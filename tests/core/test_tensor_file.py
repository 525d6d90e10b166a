"""Files of weights of other programs: wrappers are opened, no code is run, errors are one line."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core.tensor_file import describe_mismatch, read_state

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE},
        {
            "model": STATE,
            "optimizer": {"lr": 0.1},
            "epoch": 3,
            "args": argparse.Namespace(model="QKFormer", lr=6e-4),
        },
        {"model": {"module": STATE}},
    ],
    ids=["bare", "state_dict", "published", "nested"],
)
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_wrappers_are_opened(tmp_path: Path, content: dict, suffix: str) -> None:
    torch.save(content, tmp_path / f"file.{suffix}")
    save_file(STATE, tmp_path / "file.safetensors")
    for file in tmp_path.iterdir():
        torch.testing.assert_close(dict(read_state(file, subject="x")), STATE, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_file_without_weights_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(STATE, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-100])
    save_file(STATE, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-1])
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"model": {**STATE, "harm": Harmful()}}, tmp_path / "harmful.pt")
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps(Harmful()))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    for name, said in (
        ("cut.pt", "could not be read"),
        ("cut.safetensors", "could not be read"),
        ("text.pt", "could not be read"),
        ("harmful.pt", "could not be read"),
        ("harmful.pth", "could not be read"),
        ("other.pt", "hold named tensors"),
        ("nowhere.pt", "does not exist"),
    ):
        with pytest.raises(ValueError, match=f"x: .*{name} must .*{said}") as refusal:
            read_state(tmp_path / name, subject="x")
        assert len(str(refusal.value).splitlines()) == 1
    assert capsys.readouterr().out == ""


def test_mismatches_are_counted_and_the_first_few_named() -> None:
    assert describe_mismatch(STATE, STATE) == ""
    many = {f"b{i}": torch.zeros(1) for i in range(5)}
    assert describe_mismatch({**STATE, **many}, STATE) == "5 unknown: b0, b1, b2, ..."
    assert (
        describe_mismatch({"a.weight": torch.zeros(3)}, STATE)
        == "1 missing: a.bias; 1 of another shape: a.weight ([3] instead of [2, 3])"
    )

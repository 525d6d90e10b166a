"""The value of a secret variable appears in no text, in whatever form an error quotes it."""

from collections.abc import Callable

import pytest

from pipeline.core.secrets import is_secret, without_secrets

QUOTED: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "stripped": str.strip,
    "in one line": lambda text: " ".join(text.split()),
    "as text": repr,
    "as bytes": lambda text: repr(text.encode("latin-1")),
}


@pytest.mark.parametrize("value", ["planted", "planted\n", "plan\nted", "plan\tté\r\n"])
@pytest.mark.parametrize("quoted", QUOTED)
def test_a_secret_is_replaced_by_its_name(
    monkeypatch: pytest.MonkeyPatch, value: str, quoted: str
) -> None:
    monkeypatch.setenv("A_TOKEN", value)
    said = without_secrets(f"refused: {QUOTED[quoted](f'Bearer {value}')}")
    assert "plan" not in said and "Bearer $A_TOKEN" in said


def test_short_values_and_other_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("A_KEY", "to"), ("A_NAME", "planted"), ("A_PASSWORD", "")):
        monkeypatch.setenv(name, value)
    assert without_secrets("refused to planted") == "refused to planted"
    names = ("aws_secret_access_key", "HF_TOKEN", "NCCL_DEBUG")
    assert list(map(is_secret, names)) == [True, True, False]

import pytest

from pipeline.track.mlflow_store import one_line, reason, without_password


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("http://me:se@cret@host:5000", "http://host:5000"),
        ("http://me:se/cret@host:5000", "http://host:5000"),
        ("http://me:se/c@ret@host:5000", "http://host:5000"),
        ("http://me:/?#@host:5000", "http://host:5000"),
        ("http://me@host", "http://host"),
        (
            "Invalid url: 'http://me:se/cret@host/api', of me@host",
            "Invalid url: 'http://host/api', of me@host",
        ),
        ("http://me:secret@host and http://you:se/cret@there", "http://host and http://there"),
        # Without a colon before the first / there is no password.
        ("http://host/team@lab/", "http://host/team@lab/"),
        ("s3://bucket/me@lab/model.pt", "s3://bucket/me@lab/model.pt"),
        ("sqlite:////home/me@lab/mlflow.db", "sqlite:////home/me@lab/mlflow.db"),
    ],
)
def test_neither_user_nor_password_of_an_address_is_told(text: str, told: str) -> None:
    assert without_password(text) == told


def test_an_address_that_is_cut_off_is_known_for_one() -> None:
    error = ValueError(f"{'x' * 280} http://me:{'secret' * 20}@host:5000")
    assert (
        reason("http://me:secret@host:5000", error) == f"ValueError: {'x' * 280} http://host:5000"
    )


@pytest.mark.parametrize("password", ["se/cret", "se?cret", "se#cret"])
def test_a_password_that_ends_its_address_too_early_is_the_reason(password: str) -> None:
    """Whatever a client makes of its parts: no // stands before them."""
    error = ValueError(
        "HTTPConnectionPool(host='me', port='se'): Max retries exceeded with url:"
        f" {password[2:]}@host:5000/api"
    )
    why = "/ ? and # in the password of an address must be written %2F %3F and %23"
    told = one_line(f"http://me:{password}@host:5000", error)
    assert told == f"MLflow at http://host:5000 cannot be used (ValueError: {why})"

from tests.helpers.seeded import seeded  # noqa: F401

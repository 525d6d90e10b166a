import numpy as np
import pytest

from pipeline.core.random import below, bits


def test_values_never_change():
    """Published runs rest on them: computed by hand-written splitmix64 in Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def by_hand(*key: int) -> int:
        z = 0
        for part in key:
            z = mix(((z ^ part) + 0x9E3779B97F4A7C15) % 2**64)
        return z

    for key in [(0, 0, 0, 0), (1, 2, 3, 4), (2**63 - 1, 90, 1281166, 55)]:
        assert int(bits(*key)) == by_hand(*key)
    assert int(bits(1, 2, 3, 4)) == 15374388949593934587


def test_numba_equals_numpy():
    from numba import njit

    from pipeline.data.ffcv.loops import bits as compiled

    @njit
    def many(seed, epoch, index, draw):
        out = np.empty(len(index), np.uint64)
        for i in range(len(index)):
            out[i] = compiled(seed, epoch, index[i], draw[i])
        return out

    index = np.arange(20_000, dtype=np.uint64)
    key = np.uint64(7), np.uint64(2**40), index, index % np.uint64(60)
    assert np.array_equal(many(*key), bits(*key))
    assert all(str(each.return_type) == "uint64" for each in compiled.nopython_signatures)


@pytest.mark.parametrize("axis", range(4))
def test_each_part_of_the_key_matters_and_neighbours_are_independent(axis: int):
    key = [np.full(20_000, 3), np.full(20_000, 5), np.full(20_000, 7), np.full(20_000, 11)]
    key[axis] = np.arange(20_000)
    unit = bits(*key) / 2.0**64
    assert len(np.unique(unit)) == 20_000
    assert abs(unit.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) < 0.03


def test_below_is_uniform():
    counts = np.bincount(below(bits(0, 0, np.arange(30_000), 0), 9), minlength=9)
    assert len(counts) == 9 and counts.min() > 3_100 and counts.max() < 3_600

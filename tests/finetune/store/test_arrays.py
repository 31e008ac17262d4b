"""Arrays in records come back as they were, and damage is refused."""

import numpy as np
import pytest

from finetune.store.arrays import DTYPES, pack_array, unpack_array


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_packed_comes_back(dtype):
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    found = unpack_array(pack_array(values, dtype))
    assert found.dtype == dtype and found.tolist() == values.tolist()


def test_numbers_of_a_regression_keep_their_float32_bits():
    values = np.random.default_rng(0).normal(size=1500).astype("float32")
    assert unpack_array(pack_array(values, "float32")).tobytes() == values.tobytes()


@pytest.mark.parametrize(("values", "dtype", "said"), [([300], "int8", "can't hold"), ([1], "int64", "allowed: bool")])
def test_what_a_type_cannot_hold_is_refused(values, dtype, said):
    with pytest.raises(ValueError, match=said):
        pack_array(np.array(values), dtype)


@pytest.mark.parametrize("change", [{"data": "???"}, {"data": "AAAA"}, {"dtype": "object"}])
def test_damage_is_refused(change):
    with pytest.raises(ValueError, match=r"damaged|allowed"):
        unpack_array(pack_array(np.arange(3), "int8") | change)

"""The laws that every method keeps, on a toy model that takes seconds to make."""

import pytest
from seed_average import SeedAverage

import unwrite
from unwrite.errors import BadSetting
from unwrite.testing import check_method

TUNER = unwrite.FullFT(lr=1e-3)


def test_the_laws_of_every_method(tmp_path):
    check_method(SeedAverage(seeds=2, tuner=TUNER), tmp_path)


def test_there_is_no_mean_of_nothing():
    with pytest.raises(BadSetting, match="at least 1"):
        SeedAverage(seeds=0)

"""Option values that are refused before any library is loaded."""

import numpy as np
import pytest

from wanda_lightning.checks import check_at_least, check_positive


def test_whole_numbers_and_missing_ones_pass():
    check_positive(limit=None, seqlen=1, batch_size=np.int64(3))
    check_at_least(0, num_workers=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "limit must be at least 1, but it is 0."),
        ("512", "limit must be a whole number, but it is '512'."),
        (2.0, "limit must be a whole number, but it is 2.0."),
        (True, "limit must be a whole number, but it is True."),
    ],
)
def test_other_values_are_refused(value, message):
    with pytest.raises(ValueError, match=r"limit must be") as caught:
        check_positive(limit=value)
    assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"num_workers must be at least 0, but it is -1"):
        check_at_least(0, num_workers=-1)

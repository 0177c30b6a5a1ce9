"""A short chaos; `python -m tests.engine.saving.chaos` is the long one."""

import pytest

from tests.engine.saving.chaos import chaos, maybe_small


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_no_picture_is_lost_or_twice(tmp_path, workers):
    with maybe_small(tmp_path / "home", 128) as fill:
        chaos(tmp_path / "home", jobs=45, kills=4, workers=workers, seconds=0.02, seed=workers, fill=fill)

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest

from stdit.data.manifest import Clip, Manifest, clip_id
from stdit.data.plan.filters import source_of, source_weights
from stdit.errors import StditError

PATHS = ["talks/a.mp4", "talks/b_1.mp4", "talks/b11.mp4", "walks/100%.mp4", "s3://b/walks/x.mp4", "back\\slash.mp4"]


def manifest() -> Manifest:
    shas = [f"{number:064x}" for number in range(len(PATHS))]
    return Manifest.of(
        [Clip(clip_id(sha, 0, 1), path, (), 8, 8.0, 16, 16, 0.0, 1.0, sha) for sha, path in zip(shas, PATHS)]
    )


@pytest.mark.parametrize("pattern", ["talks/*", "*b_1*", "talks/b?1.mp4", "*100%*", "s3://*", "*\\slash*", "*"])
def test_patterns_are_those_of_a_shell(pattern):
    assert (source_of(manifest(), [pattern]) == 0).tolist() == [fnmatchcase(path, pattern) for path in PATHS]


def test_the_first_pattern_that_fits_counts_and_the_rest_comes_once():
    assert source_of(manifest(), ["talks/a*", "talks/*", "*walks*"]).tolist() == [0, 1, 1, 2, 2, -1]
    weights = source_weights(manifest(), {"talks/a*": 3, "talks/*": 0.5, "*walks*": 2})
    assert weights is not None and np.array_equal(weights, [3, 0.5, 0.5, 2, 2, 1])
    assert source_weights(manifest(), {}) is None


def test_what_is_wrong_is_named():
    with pytest.raises(StditError, match=r"no path of manifest matches 'tlaks/a\*'. Did you mean 'talks/a.mp4'"):
        source_weights(manifest(), {"tlaks/a*": 2})
    with pytest.raises(StditError, match=r"'talks/\*' 0 must be positive"):
        source_weights(manifest(), {"talks/*": 0})

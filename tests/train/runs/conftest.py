"""What the tests of whole runs share."""

import pytest
from training_runs import drawn_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return drawn_scenes(tmp_path_factory.mktemp("scenes"))

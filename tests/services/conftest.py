"""The services, started once for all tests of a file."""

from contextlib import ExitStack

import pytest

from tests.services import services


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    if lacking := services.lacking():
        pytest.skip(f"lacks {lacking}")
    with ExitStack() as ending:
        yield services.Team(tmp_path_factory.mktemp("team"), ending)

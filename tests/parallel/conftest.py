"""The processes that every test of this folder shares."""

from __future__ import annotations

import pytest
from parallel_ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    together = Ranks(tmp_path_factory.mktemp("ranks"))
    yield together
    together.close()


@pytest.fixture(scope="module")
def fresh_ranks(tmp_path_factory: pytest.TempPathFactory):
    """Processes that have been in no other group."""
    together = Ranks(tmp_path_factory.mktemp("ranks"))
    yield together
    together.close()

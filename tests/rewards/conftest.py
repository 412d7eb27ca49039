"""One scorer for the whole folder: its worker starts once."""

from collections.abc import Iterator

import pytest

from memento.config import RewardsConfig
from memento.rewards import Scorer


@pytest.fixture(scope="session")
def scorer() -> Iterator[Scorer]:
    scorer = Scorer(RewardsConfig(workers=2, timeout_s=4.0))
    yield scorer
    scorer.close()

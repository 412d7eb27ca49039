"""Verifiable rewards: `score(problem, completion)` and what it is made of."""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    score="memento.rewards.scoring",
    check_gold="memento.rewards.scoring",
    check_golds="memento.rewards.scoring",
    check_terms="memento.rewards.scoring",
    load_verified="memento.rewards.scoring",
    Scorer="memento.rewards.scoring",
    RewardPool="memento.rewards.pool",
)

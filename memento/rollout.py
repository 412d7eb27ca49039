"""Generation with vLLM: KV eviction as a plugin of the stock engine, engines, and what they return."""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    eviction_args="memento.rollout.plugin",
    EvictionStats="memento.rollout.request_statistics",
    eviction_stats="memento.rollout.request_statistics",
    RolloutPool="memento.rollout.pool",
    RolloutEngine="memento.rollout.engine",
    WeightUpdate="memento.rollout.weights",
    write_weights="memento.rollout.weights",
    generate_file="memento.rollout.generate",
)

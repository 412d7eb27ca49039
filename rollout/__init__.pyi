from memento.rollout.plugin import eviction_args as eviction_args
from memento.rollout.statistics import EvictionStats as EvictionStats
from memento.rollout.statistics import eviction_stats as eviction_stats

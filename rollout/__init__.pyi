from memento.rollout.engine import RolloutEngine as RolloutEngine
from memento.rollout.generate import generate_file as generate_file
from memento.rollout.plugin import eviction_args as eviction_args
from memento.rollout.pool import RolloutPool as RolloutPool
from memento.rollout.request_statistics import EvictionStats as EvictionStats
from memento.rollout.request_statistics import eviction_stats as eviction_stats
from memento.rollout.weights import WeightUpdate as WeightUpdate
from memento.rollout.weights import write_weights as write_weights

from memento.rl.batch import TrainBatch as TrainBatch
from memento.rl.batch import assemble as assemble
from memento.rl.learner import Learner as Learner
from memento.rl.weight_sync import WeightSync as WeightSync

"""The learner half: advantages, losses, packed batches, the DeepSpeed learner, weight sync, checkpoints, the loop.

`memento.rl.losses` and `memento.rl.advantages` are pure functions on tensors and import nothing else of the project.
"""

from memento.links import package

__path__, __getattr__ = package(
    __file__,
    assemble="memento.rl.batch",
    TrainBatch="memento.rl.batch",
    Learner="memento.rl.learner",
    WeightSync="memento.rl.weight_sync",
)

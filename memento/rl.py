"""Reinforcement learning: the loop (`memento.rl.train`), its losses and advantages, the learner, weight sync."""

from memento.links import package

__path__, __getattr__ = package(__file__)

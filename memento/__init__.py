"""memento-rl: reinforcement learning with compressed reasoning.

Start with `memento.format` (the one rule of what is visible), then `memento.trajectory`, `memento.rl.train`.
"""

__version__ = "0.1.0"

"""Problems as a config asks for them: from a file, or generated."""

from __future__ import annotations

from memento.config import ProblemsConfig
from memento.problems import Problem, load_problems

GENERATED = 4096
"""How many problems are generated when the config does not say."""


def read_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of a config section, in file or generation order.

    Raises:
        UserError: as `memento.problems.load_problems`.
    """
    if config.path is not None:
        return load_problems(config.path, limit=config.count)
    from memento.arithmetic import make_problems

    family = config.arithmetic
    assert family is not None  # the schema asks for one of the two
    return make_problems(
        config.count or GENERATED, config.seed, terms=(family.min_terms, family.max_terms), digits=family.digits
    )

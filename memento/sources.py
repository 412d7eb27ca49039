"""Problems as a config asks for them: read or generated, each once, without those that are held out.

loaded = load(config.problems, exclude=[load(config.eval.problems)])
loaded.problems          # what is left
loaded.where["gsm8k/…"]  # "train.jsonl, line 3"
str(loaded)              # "7,470 problems (7,473 read; 2 duplicates, 1 also in what is held out)"
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from memento.config import ProblemsConfig
from memento.errors import UserError
from memento.problems import BadProblem, LocatedProblem, Problem, read_located, with_instruction

GENERATED = 4096
"""How many problems are generated when the config does not say."""

_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|,|;|:|!|quad|qquad| )|[\s$~\u200b\ufeff]|\\[()\[\]]")


def normalised(text: str) -> str:
    r"""A prompt for comparison: case, white space, dollars, ``\left``, spacing and final marks do not count.

    Operators, digits and brackets do: ``x+1`` and ``x-1`` are two problems.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = _LAYOUT.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return text.strip(".?!,;:'\"*_`")


@dataclass(frozen=True, slots=True)
class Loaded:
    """Problems, and what happened on the way to them.

    Attributes:
        problems: what is left, in order; every id and every normalised prompt once.
        where: id -> the place it was read from; empty for generated problems.
        read: rows there were.
        duplicates: left out because an earlier problem has the same prompt and answer.
        conflicts: left out because problems with the same prompt have different answers: all of them.
        excluded: left out because they are also in what is held out.
        bad: rows and golds that were left out as `skip_bad` allows, each with its place and reason.
    """

    problems: tuple[Problem, ...]
    where: Mapping[str, str]
    read: int
    duplicates: int = 0
    conflicts: int = 0
    excluded: int = 0
    bad: tuple[str, ...] = ()
    prompts: frozenset[str] = frozenset()
    ids: frozenset[tuple[str, str]] = frozenset()

    def without(self, why: Mapping[str, str]) -> Loaded:
        """The same without the problems of these ids, which are bad for the reason given."""
        if not why:
            return self
        left = tuple(problem for problem in self.problems if problem.id not in why)
        return replace(self, problems=left, bad=(*self.bad, *why.values()))

    def __str__(self) -> str:
        counts = (
            (self.duplicates, "duplicates"),
            (self.conflicts, "with contradicting answers"),
            (self.excluded, "also in what is held out"),
            (len(self.bad), "bad"),
        )
        dropped = ", ".join(f"{count:,} {what}" for count, what in counts if count)
        return f"{len(self.problems):,} problems" + (f" ({self.read:,} read; {dropped})" if dropped else "")


def read_problems(config: ProblemsConfig) -> list[Problem]:
    """The problems of a config section, in file or generation order. Errors as for `load`."""
    return list(load(config).problems)


def load(config: ProblemsConfig, *, exclude: Iterable[Loaded] = ()) -> Loaded:
    """Read or generate the problems of a config section.

    Args:
        exclude: what must not be among them, beside what ``config.exclude`` names: a problem is left out if its
            normalised prompt is there, or its id under the same source.

    Raises:
        UserError: no such source; a bad row (with its place) unless ``skip_bad``; two problems of one id in a file of
            our own; or nothing left.
    """
    items = list(_read(config) if config.arithmetic is None else _generated(config))
    found = [_Found(normalised(item.problem.prompt), item) for item in items if isinstance(item, LocatedProblem)]
    bad = [item for item in items if isinstance(item, BadProblem)]
    if bad and not config.skip_bad:
        raise UserError(
            f"{bad[0].where}: {bad[0].why}. ({len(bad)} of {len(items)} rows are bad; "
            "problems.skip_bad=true leaves them out.)"
        )
    others = [*exclude, *(load(_elsewhere(source)) for source in config.exclude)]
    contradicted = _contradicted(found)
    settled = [one for one in found if one.prompt not in contradicted]
    unique = _once_each(settled)
    left = [one for one in unique if not _is_among(one, others)]
    excluded = len(unique) - len(left)
    kept = left[: config.count]
    if not kept:
        reason = f"all {excluded} are also in what is held out" if excluded else f"{len(items)} rows, none of use"
        raise UserError(f"{config.path} holds no problems ({reason}).")
    instruct = config.instruction
    return Loaded(
        problems=tuple(
            with_instruction(one.item.problem, one.item.instruction if instruct is None else instruct) for one in kept
        ),
        where={one.item.problem.id: one.item.where for one in kept if one.item.where},
        read=len(items),
        duplicates=len(settled) - len(unique),
        conflicts=len(found) - len(settled),
        excluded=excluded,
        bad=tuple(f"{item.where}: {item.why}" for item in bad),
        prompts=frozenset(one.prompt for one in kept),
        ids=frozenset((one.item.problem.source, one.item.problem.id) for one in kept if one.item.problem.source),
    )


class _Found(NamedTuple):
    """A problem, and its prompt as it is compared."""

    prompt: str
    item: LocatedProblem


def _read(config: ProblemsConfig) -> Iterator[LocatedProblem | BadProblem]:
    assert config.path is not None  # the schema asks for this or for generated ones
    return read_located(
        config.path,
        set_name=config.set,
        columns=config.columns,
        kind=config.kind,
        subset=config.subset,
        split=config.split,
    )


def _generated(config: ProblemsConfig) -> list[LocatedProblem]:
    from memento.arithmetic import make_problems

    family = config.arithmetic
    assert family is not None
    made = make_problems(
        config.count or GENERATED, config.seed, terms=(family.min_terms, family.max_terms), digits=family.digits
    )
    return [LocatedProblem("", problem) for problem in made]


def _elsewhere(source: str) -> ProblemsConfig:
    """A set that is only read to leave it out: whatever is wrong with some of its rows does not matter."""
    return ProblemsConfig(path=source, skip_bad=True)


def _contradicted(found: Sequence[_Found]) -> set[str]:
    """Prompts under which different answers stand."""
    golds: dict[str, set[str]] = {}
    for prompt, item in found:
        if item.problem.answer is not None:
            golds.setdefault(prompt, set()).add(normalised(item.problem.answer))
    return {prompt for prompt, answers in golds.items() if len(answers) > 1}


def _once_each(found: Sequence[_Found]) -> list[_Found]:
    """The first problem of every prompt. Raises UserError where two of them have one id."""
    prompts = set[str]()
    kept: dict[str, _Found] = {}
    for one in found:
        if one.prompt in prompts:
            continue
        name = one.item.problem.id
        if name in kept:
            raise UserError(
                f"the id {name!r} occurs more than once, at {kept[name].item.where} and at {one.item.where}, for "
                "different problems; every problem needs its own."
            )
        prompts.add(one.prompt)
        kept[name] = one
    return list(kept.values())


def _is_among(one: _Found, others: Sequence[Loaded]) -> bool:
    problem = one.item.problem
    return any(
        one.prompt in other.prompts or (bool(problem.source) and (problem.source, problem.id) in other.ids)
        for other in others
    )

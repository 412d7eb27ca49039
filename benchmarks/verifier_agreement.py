r"""Does `score` agree with the field's own test cases and answer keys? Reads public files that you have.

    python benchmarks/verifier_agreement.py --math-verify Math-Verify/tests
    python benchmarks/verifier_agreement.py --golds math/test.jsonl olympiadbench/test.jsonl --limit 600
    python benchmarks/verifier_agreement.py --gsm8k grade_school_math/data/test.jsonl

`--math-verify`: the (gold, prediction, expected) cases of the test files of github.com/huggingface/Math-Verify, read
from their source, each prediction scored as a completion. `--golds`: from every answer of a problem set, a different
spelling that must be right and a neighbour that must be wrong, by the rules in `respell`. `--gsm8k`: every gold against
itself, and perturbed. What disagrees is listed; docs/rewards.md says why.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from memento.config import ProblemsConfig, RewardsConfig
from memento.problems import Problem, ProblemKind
from memento.rewards.math_verifier import gold_text, is_words
from memento.rewards.plain_answers import as_number
from memento.rewards.scoring import Scorer
from memento.sources import load
from memento.trajectory import Outcome


class Case(NamedTuple):
    """A completion, the gold it is scored against, and whether it ought to be right."""

    where: str
    gold: str
    completion: str
    right: bool


class Triple(NamedTuple):
    """A gold, another spelling of it, and something else."""

    kind: str
    gold: str
    equivalent: str
    different: str


# ---- cases of Math-Verify's own tests


def upstream_cases(folder: Path) -> Iterator[Case]:
    """Cases of the parametrised tests that have a gold, a prediction, an expected result, and nothing else."""
    for file in sorted(folder.glob("test_*.py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                for number, (gold, prediction, expected) in enumerate(_parameters(function), 1):
                    yield Case(f"{file.stem}.{function.name}[{number}]", gold, prediction, bool(expected))


def _parameters(function: ast.FunctionDef) -> Iterator[tuple[str, str, int]]:
    for decorator in function.decorator_list:
        if not (isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize"):
            continue
        names = [name.strip() for name in str(ast.literal_eval(decorator.args[0])).split(",")]
        if len(names) != 3 or names[0] != "gold" or names[1] not in ("pred", "prediction"):
            continue
        for element in decorator.args[1].elts if isinstance(decorator.args[1], ast.List) else []:
            try:
                case = ast.literal_eval(element)
            except ValueError:
                continue  # computed when their test runs
            if len(case) == 3 and isinstance(case[0], str) and isinstance(case[1], str):
                yield case


# ---- triples from answer keys


def respell(gold: str) -> Triple | None:
    r"""Another spelling of an answer, and a wrong neighbour of it; None where no rule is safe.

    integer 12 -> 12.0, \frac{24}{2}, 1,234 | 13.  fraction -> a/b, \dfrac, \frac{2a}{2b}, a decimal that ends | one
    more in the numerator.  tuple and interval -> \left( ... \right) | the first entry one larger.  list -> reversed |
    one entry less.  words -> \textbf{...} | other words.  expression e -> \frac{2(e)}{2} | (e)+1.
    """
    pick = hashlib.blake2b(gold.encode(), digest_size=2).digest()[0]
    number = as_number(gold)
    if number is not None and number.value.denominator == 1:
        n = int(number.value)
        spellings = [f"{n}.0", rf"\frac{{{2 * n}}}{{2}}", rf"\text{{{n}}}", f"{n}.", f"${n}$"]
        if abs(n) >= 1000:
            spellings = [f"{n:,}", f"{n:,}".replace(",", "{,}"), *spellings[:1]]
        return Triple("integer", gold, spellings[pick % len(spellings)], str(n + 1))
    if number is not None:
        a, b = number.value.numerator, number.value.denominator
        spellings = [f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}", rf"\frac{{{2 * a}}}{{{2 * b}}}"]
        if _ends(number.value):
            spellings.append(f"{a / b:.12f}".rstrip("0"))
        return Triple("fraction or decimal", gold, spellings[pick % len(spellings)], rf"\frac{{{a + 1}}}{{{b}}}")
    if is_words(gold):
        plain = re.sub(r"\\[a-z]+\{([^{}]*)\}", r"\1", gold)
        other = "Tuesday" if plain != "Tuesday" else "Friday"
        return Triple("words", gold, rf"\textbf{{{plain}}}", rf"\text{{{other}}}")
    inside = re.fullmatch(r"(\\left)?([(\[])(.+?)(\\right)?([)\]])", gold)
    if inside and _balanced(inside[3]):
        entries = _entries(inside[3])
        if len(entries) > 1 and "infty" not in entries[0]:
            left, right = inside[2], inside[5]
            other = ", ".join([f"{entries[0]}+1", *entries[1:]])
            same = rf"\left{left} {' , '.join(entries)} \right{right}"
            return Triple("tuple or interval", gold, same, f"{left}{other}{right}")
        return None
    entries = _entries(gold)
    if len(entries) > 1 and "=" not in gold and _balanced(gold):
        return Triple("list", gold, ", ".join(reversed(entries)), ", ".join(entries[:-1]))
    if re.search(r"[=<>]|\\(?:in|le|ge|leq|geq|cup|cap|text|begin|pm|mbox|infty|circ)\b|%|_|;|\bor\b|\band\b", gold):
        return None
    if re.search(r"\d ?\\[dt]?frac|\\\$|\\[dt]?frac\d", gold):
        return None  # a mixed number, dollars, a fraction without braces: they do not stand inside of another fraction
    if re.search(r"[A-Za-z]{4,}", re.sub(r"\\[A-Za-z]+", "", gold)) or not _balanced(gold):
        return None
    return Triple("expression", gold, rf"\frac{{2({gold})}}{{2}}", f"({gold})+1")


def _ends(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1 and value.denominator < 10**6


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _entries(text: str) -> list[str]:
    """Parts between commas that stand in no bracket, and are no thousands."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


# ---- running


def judge(cases: list[Case], scorer: Scorer) -> list[tuple[Case, Outcome]]:
    """Score the cases in parallel, in order."""

    def one(case: Case) -> tuple[Case, Outcome]:
        problem = Problem(id=case.where, kind=ProblemKind.MATH, prompt="?", answer=case.gold)
        return case, scorer.score(problem, case.completion).outcome

    with ThreadPoolExecutor(scorer.config.workers) as threads:
        return list(threads.map(one, cases))


def report(title: str, cases: list[Case], scorer: Scorer, out: Path | None) -> int:
    """Print how many agree, and those that do not. Returns the number that do not."""
    started = time.perf_counter()
    results = judge(cases, scorer)
    seconds = time.perf_counter() - started
    differ = [(case, outcome) for case, outcome in results if (outcome is Outcome.CORRECT) != case.right]
    print(f"{title}: {len(cases) - len(differ)} of {len(cases)} agree ({seconds:.1f} s, {len(cases) / seconds:.0f}/s)")
    for case, outcome in differ:
        shown = case.completion if len(case.completion) <= 100 else "..." + case.completion[-97:]
        expected = "right" if case.right else "not right"
        print(f"  {case.where}: gold {case.gold[:80]!r}, {shown!r}: expected {expected}, got {outcome.value}")
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            for case, outcome in differ:
                file.write(json.dumps({"set": title, **case._asdict(), "outcome": outcome.value}) + "\n")
    return len(differ)


def cases_of(triples: Iterable[Triple], name: str) -> list[Case]:
    """Both halves of every triple, boxed."""
    cases = []
    for number, triple in enumerate(triples, 1):
        where = f"{name}[{number}] ({triple.kind})"
        cases += [Case(where, triple.gold, f"Hence \\boxed{{{triple.equivalent}}}.", True)]
        cases += [Case(where, triple.gold, f"Hence \\boxed{{{triple.different}}}.", False)]
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--math-verify", type=Path, help="folder of Math-Verify's tests")
    parser.add_argument("--golds", type=Path, nargs="*", default=[], help="problem sets with mathematical answers")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K as JSONL")
    parser.add_argument("--limit", type=int, default=None, help="answers of each set, at most; each answer once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append what disagrees to this JSONL")
    options = parser.parse_args()
    scorer, differ = Scorer(RewardsConfig(workers=options.workers)), 0
    try:
        if options.math_verify:
            differ += report("Math-Verify's tests", list(upstream_cases(options.math_verify)), scorer, options.out)
        for path in options.golds:
            problems = load(ProblemsConfig(path=path, skip_bad=True)).problems
            golds = list(dict.fromkeys(gold_text(p) for p in problems if p.kind is ProblemKind.MATH))[: options.limit]
            triples = [triple for gold in golds if (triple := respell(gold)) is not None]
            kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(t.kind for t in triples).most_common())
            print(f"{path}: {len(golds)} different answers, {len(triples)} triples ({kinds})")
            own = [Case(f"itself[{i}]", gold, f"\\boxed{{{gold}}}", True) for i, gold in enumerate(golds, 1)]
            differ += report(f"{path.parent.name}/{path.name}, each answer against itself", own, scorer, options.out)
            cases = cases_of(triples, path.parent.name)
            differ += report(f"{path.parent.name}/{path.name}, triples", cases, scorer, options.out)
        if options.gsm8k:
            golds = [p.answer or "" for p in load(ProblemsConfig(path=options.gsm8k, set="gsm8k")).problems]
            own = [Case(f"gsm8k[{i}]", gold, f"so it is {gold}.\n#### {gold}", True) for i, gold in enumerate(golds, 1)]
            differ += report("GSM8K, each gold against itself", own, scorer, options.out)
            wrong = [
                Case(f"gsm8k[{i}]", gold, f"\\boxed{{{other}}}", False)
                for i, gold in enumerate(golds, 1)
                if (triple := respell(gold)) is not None and (other := triple.different)
            ]
            differ += report("GSM8K, perturbed", wrong[: options.limit], scorer, options.out)
    finally:
        scorer.close()
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())

"""Admission by expected peaks: the forecast by hand, and what it does to preemptions."""

from __future__ import annotations

import random

import pytest

from memento.format import MementoFormat
from memento.rollout.admission import Admission, Outlook, PeakForecast, expected_peak
from memento.rollout.plan import EvictionPlan, RequestControl

FMT = MementoFormat(1, 2, 3, 4, evict_delimiters=False)


BLOCK = [1, *[9] * 100, 2, 3, *[9] * 6, 4]


def plan(
    prompt: int, generated: int = 0, max_tokens: int = 1000, evict: bool = True, closes: bool = True
) -> EvictionPlan:
    fmt = FMT if evict else FMT.without_eviction()
    made = EvictionPlan(RequestControl(fmt), prompt, max_tokens)
    made.observe([9] * prompt + (BLOCK * 9 if closes else [9] * 999)[:generated])
    return made


def test_the_sum_is_largest_just_before_somebody_ends():
    assert expected_peak([]) == (0.0, 0.0)
    assert expected_peak([Outlook(10, 1.0, 5, 9.0), Outlook(20, 1.0, 40, 16.0)]) == (60.0, 5.0)
    # Two that end together need both peaks at once; one that ends before the other grows does not add to it.
    together = [Outlook(10, 1.0, 50, 0.0), Outlook(10, 1.0, 50, 0.0)]
    staggered = [Outlook(50, 1.0, 10, 0.0), Outlook(10, 1.0, 50, 0.0)]
    assert expected_peak(together)[0] == 120 and expected_peak(staggered)[0] == 80
    # Whatever grows not at all: the sum is what is held now.
    assert expected_peak([Outlook(7, 0.0, 3, 0.0), Outlook(8, 0.0, 9, 0.0)])[0] == 15


def test_before_anybody_finished_the_limit_of_the_request_is_all_there_is():
    fresh = PeakForecast().outlook(plan(prompt=100, max_tokens=1000))
    assert (fresh.start_tokens, fresh.remaining) == (100, 1000)
    assert fresh.start_tokens + fresh.slope * fresh.remaining == 100 + 250
    plain = PeakForecast().outlook(plan(prompt=100, max_tokens=1000, evict=False))
    assert plain.start_tokens + plain.slope * plain.remaining == pytest.approx(100 + 1000)


def test_finished_requests_teach():
    forecast = PeakForecast()
    for _ in range(200):
        forecast.observe(length=400, growth=150, block=100)
    young, old = forecast.outlook(plan(100)), forecast.outlook(plan(100, generated=390))
    # At first half a block; at the end the mementos (growth less a block) and half a block.
    assert young.start_tokens == pytest.approx(150, abs=5) and young.remaining == pytest.approx(400, abs=15)
    assert old.start_tokens + old.slope * old.remaining == pytest.approx(100 + 50 + 50, rel=0.2)
    assert young.variance == pytest.approx(100**2 / 12, rel=0.05), "all alike: only the phase within a block is unknown"
    forecast.observe(length=4000, growth=1500, block=100)
    assert forecast.outlook(plan(100)).variance > young.variance, "and now lengths vary"
    preempted = plan(100, generated=390)
    preempted.reset()
    assert forecast.outlook(preempted).start_tokens < 1000
    # Whoever outgrew everything expected counts with what it holds.
    stray = forecast.outlook(plan(100, generated=900, closes=False))
    assert stray.start_tokens == 1000 and 0 < stray.remaining <= 100


def test_kinds_do_not_mix():
    admission = Admission(page_tokens=32)
    long = plan(100, generated=900, evict=False)
    admission.finished(long, 1000)
    assert set(admission.forecasts) == {-1}
    alone = admission.pages([plan(64)])
    assert 1 <= alone == admission.expected_pages
    assert admission.pages([plan(64)] * 10) > 7 * alone


def test_peaks_that_are_reserved_are_not_preempted():
    """The same load with vLLM's own admission and with ours: hardly a preemption is left, and not one token differs."""
    pytest.importorskip("vllm")
    from memento.rollout import eviction_stats
    from tests.rollout.scripted import Case, blocks, check, engine, qwen3, run, scheduler_of, words

    rng, (_, reference) = random.Random(51), qwen3()
    cases = [Case(words(rng, 20, 40), [*blocks(rng, 3, 60, 90), 9]) for _ in range(28)]
    stock, ours = run(engine("tight"), cases), run(engine("reserving"), cases)
    assert [o.outputs[0].token_ids for o in stock] == [o.outputs[0].token_ids for o in ours]
    before, after = (sum(eviction_stats(o).preemptions for o in outputs) for outputs in (stock, ours))
    print(f"preemptions of {len(cases)} requests on 25 pages: {before} by free pages, {after} by expected peaks")
    assert before >= 10
    assert after <= before // 5
    admission = scheduler_of(engine("reserving"))._manager.admission
    assert admission.held_back > 0 and admission.forecasts[0].count >= 28
    check(engine("reserving"), reference, cases[:8])


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("pages", [15, 25])
@pytest.mark.parametrize("ages", ["together", "mixed"])
def test_what_reserving_costs_and_saves(pages, ages):
    """Prints a table (``pytest -m long -s``): the same 120 requests in turn, with and without reserving."""
    import time
    from statistics import median

    from memento.rollout import eviction_stats
    from tests.rollout.scripted import Case, blocks, make_engine, qwen3, run, words

    rng = random.Random(52)
    counts = [3] * 120 if ages == "together" else [rng.randint(1, 5) for _ in range(120)]
    cases = [Case(words(rng, 20, 40), [*blocks(rng, count, 60, 90), 9]) for count in counts]
    engines = {
        name: make_engine(qwen3()[0], FMT, pages + 1, options={"reserve_peaks": name == "reserving"}, max_num_seqs=16)
        for name in ("free pages", "reserving")
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    preemptions: dict[str, list[int]] = {name: [] for name in engines}
    preempted: dict[str, list[int]] = {name: [] for name in engines}
    for _ in range(4):
        for name, llm in engines.items():
            began = time.process_time()
            outputs = run(llm, cases)
            seconds[name].append(time.process_time() - began)
            stats = [eviction_stats(output) for output in outputs]
            preemptions[name].append(sum(s.preemptions for s in stats))
            preempted[name].append(sum(s.preemptions > 0 for s in stats))
    for name in engines:
        # The first round of an engine also compiles and, where it reserves, learns.
        print(
            f"\n{pages} pages, {ages:8} {name:10}: {median(seconds[name][1:]):6.2f} CPU s, "
            f"preemptions {preemptions[name]}, requests preempted {preempted[name]} of {len(cases)}",
            end="",
        )
    ratio = median(a / b for a, b in zip(*(seconds[name][1:] for name in engines), strict=True))
    print(f"\n{pages} pages, {ages:8} {ratio:.2f} times as fast")
    assert sum(preempted["reserving"][1:]) <= 0.02 * 3 * len(cases)

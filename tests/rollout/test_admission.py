"""Admission by expected peaks: the forecast by hand, and what it does to preemptions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from memento.format import MementoFormat
from memento.rollout.admission import (
    MARGIN_SIGMAS,
    SPARE_PAGES,
    WINDOW_REQUESTS,
    Admission,
    Outlook,
    PeakForecast,
    reserved_tokens,
)
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


def outlook(start: float, slope: float, variance: float, *ends: float) -> Outlook:
    return Outlook(start, slope, variance, np.array(ends, dtype=np.float64))


def test_the_sum_is_largest_just_before_somebody_ends():
    assert reserved_tokens([]) == 0
    assert reserved_tokens([outlook(10, 1.0, 0.0, 5), outlook(20, 1.0, 0.0, 40)]) == 60
    # Two that end together need both peaks at once; one that ends before the other grows does not add to it.
    together = [outlook(10, 1.0, 0.0, 50), outlook(10, 1.0, 0.0, 50)]
    staggered = [outlook(50, 1.0, 0.0, 10), outlook(10, 1.0, 0.0, 50)]
    assert reserved_tokens(together) == 120 and reserved_tokens(staggered) == 80
    # Whatever grows not at all: the sum is what is held now.
    assert reserved_tokens([outlook(7, 0.0, 0.0, 3), outlook(8, 0.0, 0.0, 9)]) == 15


def test_who_may_be_gone_by_then_counts_less():
    # Half of those of this age end after 10 tokens, half after 90. One alone may be there at the very end; of many
    # half are gone by then, give or take MARGIN_SIGMAS times the root of their number.
    assert reserved_tokens([outlook(10, 1.0, 0.0, 10, 90)]) == 100
    assert reserved_tokens([outlook(10, 1.0, 0.0, 10, 90)] * 100) == 100 * 50 + MARGIN_SIGMAS * 10 * 50
    # A saw's height varies, too, while it is there; but no more is kept than what all hold on average.
    assert reserved_tokens([outlook(10, 1.0, 400.0, 10, 90)] * 100) == pytest.approx(
        100 * 50 + MARGIN_SIGMAS * 10 * (0.5 * 400 + 0.25 * 100**2) ** 0.5
    )
    assert reserved_tokens([outlook(10, 1.0, 400.0, 90)] * 100) == 100 * 100


def test_the_peak_is_that_of_a_simulation():
    """Against a thousand futures drawn by hand: the sum at its worst moment, margin included."""
    rng = np.random.default_rng(3)
    lengths = rng.gamma(4.0, 100.0, 64)
    ages = rng.uniform(0, 400, 12)
    requests = [outlook(60 + age / 4, 0.25, 0.0, *np.sort(lengths[lengths > age] - age)) for age in ages]
    grid = np.arange(0.0, 1200.0, 2.0)
    sums = np.zeros((1000, len(grid)))
    for request in requests:
        ends = rng.choice(request.ends, 1000)
        sums += (grid <= ends[:, None]) * (request.start_tokens + request.slope * grid)
    whole = sum(request.start_tokens + request.slope * grid for request in requests)
    expected = np.minimum(sums.mean(axis=0) + MARGIN_SIGMAS * sums.std(axis=0), whole).max()
    assert reserved_tokens(requests) == pytest.approx(expected, rel=0.03)


def test_before_anybody_finished_the_limit_of_the_request_is_all_there_is():
    fresh = PeakForecast().outlook(plan(prompt=100, max_tokens=1000))
    assert (fresh.start_tokens, *fresh.ends) == (100, 1000)
    assert reserved_tokens([fresh]) == 100 + 250
    plain = PeakForecast().outlook(plan(prompt=100, max_tokens=1000, evict=False))
    assert reserved_tokens([plain]) == pytest.approx(100 + 1000)


def teach(admission: Admission, generated: int, evict: bool = True) -> None:
    """A request ran and ended. What only its last token would evict never was."""
    ended = plan(100, generated, evict=evict)
    for event in ended.events:
        if event.boundary <= 100 + generated - 2:
            ended.advance(event, 3)
            admission.evicted(ended)
    admission.finished(ended, 100 + generated)


def test_finished_requests_teach():
    admission = Admission(page_tokens=32)
    # Three blocks of 100 in 333 tokens: 33 tokens stay.
    for _ in range(200):
        teach(admission, 333)
    forecast = admission.forecasts[0]
    assert (forecast.count, forecast.length, forecast.kept) == (200, 333, 33)
    young, old = forecast.outlook(plan(100)), forecast.outlook(plan(100, generated=325))
    assert list(young.ends) == [333] * WINDOW_REQUESTS + [1000], "the last lengths, and the limit"
    assert list(old.ends) == [8] * WINDOW_REQUESTS + [675]
    assert young.start_tokens == 100 + forecast.saw
    exact = [old.start_tokens + old.slope * t for t in (0, 8)]
    assert exact[0] == pytest.approx(100 + 20 + forecast.saw, abs=6), "two mementos, and the saw"
    assert exact[1] > exact[0]
    assert young.variance == pytest.approx(forecast.saw_variance, rel=0.05), "all alike but for the phase of the saw"
    teach(admission, 999)
    assert forecast.outlook(plan(100)).variance > young.variance, "and now lengths vary"
    preempted = plan(100, generated=325)
    preempted.reset()
    assert forecast.outlook(preempted).start_tokens < 300
    # Whoever outgrew everything expected counts with what it holds.
    stray = forecast.outlook(plan(100, generated=900, closes=False))
    assert stray.start_tokens >= 1000 and list(stray.ends) == [99, 100], "one was longer, and there is the limit"


def evict_all(admission: Admission, running: EvictionPlan) -> None:
    """Carry out every eviction of a request, and let the forecasts learn from each."""
    for event in running.events:
        running.advance(event, 3)
        admission.evicted(running)


def test_running_requests_teach_too():
    admission = Admission(page_tokens=32)
    evict_all(admission, plan(100, generated=250))
    forecast = admission.forecasts[0]
    assert (forecast.count, forecast.evictions, forecast.block, forecast.cycle) == (0, 2, 100, 110)
    # Nobody finished: the limit is all there is for the length, but it is known how many of the tokens stay.
    assert forecast.outlook(plan(100)).slope == pytest.approx(10 / 110)
    in_prompt = EvictionPlan(RequestControl(FMT), 300, 1000)
    in_prompt.observe([9] * 40 + BLOCK * 2 + [9] * 100)
    evict_all(admission, in_prompt)
    assert forecast.evictions == 2, "blocks of a prompt say nothing of those to come"


def test_the_nearest_fall_has_the_last_pages():
    admission = Admission(page_tokens=32)
    evict_all(admission, plan(100, generated=250))
    early, late, closing = (plan(32, generated=generated) for generated in (20, 90, 105))
    assert [early.open_tokens, late.open_tokens, closing.open_tokens] == [19, 89, 100]
    until = [admission.forecasts[0].until_release(p) for p in (early, late, closing)]
    assert until == [81 + 10, 25 + 10, 10 - 4]
    held = [("early", early, 2), ("late", late, 4), ("closing", closing, 5)]
    turn = admission.turn(held)
    assert turn is not None and (turn.request_id, turn.pages) == ("closing", SPARE_PAGES)
    turn = admission.turn(held[:2])
    assert turn is not None and (turn.request_id, turn.pages) == ("late", 1 + SPARE_PAGES)
    # With two free pages whoever wants one sits out, but for the one whose turn it is; with three nobody does.
    admission.begin_step(free_pages=2, num_running=2)
    assert admission.scarce and not admission.somebody_waits
    assert admission.sits_out("early", 1, 2, lambda: held[:2])
    assert not admission.sits_out("late", 1, 2, lambda: held[:2])
    assert admission.somebody_waits and admission.sat_out == 1
    assert not admission.sits_out("early", 1, 3, lambda: held[:2])
    admission.begin_step(free_pages=100, num_running=2)
    assert not admission.scarce and not admission.somebody_waits
    # Once it is gone, the next one is chosen.
    admission.left("late")
    assert not admission.sits_out("early", 1, 2, lambda: held[:1])
    # Who never evicts gives pages back at its end only, and nobody waits for that.
    assert admission.turn([("plain", plan(32, generated=90, evict=False), 4)]) is None
    assert admission.turn([]) is None


def test_kinds_do_not_mix():
    admission = Admission(page_tokens=32)
    teach(admission, 900, evict=False)
    assert set(admission.forecasts) == {-1}
    alone = admission.pages([plan(64)])
    assert 1 <= alone == admission.expected_pages
    assert admission.pages([plan(64)] * 10) > 7 * alone


def test_peaks_that_are_reserved_are_not_preempted():
    """The same load with vLLM's own admission and with ours: hardly a preemption is left, and not one token differs."""
    pytest.importorskip("vllm")
    from memento.rollout import eviction_stats
    from tests.rollout.scripted import Case, blocks, check_output, engine, qwen3, run, scheduler_of, words

    rng, (_, reference) = random.Random(51), qwen3()
    cases = [Case(words(rng, 20, 40), [*blocks(rng, 3, 60, 90), 9]) for _ in range(28)]
    stock, ours = run(engine("tight"), cases), run(engine("reserving"), cases)
    assert [o.outputs[0].token_ids for o in stock] == [o.outputs[0].token_ids for o in ours]
    before, after = (sum(eviction_stats(o).preemptions for o in outputs) for outputs in (stock, ours))
    print(f"preemptions of {len(cases)} requests on 25 pages: {before} by free pages, {after} by expected peaks")
    assert before >= 10
    assert after <= before // 5
    admission = scheduler_of(engine("reserving"))._manager.admission
    print(f"sat out {admission.sat_out} steps, held back {admission.held_back} times")
    assert admission.held_back > 0 and admission.forecasts[0].count >= 28
    for case, output in zip(cases, ours, strict=True):
        check_output(reference, case, output)


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

"""Decide which runs find the fewest syncs whose loss is within a margin of the dense model's; see
find_fewest_syncs.py.

1. Pilot: all syncs four times, the fewest planned syncs twice. They show the spread between seeds and the
   cost of a run. The search ends here if the budget or the spread lets it decide nothing.
2. Bisection over the counts. Each verdict is a group-sequential test of the log ratio of the losses against
   log(1 + within), at 2, 3, 4, 6 and 8 runs. Up to look m a test spends a (m / 8)^1.5 of its level a, for
   "within" and for "above" each; a look has the increment as its level (Bonferroni's inequality, so the looks
   may depend on each other in any way). a is alpha divided by the number of halvings. The spread is pooled
   over all arms, and the arms share a baseline with as many runs as the largest of them.
3. Placement: other positions of the syncs at the two counts beside the boundary. The greedy ones come from a
   dense model of the pilot: drop_syncs.py drops the sync that raises its loss least, again and again. Then
   the families, each by the same test, while the budget pays for them and for the proof of the best arm so
   far. A family with fewer syncs than that arm is proved in its place, and the arm then has the second
   attempt.
4. Proof on fresh seeds, which enter no other decision: at most two attempts, each at alpha / 2. A proof that
   has begun keeps its arm and its number of runs, and ends the search: a larger budget changes neither.
5. Control: dense models of fewer layers.
6. Second budget: the same arms on more tokens, and the slope of the log ratio in log tokens.

All decisions are a function of the plan and the results: a resumed search repeats them. Each decision uses
only runs that were requested up to it. A failed run is replaced by the next seed, at most SPARE times an arm.
"""

import math
from collections.abc import Callable

from scipy.special import ndtri, stdtrit

from experiments.campaign import Pending, Run
from experiments.experiment_statistics import CONFIDENCE, differ, pooled_std, welch_error
from experiments.search_evidence import (
    ABOVE,
    DROPS,
    GREEDY,
    OPEN,
    PILOT,
    PROOF,
    SEARCH,
    SECOND,
    SENSITIVITY,
    SPENDING,
    WITHIN,
    Ratio,
    SearchPlan,
    SearchResults,
    Story,
    arm_name,
    control_name,
    count_of,
    percent,
)

LEAST_PROOF = 3  # runs of an arm in a proof; the search leaves budget for them
POWER = 0.8  # with which the pilot says what can be decided
PROOF_POWER = 0.9  # for the number of runs of a proof
WORTH = 0.5  # with so much power at the most runs the proof of an undecided arm is tried
SUPPORTED = 4  # multiple of the largest budget up to which a prediction is supported by the runs


def decide(plan: SearchPlan, results: SearchResults,
           affordable: Callable[[list[Run]], bool] = lambda batch: True
           ) -> tuple[list[dict], list[Run], dict | None]:
    """Return (decisions so far, runs to do next, outcome), either runs or an outcome.

    affordable(runs): True if the budget pays for all of them.
    """
    story = Story(plan, results, affordable)
    try:
        return story.decisions, [], _tell(story)
    except Pending as e:
        return story.decisions, e.batch, None


def _tell(story: Story) -> dict:
    """Decide from the pilot to the second budget."""
    plan = story.plan
    stopped = _pilot(story)
    if stopped:
        return _outcome(story, (plan.counts[-1], plan.counts[0]), None, None, stopped)
    low, high = _bisect(story)
    _place(story, high)
    _test_families(story)
    winner = next(iter(story.results.proofs), None) or _winner(story)
    if winner:
        story.note(SEARCH, "winner", f"{winner} goes into the proof", arm=winner)
    interval = plan.counts[low], plan.counts[high]
    story.note(SEARCH, "interval", f"the fewest evenly spaced syncs are from {interval[0]} to {interval[1]}",
               interval=list(interval))
    proof = _prove(story, winner) if winner else None
    _control(story)
    return _outcome(story, interval, winner, proof, None if winner else
                    f"no count below {plan.counts[0]} was shown to be within {plan.within:.1%}")


def _pilot(story: Story) -> str | None:
    """Measure spread and cost; return why to stop, None to go on."""
    plan, last = story.plan, arm_name(story.plan.counts[-1])
    if not story.need(SEARCH, {plan.baseline: PILOT, last: plan.looks[0]}):
        return "the budget does not pay for the pilot"
    pooled = story.spread()
    if len(story.sample(plan.baseline).logs) < 2:
        return "the runs of the baseline failed"
    if pooled is None:
        return "the runs of the pilot do not differ: do they use their seeds?"
    least = least_difference(plan, pooled[0], plan.looks[-1])
    story.note(SEARCH, "pilot", f"the loss varies by {pooled[0]:.2%} between seeds; {plan.looks[-1]} runs "
               f"decide arms that are {least:.2%} or more from the margin", spread=pooled[0], df=pooled[1],
               least_difference=least)
    if least > plan.margin:
        return f"even {plan.looks[-1]} runs cannot show that an arm as good as the baseline is within " \
               f"{plan.within:.1%}: train longer, or raise --within"
    m = next(m for m in plan.looks if least_difference(plan, pooled[0], m) <= plan.margin)
    middle = arm_name(plan.counts[len(plan.counts) // 2])
    first = [Run(SEARCH, middle, i) for i in range(m)]
    first += [Run(SEARCH, plan.baseline, i) for i in range(PILOT, m)]
    if not _after_pilot(story) and not story.affordable([*first, *_least_proof(plan, middle)]):
        return f"the budget does not pay for the {len(first)} runs that decide one count, and a proof"
    return None


def _after_pilot(story: Story) -> bool:
    """Return True if a run after the pilot has ended. The budget that is left then does not say what it paid
    for after the pilot."""
    plan, pilot = story.plan, set()
    for arm, n in ((plan.baseline, PILOT), (arm_name(plan.counts[-1]), plan.looks[0])):
        for i, loss in story.results.done(SEARCH, arm).items():
            if n > 0:
                pilot.add(Run(SEARCH, arm, i))
                n -= loss is not None
    return not story.results.losses.keys() <= pilot


def _least_proof(plan: SearchPlan, arm: str) -> list[Run]:
    """Return the runs of the smallest proof."""
    return _proof_runs(plan, arm, LEAST_PROOF)


def _proof_runs(plan: SearchPlan, arm: str, n: int) -> list[Run]:
    """Return the runs of a proof with n of the arm."""
    return [Run(PROOF, name, i) for i in range(n) for name in (plan.baseline, arm)]


def least_difference(plan: SearchPlan, spread: float, runs: int) -> float:
    """Return the distance from the margin at which so many runs of arm and baseline decide with POWER."""
    level = plan.level * (runs / plan.looks[-1]) ** SPENDING
    return float(ndtri(1 - level) + ndtri(POWER)) * spread * math.sqrt(1 / runs + 1 / max(runs, PILOT))


def _test(story: Story, arm: str, looks: int | None = None, reserve: list[Run] = ()) -> str:
    """Judge an arm by its group-sequential test.

    looks: the number of looks to stop after, None for all; reserve: runs that the budget must also pay for,
    by default the smallest proof of the arm.
    """
    plan = story.plan
    while story.verdicts.get(arm, OPEN) == OPEN and story.looked.get(arm, 0) < (looks or len(plan.looks)):
        look = story.looked.get(arm, 0)
        m = plan.looks[look]
        arms = {arm: m, plan.baseline: max(m, PILOT)}
        if story.poor or story.closed(SEARCH, arms) or not story.need(
                SEARCH, arms, reserve or _least_proof(plan, arm)):
            if not story.poor:
                story.note(SEARCH, "budget", f"{arm}: the budget does not pay for {m} runs and a proof")
            story.poor = True
            break
        story.looked[arm] = look + 1
        ratio = story.ratio(arm, most=m)
        if ratio is None or ratio.runs < min(m, plan.looks[0]):
            story.note(SEARCH, "fails", f"{arm}: too few of its runs succeed", arm=arm)
            break
        p = ratio.p_below(plan.margin)
        level = plan.level_at(look)
        verdict = WITHIN if p <= level else ABOVE if 1 - p <= level else OPEN
        last = verdict != OPEN or look + 1 == len(plan.looks)
        if last:
            story.note(SEARCH, verdict, f"{arm}: {ratio.text()} after {ratio.runs} runs: {verdict}", arm=arm,
                       ratio=ratio.mean, interval=list(ratio.interval()), runs=ratio.runs, p_within=p)
        story.verdicts[arm] = verdict
    return story.verdicts.setdefault(arm, OPEN)


def _bisect(story: Story) -> tuple[int, int]:
    """Return the indices of the ends of the interval: the fewest count not shown to be above the margin, and
    the fewest that is within it."""
    counts, judge = story.plan.counts, lambda i, looks=None: _test(story, arm_name(counts[i]), looks)
    good, bad = 0, len(counts)
    first = judge(len(counts) - 1, 1)  # by the runs of the pilot
    if first == WITHIN:
        return len(counts) - 1, len(counts) - 1
    if first == ABOVE:
        bad = len(counts) - 1
    above = bad
    while bad - good > 1:
        middle = (good + bad) // 2
        verdict = judge(middle)
        good, bad = (middle, bad) if verdict == WITHIN else (good, middle)
        above = middle if verdict == ABOVE else above
    low = max((i for i in range(good, above) if story.verdicts.get(arm_name(counts[i])) == OPEN),
              default=good)
    while above - low > 1:  # below undecided counts
        middle = (low + above) // 2
        verdict = judge(middle)
        low, above = (low, middle) if verdict == ABOVE else (middle, above)
        good = middle if verdict == WITHIN else good
    return above - 1, good


def _place(story: Story, high: int) -> None:
    """Test other placements at the two counts beside the boundary."""
    plan = story.plan
    beside = plan.counts[max(high, 1):high + 2]
    for count in reversed(beside):
        for placement, n in plan.placements:
            if n == count:
                arm = _greedy(story, count) if placement == GREEDY else arm_name(count, placement)
                if arm is not None:
                    _test(story, arm)


def _greedy(story: Story, count: int) -> str | None:
    """Return the arm with the greedy placement, None without one."""
    plan, results, arm = story.plan, story.results, arm_name(count, GREEDY)
    reserve = [*(Run(SEARCH, arm, i) for i in range(plan.looks[0])), *_least_proof(plan, arm)]
    if story.closed(SENSITIVITY, {DROPS: 1}) or not story.need(SENSITIVITY, {DROPS: 1}, reserve):
        story.note(SENSITIVITY, "budget", f"{arm}: the budget does not pay for this placement and a proof")
        return None
    if results.greedy is None:
        story.note(SENSITIVITY, "fails", f"{arm}: no order in which to drop syncs was found", arm=arm)
        return None
    same = results.greedy[count]
    if same != arm:
        story.note(SENSITIVITY, "same", f"{arm} has the syncs of {same}", arm=arm, same=same)
    return same


def _test_families(story: Story) -> None:
    """Test the other strategies; the budget keeps the proof of the best arm so far."""
    plan = story.plan
    for arm, _ in plan.families:
        best = _winner(story)
        n = best and (_proof_size(story, best) or plan.looks[-1])
        _test(story, arm, reserve=_proof_runs(plan, best, n) if best else ())


def _winner(story: Story, families: bool = True) -> str | None:
    """Return the arm with the fewest syncs that may pass a proof, or None. Of arms with as many syncs, those
    that drop syncs precede families, and lower losses higher ones.

    The proof of an undecided arm is tried if it would succeed with the power WORTH at the measured ratio.
    families: False to leave them out.
    """
    plan = story.plan
    others = dict(plan.families)
    arms = [arm for arm, verdict in story.verdicts.items()
            if plan.syncs_of(arm) < plan.counts[0] and (families or arm not in others) and (
                verdict == WITHIN or (verdict == OPEN and _proof_size(story, arm, WORTH) is not None))]
    return min(arms, default=None,
               key=lambda arm: (plan.syncs_of(arm), arm in others, story.ratio(arm).mean))


def _prove(story: Story, winner: str) -> dict | None:
    """Prove the winner on fresh seeds, else the next larger count; return the last attempt. After a family
    the second attempt is that of the best arm that drops syncs, if there is one."""
    plan = story.plan
    larger = [n for n in plan.counts[1:] if n > plan.syncs_of(winner)]
    tested = [n for n in larger if story.verdicts.get(arm_name(n)) == WITHIN]
    second = _winner(story, families=False) if winner in dict(plan.families) else None
    seconds = [second] if second else [arm_name(n) for n in (tested or larger)[-1:]]
    begun, found = story.results.proofs, None
    for arm in list(dict.fromkeys((*begun, winner, *seconds)))[:2]:
        n = begun.get(arm) or _proof_size(story, arm) or plan.looks[-1]
        while n >= LEAST_PROOF and not story.pays(PROOF, {plan.baseline: n, arm: n}):
            n -= 1
        if n >= LEAST_PROOF:
            begun[arm] = n
        if arm in begun:  # in decisions.jsonl before a run of the proof starts
            story.note(PROOF, "size", f"{arm}: {begun[arm]} runs on fresh seeds, and as many of the baseline",
                       arm=arm, runs=begun[arm])
        if not (n >= LEAST_PROOF and story.need(PROOF, {plan.baseline: n, arm: n})):
            story.note(PROOF, "budget", f"{arm}: the budget does not pay for a proof of {LEAST_PROOF} runs")
            break
        pair = [story.sample(name, (PROOF,), n).exact for name in (plan.baseline, arm)]
        found = {"arm": arm, "proved": False, "runs": len(pair[1])}
        pooled = pooled_std(*pair) if min(map(len, pair)) > 1 and any(map(differ, pair)) else None
        if pooled is None:
            story.note(PROOF, "fails", f"{arm}: too few of its runs succeed", **found)
            continue
        ratio = Ratio(sum(pair[1]) / len(pair[1]) - sum(pair[0]) / len(pair[0]),
                      pooled[0] * math.sqrt(1 / len(pair[0]) + 1 / len(pair[1])), pooled[1], len(pair[1]))
        p = ratio.p_below(plan.margin)
        found |= {"proved": p <= plan.alpha / 2, "ratio": ratio.mean, "interval": list(ratio.interval()),
                  "p": p, "estimate": ratio.text()}
        verdict = "proved" if found["proved"] else "not proved"
        story.note(PROOF, verdict, f"{arm}: {ratio.text()} on {ratio.runs} fresh seeds (p = {p:.2g}): "
                   f"{verdict}", **found)
        if found["proved"]:
            break
    return found


def _proof_size(story: Story, arm: str, power: float = PROOF_POWER) -> int | None:
    """Return the runs with which the proof succeeds with this power if spread and ratio are as searched;
    None if too many."""
    plan, ratio, pooled = story.plan, story.ratio(arm), story.spread()
    for n in range(LEAST_PROOF, plan.looks[-1] + 1):
        reach = float(stdtrit(2 * n - 2, 1 - plan.alpha / 2) + ndtri(power))
        if ratio is not None and reach * pooled[0] * math.sqrt(2 / n) <= plan.margin - ratio.mean:
            return n
    return None


def _control(story: Story) -> None:
    """Do the dense models of fewer layers, deepest first, while the budget pays for them."""
    plan = story.plan
    for layers in plan.control_layers:
        arm = control_name(layers)
        if not story.need(SEARCH, {arm: plan.control_runs}):
            story.note(SEARCH, "budget", f"{arm}: the budget does not pay for {plan.control_runs} runs")
            return
        ratio = story.ratio(arm)
        if ratio is None:
            story.note(SEARCH, "fails", f"{arm}: its runs failed", arm=arm)
            continue
        story.note(SEARCH, "control", f"dense, {layers} layers: {ratio.text()} against all layers", arm=arm,
                   layers=layers, ratio=ratio.mean, interval=list(ratio.interval()), runs=ratio.runs)


def _second_budget(story: Story, winner: str) -> list[dict]:
    """Compare the winner, its neighbours and the baseline on more tokens; return a slope for each arm."""
    plan = story.plan
    if not plan.second_multiple:
        return []
    syncs = plan.syncs_of(winner)
    beside = [n for n in plan.counts[1:] if n > syncs][-1:] + [n for n in plan.counts if n < syncs][:1]
    arms = [winner, *map(arm_name, beside)]
    rows = []
    for arm in arms:
        both = {arm: plan.second_runs, plan.baseline: max(plan.second_runs, 2)}
        if not story.need(SEARCH, {arm: plan.second_runs}) or not story.need(SECOND, both):
            story.note(SECOND, "budget", f"{arm}: the budget does not pay for its runs on more tokens")
            break
        before, after = story.ratio(arm, (SEARCH, PROOF)), story.ratio(arm, (SECOND,))
        if before is None or after is None:
            story.note(SECOND, "fails", f"{arm}: no runs to compare on both budgets", arm=arm)
            continue
        rows.append(slope(arm, before, after, plan))
        story.note(SECOND, "slope", rows[-1]["text"], **{key: value for key, value in rows[-1].items()
                                                         if key != "text"})
    return rows


def slope(arm: str, before: Ratio, after: Ratio, plan: SearchPlan) -> dict:
    """Return the slope of the log ratio in log tokens, and the ratio predicted for more tokens."""
    span = math.log(plan.second_multiple)
    error, df = map(float, welch_error([before.error, after.error], (before.df + 1, after.df + 1)))
    quantile = float(stdtrit(df, (1 + CONFIDENCE) / 2))
    rate = (after.mean - before.mean) / span
    interval = [rate - quantile * error / span, rate + quantile * error / span]
    farther = math.log(SUPPORTED) / span  # beyond the second budget, in units of the span
    mean = after.mean + farther * (after.mean - before.mean)
    far, far_df = map(float, welch_error([farther * before.error, (1 + farther) * after.error],
                                         (before.df + 1, after.df + 1)))
    half = float(stdtrit(far_df, (1 + CONFIDENCE) / 2)) * far
    times = SUPPORTED * plan.second_multiple
    supported = mean + half <= plan.margin
    text = f"{arm}: {percent(before.mean)} on the first, {percent(after.mean)} on the second budget; slope " \
           f"{rate:+.4f} (95% CI {interval[0]:+.4f} to {interval[1]:+.4f}) in log tokens; predicted " \
           f"{percent(mean)} ({percent(mean - half)} to {percent(mean + half)}) at {times:g} times the " \
           f"tokens, {'supported' if supported else 'not supported'}; a conjecture beyond"
    return {"arm": arm, "slope": rate, "interval": interval, "predicted": mean, "tokens": times,
            "predicted_interval": [mean - half, mean + half], "supported": supported, "text": text}


def _outcome(story: Story, interval: tuple[int, int], winner: str | None, proof: dict | None,
             reason: str | None) -> dict:
    """Return the outcome, after the second budget if a count was proved."""
    proved = bool(proof and proof["proved"])
    second = _second_budget(story, proof["arm"]) if proved else []
    if proved and proof["arm"].startswith("even_"):  # a smaller count may have failed its proof
        interval = interval[0], max(interval[1], count_of(proof["arm"]))
    undecided = [{"arm": arm, "runs": story.asked.get((SEARCH, arm), 0)}
                 for arm, verdict in story.verdicts.items() if verdict == OPEN]
    found = {"fewest": story.plan.syncs_of(proof["arm"]) if proved else None, "proved": proved,
             "arm": proof["arm"] if proved else winner, "proof": proof, "count_interval": list(interval),
             "undecided": undecided, "second_budget": second, "reason": reason, "arms": _arms(story)}
    found["verdict"] = verdict_text(story.plan, found)
    story.note(PROOF if proof else SEARCH, "end", found["verdict"])
    return found


def verdict_text(plan: SearchPlan, found: dict) -> str:
    """Return the outcome as a sentence."""
    proof, (low, high) = found["proof"], found["count_interval"]
    if found["proved"]:
        placement = found["arm"].rpartition("_")[0] or found["arm"]
        text = f"fewest syncs within {100 * plan.within:g}%: {found['fewest']}" \
               f"{'' if placement == 'even' else f' ({placement})'}, proved {proof['estimate']}"
    elif found["reason"]:
        text = f"fewest syncs within {100 * plan.within:g}%: not found: {found['reason']}"
    else:
        text = f"fewest syncs within {100 * plan.within:g}%: {plan.syncs_of(found['arm'])} by the search, " \
               f"not proved"
        if proof and "estimate" in proof:
            text += f": {proof['estimate']} on fresh seeds for {proof['arm']}"
    even = "" if (found["arm"] or "even").startswith("even") else " of even placement"
    text += f"; 95% interval{even} {low}" + (f"–{high}" if high != low else "")
    for one in found["undecided"]:
        text += f"; {one['arm'].removeprefix('even_')} undecided after {one['runs']} runs"
    return text


def _arms(story: Story) -> list[dict]:
    """Return the estimates of all arms on the first budget, from all their runs."""
    rows = []
    for arm in dict.fromkeys(arm for stage, arm in story.asked if stage in (SEARCH, PROOF)):
        ratio, sample = story.ratio(arm, (SEARCH, PROOF)), story.sample(arm, (SEARCH, PROOF))
        if not sample.logs or ratio is None:
            continue
        base = arm == story.plan.baseline
        rows.append({"arm": arm, "runs": len(sample.logs), "loss": math.exp(sample.mean),
                     "ratio": 0.0 if base else ratio.mean,
                     "interval": [0.0, 0.0] if base else list(ratio.interval()),
                     "verdict": WITHIN if base else story.verdicts.get(arm, "control")})
    return rows

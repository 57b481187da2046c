"""When `auto` suspends the replicas from history in a layer: a rule that training and the simulator both call.

Replicas from history are fetched in every iteration, whether its micro-batches use them or are planned anew
(`replan.py`). A load that history cannot forecast pays for both. There it is cheaper to fetch none, and to plan every
micro-batch from its own counts alone. Whether a load is of that kind shows afterwards, so each layer is judged when the
counts of an iteration are known:

1. With history: the price of fetching its replicas, and in every micro-batch the tokens of the busiest rank with them,
   or with replicas planned anew and the price of those, whichever `replan.py` takes.
2. From exact counts alone: in every micro-batch the tokens of the busiest rank with the homes, or with replicas planned
   for its counts and their price.
3. What (2) would have saved, as a share of the iteration's tokens, is added to the layer's credit, which stays within
   10% either way. At +2% the replicas from history are suspended, at -2% they are resumed.

While they are suspended they are planned as before but not fetched, so that (1) is what they would have cost. The rule
uses counts, slots and prices, no clock: all ranks, a resumed run and a replay decide the same.

(2) needs a plan for every micro-batch, so it is only made where it can matter. At most the price of the fetch can be
saved: if that is below 1% of the iteration's tokens, history is good enough. And exact counts cost at least the mean,
and one transfer where the homes alone are not balanced: if that lifts the credit not even from its lower end, nothing
is planned either. A layer whose credit has reached either end is not judged in the next 5 to 9 iterations. How many is
drawn from its counts, so that not all layers are judged in the same iteration. Of many micro-batches a few are judged,
those that the history keeps. A layer whose homes move begins anew.

Example. Mean 1,000 tokens per rank, one micro-batch. The fetch of history's replicas costs 70 tokens, and the busiest
rank has 1,400 with them; replicas planned anew leave 1,000 and cost 110. With history: 70 + min(1400, 1000 + 110) =
1,180. From exact counts alone: 1,110. That saves 70 tokens, 7%: a layer with credit 0 is suspended at once, one with
credit -10%, because history has done well for long, after two such iterations that are judged. If the load then turns
predictable, so that the busiest rank has 1,000 with history's replicas, history costs 1,070, 4% less than 1,110: from
+7% the credit is +3%, -1% and -5%, and the third iteration resumes them.

Alternatives: two running sums compared with a margin decide alike on loads of one kind, and need both costs in every
iteration, where a bounded credit says beforehand that one of them cannot matter. The error of the forecast alone is no
measure: it does no harm where computation hides the fetch. To suspend single replicas saves little, because of those
that travel side by side the slowest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.kernels import Kernels
from megatron_smartmoe.placement.relayed_layer import early_tokens, home_ranks
from megatron_smartmoe.spec.arrays import IntArray
from megatron_smartmoe.spec.placement import hosts_of

MOST_CREDIT = 0.10  # of an iteration's tokens, either way: how long the past counts
# Credit at which a layer is suspended, and resumed where it is negative: no noise of 1% turns a layer twice.
TURN = 0.02
LEAST_REST = 5  # iterations for which a clear case is not judged, up to twice as many
ENOUGH = 0.01  # of an iteration's tokens that may be lost without notice, as `ReplanOptions.limit` has it


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How history has done in a layer.

    Attributes:
        credit: what planning from exact counts alone would have saved lately, in even loads of an iteration.
        suspended: whether the layer's replicas from history are not fetched.
        rest: iterations that are not judged from now on.
    """

    credit: float = 0.0
    suspended: bool = False
    rest: int = 0

    def after(self, saved: float, draw: int = 0) -> Standing:
        """After an iteration in which planning from exact counts alone would have saved so much.

        Args:
            saved: share of the iteration's tokens.
            draw: any number; decides within narrow limits how long a layer is not judged that is a clear case.
        """
        credit = min(max(self.credit + saved, -MOST_CREDIT), MOST_CREDIT)
        return Standing(
            credit=credit,
            suspended=credit > -TURN if self.suspended else credit >= TURN,
            rest=LEAST_REST + draw % LEAST_REST if abs(credit) == MOST_CREDIT else 0,
        )


@dataclass(frozen=True, kw_only=True)
class JudgedPrices:
    """What replicas cost, and when a layer is planned anew.

    Attributes:
        history: of an iteration's transfers of replicas from history.
        exact: of a micro-batch's transfers of those from exact counts.
        limit: max / mean tokens per rank up to which nothing is planned from exact counts.
    """

    history: TransferPrice
    exact: TransferPrice
    limit: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Fetched:
    """The replicas from history of a layer: the transfers that follow one another, inside nodes and between them."""

    steps: tuple[int, int]
    prices: JudgedPrices

    @property
    def most(self) -> float:
        """Their price if whatever hides transfers hides others first."""
        taken = (self.prices.exact.fetch.hidden_tokens, self.prices.exact.back.hidden_tokens)
        return self._exposed(taken, returns=True)

    def beside(self, anew: _Anew | None, *, returns: bool) -> float:
        """Their price in a micro-batch.

        Args:
            anew: the plan for its counts, if it is used: what hides its transfers does not hide the others as well.
            returns: whether their gradients go home, because another micro-batch has used them.
        """
        if anew is None:
            return self._exposed((0.0, 0.0), returns=returns)
        fetch, back = (min(leg.carried(*anew.steps), leg.hidden_tokens) for leg in (anew.price.fetch, anew.price.back))
        return self._exposed((fetch, back), returns=returns)

    def _exposed(self, taken: tuple[float, float], *, returns: bool) -> float:
        def exposed(leg: LegPrice, taken_tokens: float) -> float:
            return max(0.0, leg.carried(*self.steps) - max(0.0, leg.hidden_tokens - taken_tokens))

        price = self.prices.history
        return exposed(price.fetch, taken[0]) + (exposed(price.back, taken[1]) if returns else 0.0)


@dataclass(frozen=True, kw_only=True)
class _Anew:
    """A plan for exactly the counts of a micro-batch.

    Attributes:
        busiest: tokens of the busiest rank.
        steps: transfers that follow one another, inside nodes and between them.
        expected: what they cost by the planners' price, which decides.
        price: the same with what hides them here.
    """

    busiest: int
    steps: tuple[int, int]
    expected: float
    price: TransferPrice

    @classmethod
    def of(cls, slots_RS: IntArray, home_slots: int, load_E: IntArray, price: TransferPrice, kernels: Kernels) -> _Anew:
        """Judge the slots.

        Weights from exact counts travel while home rows are computed. The planners' price takes half of a rank's tokens
        to be home rows; where a hot expert's home has all of its rows elsewhere, there are none.
        """
        num_ranks, hosts_ER = len(slots_RS), hosts_of(slots_RS, len(load_E))
        steps = kernels.relay(slots_RS, home_slots, price.num_nodes).steps_by_link(price.num_nodes)
        # Sources are not known here: every rank is one of as many tokens.
        counts_RE = load_E // num_ranks + (np.arange(num_ranks)[:, None] < load_E % num_ranks)
        tokens_ER = kernels.split(counts_RE, hosts_ER)
        early = early_tokens(tokens_ER.astype(np.float64), home_ranks(slots_RS, home_slots), hosts_ER)
        share = min(1.0, early / (float(load_E.sum()) / num_ranks / 2))
        fetch = replace(price.fetch, hidden_tokens=price.fetch.hidden_tokens * share)
        return cls(
            busiest=int(tokens_ER.sum(axis=0).max()),
            steps=steps,
            expected=price.tokens(*steps),
            price=replace(price, fetch=fetch),
        )

    @property
    def decided_by(self) -> float:
        """Tokens that the plan is compared with others by."""
        return self.busiest + self.expected

    @property
    def cost(self) -> float:
        """Tokens that it takes."""
        return self.busiest + self.price.tokens(*self.steps)


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """A layer and micro-batch, in tokens of the busiest rank.

    Attributes:
        load_E: tokens of each expert.
        mean: per rank.
        homes: with the homes alone.
        history: with the replicas from history.
    """

    load_E: IntArray
    mean: float
    homes: int
    history: int

    def least(self, prices: JudgedPrices) -> float:
        """What planning from its counts alone costs at least."""
        if self.homes <= prices.limit * self.mean:
            return float(self.homes)
        return min(float(self.homes), self.mean + min(prices.exact.tokens(1, 0), prices.exact.tokens(0, 1)))


def saved_by_exact(
    credit: float,
    load_ME: IntArray,
    rank_tokens: float,
    slots_RS: IntArray,
    home_slots: int,
    prices: JudgedPrices,
    plan: Callable[[IntArray], IntArray],
    kernels: Kernels,
) -> float:
    """What planning a layer from exact counts alone would have saved in an iteration, as a share of its tokens.

    Args:
        credit: the layer's so far; see `Standing`.
        load_ME: tokens of each expert in micro-batches of the iteration, some of them or all.
        rank_tokens: mean tokens per rank of the whole iteration.
        slots_RS: homes, and the replicas that history had or would have had.
        home_slots: columns of homes, E / R.
        prices: of both kinds of replicas.
        plan: returns slots with replicas for exactly the tokens of each expert that it is called with.
        kernels: what judges the slots.
    """
    steps = kernels.relay(slots_RS, home_slots, prices.history.num_nodes).steps_by_link(prices.history.num_nodes)
    if not any(steps) or not load_ME.any():
        return 0.0  # no replicas from history, or nothing to judge them by: both ways are the same
    # Step 1: what can be saved is at most the price of the fetch.
    fetched = _Fetched(steps=steps, prices=prices)
    if fetched.most <= ENOUGH * rank_tokens:
        return -ENOUGH
    # Step 2: whether that much could change anything.
    micros = _micro_batches(load_ME, slots_RS, home_slots, kernels)
    scale = rank_tokens / sum(micro.mean for micro in micros)  # to all micro-batches of the iteration
    may_save = sum(micro.history - micro.least(prices) for micro in micros) * scale
    is_short_M = [micro.history > prices.limit * micro.mean for micro in micros]  # where others may be planned anew
    fetch = sum(fetched.most if short else fetched.beside(None, returns=True) for short in is_short_M) / len(micros)
    most = (fetch + may_save) / rank_tokens
    if credit + most <= -MOST_CREDIT:
        return most
    # Step 3: plan every micro-batch from its counts.
    return _saved(micros, fetched, home_slots, plan, kernels, scale) / rank_tokens


def _micro_batches(load_ME: IntArray, slots_RS: IntArray, home_slots: int, kernels: Kernels) -> list[_MicroBatch]:
    hosts_ER, homes_RH = hosts_of(slots_RS, load_ME.shape[1]), slots_RS[:, :home_slots]
    return [
        _MicroBatch(
            load_E=load_E,
            mean=float(load_E.sum()) / len(slots_RS),
            homes=int(load_E[homes_RH].sum(axis=1).max()),
            history=kernels.busiest(hosts_ER, load_E),
        )
        for load_E in load_ME
        if load_E.any()
    ]


def _saved(
    micros: list[_MicroBatch],
    fetched: _Fetched,
    home_slots: int,
    plan: Callable[[IntArray], IntArray],
    kernels: Kernels,
    scale: float,
) -> float:
    """Tokens of the busiest rank that planning from exact counts alone would have saved in an iteration."""
    limit, saved = fetched.prices.limit, 0.0
    used = list[_Anew | None]()  # instead of the replicas from history
    for micro in micros:
        if micro.homes <= limit * micro.mean:  # no replicas are planned from these counts
            used.append(None)
            saved += micro.history - micro.homes
            continue
        anew = _Anew.of(plan(micro.load_E), home_slots, micro.load_E, fetched.prices.exact, kernels)
        alone = anew.cost if anew.decided_by < micro.homes else float(micro.homes)
        stays = micro.history <= limit * micro.mean or micro.history <= anew.decided_by
        used.append(None if stays else anew)
        saved += (micro.history if stays else anew.cost) - alone
    returns = None in used
    kept = sum(fetched.beside(anew, returns=returns) for anew in used) / len(used)
    return kept + saved * scale

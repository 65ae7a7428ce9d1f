"""The expected costs of a search's runs."""

from collections.abc import Callable

from experiments.campaign import Costs, Run
from experiments.search_evidence import SEARCH, SENSITIVITY

EVALUATIONS_MARGIN = 3.0  # multiple of its expected cost that the run of drop_syncs.py may take


class SearchCosts(Costs):
    """Costs that need no probe: a run whose cost is unknown reserves the most that a run may take."""

    def __init__(self, tokens: Callable[[str], float], per_run: float):
        super().__init__(tokens)
        self.per_run = per_run

    def add(self, stage: str, variant: str, cost: float) -> None:
        if stage != SENSITIVITY:  # which says nothing about training
            super().add(stage, variant, cost)

    def expected(self, run: Run) -> float | None:
        """Return the expected cost, see Costs; for the run of drop_syncs.py that of a training run."""
        if run.stage != SENSITIVITY:
            return super().expected(run)
        return max((max(costs) for (stage, _), costs in self.measured.items() if stage == SEARCH),
                   default=None)

    def reserved(self, run: Run) -> float:
        expected = self.expected(run)
        if expected is None:
            return self.per_run
        if run.stage == SENSITIVITY:
            return min(EVALUATIONS_MARGIN * expected, self.per_run)
        return self.MARGIN * expected

"""The expected costs of a search's runs."""

from collections.abc import Callable

from experiments.campaign import Costs, Run


class SearchCosts(Costs):
    """Costs that need no probe: a run whose cost is unknown reserves the most that a run may take."""

    def __init__(self, tokens: Callable[[str], float], per_run: float):
        super().__init__(tokens)
        self.per_run = per_run

    def reserved(self, run: Run) -> float:
        found = super().reserved(run)
        return self.per_run if found is None else found

"""The first candidate: a selector."""

from glua_bench.selection import Selector


class First(Selector):
    """The first checkpoint that is offered."""

    name = "first"
    reference = "baseline"
    needs = "nothing"

    def score(self, candidate):
        """Less for every step."""
        return -float(candidate.step)

"""What a search for the best line through each group of weights tries, in the kernel as in torch."""

from __future__ import annotations

from typing import NamedTuple


class Search(NamedTuple):
    """Starts and rounds of a search.

    Attributes:
        low: Smallest clip of the group's range, as a factor on either side.
        high: Largest clip.
        clips: How many from `low` to `high`; every pair of a lower and an upper one is a start.
        rounds: Roundings and refits from each start.
        last_rounds: More of them from the best line met.
    """

    low: float
    high: float
    clips: int
    rounds: int = 2
    last_rounds: int = 3

    def starts(self) -> list[float]:
        """The clips."""
        step = (self.high - self.low) / (self.clips - 1)
        return [self.low + step * i for i in range(self.clips)]

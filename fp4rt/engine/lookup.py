"""Guesses at what comes next: what followed where the newest tokens stood before (prompt lookup, Saxena 2023)."""

from __future__ import annotations

LONGEST, SHORTEST = 3, 2  # of the newest tokens, how many must have stood there before


class Lookup:
    """Where each run of a few tokens was last seen in a growing text; work per token does not grow with the text."""

    def __init__(self) -> None:
        self._known = 0  # tokens whose predecessors are in `_after`
        self._after: dict[tuple[int, ...], int] = {}

    def guess(self, ids: list[int], most: int) -> list[int]:
        """`most` ids that may follow, or none; `ids` begins as it did at the last call.

        Where the earlier place is so near that the text ends before, it goes on with what was guessed.
        """
        for end in range(max(self._known, SHORTEST), len(ids)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(ids[end - length:end])] = end
        self._known = len(ids)
        for length in range(LONGEST, SHORTEST - 1, -1):
            found = self._after.get(tuple(ids[-length:]))
            if found is not None:
                guessed = ids[found:found + most]
                while len(guessed) < most:
                    guessed.append(guessed[len(guessed) - (len(ids) - found)])
                return guessed
        return []

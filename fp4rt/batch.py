"""One step's work on one flat token axis: which tokens, of which sequences, where they are remembered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAGE_TOKENS = 64  # tokens per K/V page, the same for every layer and backend


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, all int32 numpy arrays. Prefill, a chunk of it, decode and any mix are one shape.

    tokens     [T]     token ids; sequence s owns starts[s]:starts[s+1]
    positions  [T]     absolute position of each token in its sequence
    starts     [S+1]   where each sequence begins on the token axis
    lengths    [S]     tokens remembered once this step is done (context before it plus its own tokens)
    pages      [G, S, P]  page numbers; for layers of page group g, token p of sequence s lives in page
                       pages[g, s, p // PAGE_TOKENS]; page 0 is nobody's and stands where no query looks any more
    slots      [S]     where each sequence's recurrent state lives; slot 0 is nobody's
    rows       [R]     the token rows whose logits are wanted
    """

    tokens: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    pages: np.ndarray
    slots: np.ndarray
    rows: np.ndarray

    @property
    def is_decode(self) -> bool:
        """One new token for every sequence, and every row's logits wanted."""
        return len(self.tokens) == len(self.lengths) == len(self.rows)

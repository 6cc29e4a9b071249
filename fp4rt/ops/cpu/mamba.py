"""The Mamba2 recurrence as compiled functions: the convolution over channels, the state space over heads."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fp4rt.ops.cpu.runtime import compiled


@njit(fastmath={"reassoc", "contract"})
def _advance(state, decay, amount, B, C):
    """One row of a head's state, [state_size]: S <- decay S + amount B; returns S . C."""
    total = np.float32(0)
    for n in range(len(state)):
        state[n] = decay * state[n] + amount * B[n]
        total += state[n] * C[n]
    return total


@compiled(parallel=True)
def convolve(xbc, starts, positions, slots, state, weight, bias, out, threads):
    """Causal depthwise convolution and SiLU over [T, width]; the last inputs of each sequence stay in its slot.

    state: float32 [slots, width, kernel - 1]. weight [width, kernel], of which the last multiplies the newest input.
    """
    width, kernel = weight.shape
    for share in prange(threads):
        for s in range(len(starts) - 1):
            kept = state[slots[s]]
            for c in range(share * width // threads, (share + 1) * width // threads):
                if positions[starts[s]] == 0:
                    kept[c] = 0
                for t in range(starts[s], starts[s + 1]):
                    total = bias[c] + weight[c, kernel - 1] * xbc[t, c]
                    for j in range(kernel - 1):
                        total += weight[c, j] * kept[c, j]
                    for j in range(kernel - 2):
                        kept[c, j] = kept[c, j + 1]
                    kept[c, kernel - 2] = xbc[t, c]
                    out[t, c] = total / (np.float32(1) + np.exp(-total))


@compiled(parallel=True)
def scan(x, B, C, dt, starts, positions, slots, state, A, D, out, threads):
    """S <- exp(dt A) S + dt x B^T and y = S C + D x for every head, token after token.

    x, out: float32 [T, heads, head_dim]. B, C [T, groups, state_size]. dt [T, heads]. state: float32 [slots, heads,
    head_dim, state_size], from zero where a sequence begins.
    """
    heads, dim = x.shape[1], x.shape[2]
    per_group = heads // B.shape[1]
    for share in prange(threads):
        for s in range(len(starts) - 1):
            for h in range(share * heads // threads, (share + 1) * heads // threads):
                head, group = state[slots[s], h], h // per_group
                if positions[starts[s]] == 0:
                    head[:] = 0
                for t in range(starts[s], starts[s + 1]):
                    decay = np.exp(dt[t, h] * A[h])
                    for p in range(dim):
                        out[t, h, p] = D[h] * x[t, h, p] + _advance(head[p], decay, dt[t, h] * x[t, h, p], B[t, group],
                                                                   C[t, group])

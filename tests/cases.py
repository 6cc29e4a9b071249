"""The shapes every backend is checked on, and the benchmark times: one list per operation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.formats import Dense, Fp8, Nvfp4, Weight
from fp4rt.formats.dense import float32_to_bf16
from fp4rt.ops import AttentionShape


def nvfp4(rng: np.random.Generator, n: int, k: int, **extra) -> Nvfp4:
    """All sixteen codes, a different scale in every block (subnormals and an extreme among them), its own global scale."""
    codes = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(0x28, 0x58, (n, k // 16), np.uint8)
    scales.flat[:: 7] = rng.integers(1, 8, scales.flat[::7].shape, np.uint8)  # subnormal
    scales.flat[3] = 0x70
    return Nvfp4("w", codes, scales, float(rng.uniform(0.5, 2) * 2.0**-6 / np.sqrt(k)), **extra)


def fp8(rng: np.random.Generator, n: int, k: int, block: tuple[int, int] | None = None, **extra) -> Fp8:
    """Every finite E4M3 code; scales per tensor unless `block` says otherwise."""
    codes = rng.integers(0, 255, (n, k), np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x08
    block = block or (n, k)
    shape = -(-n // block[0]), -(-k // block[1])
    return Fp8("w", codes, (rng.uniform(0.5, 2, shape) / 200 / np.sqrt(k)).astype(np.float32), block, **extra)


def dense(rng: np.random.Generator, n: int, k: int, dtype: str, **extra) -> Dense:
    values = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
    data = {"BF16": float32_to_bf16, "F16": lambda v: v.astype(np.float16), "F32": lambda v: v}[dtype](values)
    return Dense("w", dtype, data, **extra)


def make_weight(rng: np.random.Generator, kind: str, n: int, k: int, **extra) -> Weight:
    """kind: NVFP4, FP8, FP8/channel, FP8/128x128 (any block), BF16, F16, F32."""
    if kind == "NVFP4":
        return nvfp4(rng, n, k, **extra)
    if kind.startswith("FP8"):
        _, _, block = kind.partition("/")
        edges = {"": None, "channel": (1, k)}.get(block) or (block and tuple(map(int, block.split("x")))) or None
        return fp8(rng, n, k, edges, **extra)
    return dense(rng, n, k, kind, **extra)


@dataclass(frozen=True)
class LinearCase:
    """A linear: T tokens, parts (kind, rows), K columns; what stands before and behind it."""

    tokens: int
    parts: tuple[tuple[str, int], ...]
    k: int
    gated: bool = False
    norm: bool = False
    residual: bool = False
    bias: bool = False
    pre_quant_scale: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("gated", "norm", "residual", "bias", "pre_quant_scale")
                        if getattr(self, name))
        return f"{self.tokens}x{'+'.join(f'{kind}:{n}' for kind, n in self.parts)}x{self.k}{flags}"

    def build(self, seed: int = 0):
        """(parts, x float32 [T, K], norm (weight, eps) or None, residual [T, N] or None)."""
        rng = np.random.default_rng(seed)
        parts = [make_weight(rng, kind, n, self.k,
                             bias=rng.standard_normal(n).astype(np.float32) if self.bias else None,
                             pre_quant_scale=rng.uniform(0.5, 2, self.k).astype(np.float32)
                             if self.pre_quant_scale else None) for kind, n in self.parts]
        x = rng.standard_normal((self.tokens, self.k)).astype(np.float32)
        norm = (rng.uniform(0.5, 1.5, self.k).astype(np.float32), 1e-5) if self.norm else None
        rows = sum(n for _, n in self.parts)
        residual = rng.standard_normal((self.tokens, rows)).astype(np.float32) if self.residual else None
        return parts, x, norm, residual


KINDS = ("NVFP4", "FP8", "FP8/channel", "FP8/128x128", "FP8/32x48", "BF16", "F16", "F32")

LINEAR = [
    *[LinearCase(t, ((kind, 100), ), 432) for kind in KINDS for t in (1, 3, 8, 9, 70)],       # odd N, K tail
    *[LinearCase(t, ((kind, 64), (kind, 16), (kind, 16)), 144, norm=True) for kind in KINDS for t in (1, 5, 33)],
    *[LinearCase(t, ((kind, 208), (kind, 208)), 96, gated=True, norm=True) for kind in KINDS for t in (1, 8, 40)],
    *[LinearCase(t, ((kind, 96), ), 208, residual=True) for kind in KINDS for t in (2, 17)],
    *[LinearCase(t, ((kind, 56), ), 128, bias=True) for kind in ("NVFP4", "FP8", "BF16") for t in (1, 20)],
    *[LinearCase(t, ((kind, 72), ), 272, pre_quant_scale=True, residual=True) for kind in ("NVFP4", "FP8", "BF16")
      for t in (1, 24)],
    *[LinearCase(t, (("NVFP4", 64), ("FP8", 32), ("BF16", 32)), 160, norm=True, bias=True) for t in (1, 6, 20)],
    *[LinearCase(t, (("NVFP4", 80), ("BF16", 80)), 64, gated=True, norm=True) for t in (1, 20)],
    *[LinearCase(t, (("NVFP4", 1040), ), 2048, norm=True) for t in (1, 4, 8, 128)],
    *[LinearCase(t, (("BF16", 323), ), 112, norm=True) for t in (1, 12)],                      # odd vocabulary, K % 16
    *[LinearCase(t, (("BF16", 50), ), 99) for t in (1, 12)],                                   # odd K
]


@dataclass(frozen=True)
class AttentionCase:
    """Sequences as (tokens already remembered, new tokens); sizes of the layer."""

    sequences: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    norm: bool = False
    rope: bool = True

    def __str__(self) -> str:
        seqs = ",".join(f"{old}+{new}" for old, new in self.sequences[:4])
        extras = f"{'-w' + str(self.window) if self.window else ''}{'-norm' if self.norm else ''}"
        return f"{seqs}{'...' if len(self.sequences) > 4 else ''}-h{self.heads}/{self.kv_heads}x{self.head_dim}{extras}"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.window)

    def batches(self) -> tuple[Batch | None, Batch, int]:
        """(a batch that fills in what is remembered, the batch under test, number of pages); pages are scattered."""
        rng = np.random.default_rng(1)
        needed = [-(-(old + new) // PAGE_TOKENS) for old, new in self.sequences]
        num_pages = 1 + sum(needed) + 3
        order, taken = rng.permutation(np.arange(1, num_pages)), 0
        table = np.zeros((len(needed), max(needed)), np.int32)
        for s, count in enumerate(needed):
            table[s, :count] = order[taken:taken + count]
            taken += count
        filling = [(s, 0, old) for s, (old, _) in enumerate(self.sequences) if old]
        return (make_batch(filling, table) if filling else None,
                make_batch([(s, old, new) for s, (old, new) in enumerate(self.sequences)], table), num_pages)


def make_batch(work: list[tuple[int, int, int]], table: np.ndarray, vocab: int = 100) -> Batch:
    """A Batch of (row of the page table, tokens before, new tokens); logits of each sequence's last token."""
    counts = [new for _, _, new in work]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(old, old + new) for _, old, new in work]).astype(np.int32)
    return Batch(tokens=(positions * 7 % vocab).astype(np.int32), positions=positions, starts=starts,
                 lengths=np.array([old + new for _, old, new in work], np.int32),
                 pages=table[None, [s for s, _, _ in work]], slots=np.zeros(len(work), np.int32), rows=(starts[1:] - 1).astype(np.int32))


ATTENTION = [
    AttentionCase(((0, 1),), 4, 2, 32),
    AttentionCase(((0, 5),), 4, 4, 16, norm=True),
    AttentionCase(((0, 130),), 8, 2, 64),
    AttentionCase(((0, 200),), 8, 1, 128, norm=True),
    AttentionCase(((63, 1),), 4, 1, 64),
    AttentionCase(((64, 1),), 4, 1, 64),
    AttentionCase(((700, 1),), 6, 2, 128),
    AttentionCase(((300, 1), (5, 1), (64, 1), (0, 1), (1000, 1)), 8, 2, 64, norm=True),
    AttentionCase(((100, 40), (0, 7), (511, 1), (256, 65)), 8, 2, 128),
    AttentionCase(((100, 40), (0, 70), (511, 1)), 4, 2, 32, window=8),
    AttentionCase(((900, 1), (30, 1), (77, 1)), 4, 2, 64, window=100),
    AttentionCase(((600, 300),), 4, 1, 64, window=128, norm=True),
    AttentionCase(((20, 30), (90, 1)), 3, 3, 80),
    AttentionCase(((20, 30), (90, 1)), 12, 4, 96),
    AttentionCase(((70, 50), (300, 1)), 4, 2, 256),
    AttentionCase(((40, 9), (80, 1)), 4, 2, 48, rope=False),
    AttentionCase(tuple((37 * i % 301, 1) for i in range(8)), 8, 2, 64),
    AttentionCase(tuple((91 * i % 701, 1) for i in range(33)), 4, 1, 32),
    AttentionCase(((5000, 1), (4090, 20)), 8, 2, 128),
]

"""The shapes every backend is checked on, and the benchmark times: one list per operation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.formats import Dense, Fp8, Mxfp4, Nvfp4, Weight
from fp4rt.formats.dense import float32_to_bf16
from fp4rt.ops import AttentionShape, MambaShape, Routing


def nvfp4(rng: np.random.Generator, n: int, k: int, **extra) -> Nvfp4:
    """All sixteen codes, a different scale in every block (subnormals and an extreme among them), its own global scale."""
    codes = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(0x28, 0x58, (n, k // 16), np.uint8)
    scales.flat[:: 7] = rng.integers(1, 8, scales.flat[::7].shape, np.uint8)  # subnormal
    scales.flat[3] = 0x70
    return Nvfp4("w", codes, scales, float(rng.uniform(0.5, 2) * 2.0**-6 / np.sqrt(k)), **extra)


def mxfp4(rng: np.random.Generator, n: int, k: int, **extra) -> Mxfp4:
    """All sixteen codes; scales of a row within 2^-30 of its largest, rows far apart; a block of zeros with a large one."""
    codes = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = 127 - round(np.log2(k) / 2) - rng.integers(0, 7, (n, k // 32)) + rng.integers(-3, 3, (n, 1))
    scales.flat[::11] -= 24
    codes[n // 2, :16], scales[n // 2, 0] = 0x80, 200
    return Mxfp4("w", codes, scales.astype(np.uint8), **extra)


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
    """kind: NVFP4, MXFP4, FP8, FP8/channel, FP8/128x128 (any block), BF16, F16, F32."""
    if kind == "NVFP4":
        return nvfp4(rng, n, k, **extra)
    if kind == "MXFP4":
        return mxfp4(rng, n, k, **extra)
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
    *[LinearCase(8, (("NVFP4", 48), ), k, residual=True, bias=True) for k in (14336, 8992)],  # blocks share rows
    *[LinearCase(t, (("NVFP4", 1700), ), 14336) for t in (1, 3, 8)],                          # and take turns to write
    *[LinearCase(t, (("BF16", 323), ), 112, norm=True) for t in (1, 12)],                      # odd vocabulary, K % 16
    *[LinearCase(t, (("BF16", 50), ), 99) for t in (1, 12)],                                   # odd K
    *[LinearCase(t, (("MXFP4", 100), ), 416) for t in (1, 3, 8, 9, 70)],
    *[LinearCase(t, (("MXFP4", 208), ("MXFP4", 208)), 96, gated=True, norm=True) for t in (1, 8, 40)],
    *[LinearCase(t, (("MXFP4", 96), ), 2080, residual=True, bias=True) for t in (2, 17)],
]

# An activation and the linear that it stands behind.
ACTIVATED = [
    *[(name, LinearCase(t, (("NVFP4", 88), ("NVFP4", 88)), 160, gated=True, norm=True, bias=True))
      for name in ("silu", "gelu_tanh", "swiglu_oai") for t in (1, 8, 40)],
    *[(name, LinearCase(t, (("NVFP4", 48), ("BF16", 48)), 160, gated=True)) for name in ("gelu_tanh", "swiglu_oai")
      for t in (1, 20)],
    *[("relu2", LinearCase(t, ((kind, 100), ), 160, norm=True, bias=True)) for kind in ("NVFP4", "FP8", "BF16")
      for t in (1, 20)],
]


@dataclass(frozen=True)
class RouteCase:
    """A router over T tokens of width K."""

    tokens: int
    k: int
    routing: Routing
    kind: str = "BF16"
    norm: bool = False
    bias: bool = False
    correction: bool = False
    expert_scale: bool = False

    def __str__(self) -> str:
        r = self.routing
        groups = f"-{r.groups_kept}of{r.groups}" if r.groups > 1 else ""
        always = f"+{r.always}" if r.always else ""
        return f"{self.tokens}x{self.k}-{r.top_k}of{r.num_experts}{always}-{r.scoring}{groups}{'-norm' * self.norm}"

    def build(self):
        """(router weight, x float32 [T, K], norm or None, correction [E] or None, expert_scale [E] or None)."""
        rng = np.random.default_rng(5)
        experts = self.routing.num_experts
        bias = rng.standard_normal(experts).astype(np.float32) if self.bias else None
        weight = make_weight(rng, self.kind, experts, self.k, bias=bias)
        x = rng.standard_normal((self.tokens, self.k)).astype(np.float32)
        norm = (rng.uniform(0.5, 1.5, self.k).astype(np.float32), 1e-5) if self.norm else None
        return (weight, x, norm, rng.uniform(-0.3, 0.3, experts).astype(np.float32) if self.correction else None,
                rng.uniform(0.5, 2, experts).astype(np.float32) if self.expert_scale else None)


ROUTE = [
    *[RouteCase(t, 96, Routing(128, 8), norm=True) for t in (1, 7, 40)],
    *[RouteCase(t, 160, Routing(32, 4), bias=True) for t in (1, 40)],                                # gpt-oss
    *[RouteCase(t, 112, Routing(128, 8), expert_scale=True, norm=True) for t in (3, 20)],            # Gemma 4
    *[RouteCase(t, 160, Routing(512, 22, "sigmoid", scaling=5.0), "F32", correction=True) for t in (1, 19)],
    *[RouteCase(t, 64, Routing(64, 6, "sigmoid", scaling=2.5, groups=8, groups_kept=3), "F32", correction=True)
      for t in (2, 33)],
    *[RouteCase(t, 2880, Routing(32, 4), norm=True, bias=True) for t in (1, 8)],
    *[RouteCase(t, 2688, Routing(128, 6, "sigmoid", scaling=2.5), "F32", norm=True, correction=True) for t in (1, 6)],
    *[RouteCase(t, 96, Routing(128, 6, "sigmoid", scaling=2.5, always=2), "F32", norm=True, correction=True)
      for t in (1, 8, 20)],                                                                          # Nemotron 3
    RouteCase(5, 64, Routing(16, 2, always=3), expert_scale=True),
    *[RouteCase(t, 99, Routing(20, 3, groups=5, groups_kept=2), norm=True) for t in (2, 8)],          # odd K
    *[RouteCase(t, 1024, Routing(512, 22, "sigmoid", scaling=5.0), "F32", norm=True, correction=True) for t in (1, 8)],
    RouteCase(5, 64, Routing(8, 2, normalize=False)),
    RouteCase(5, 64, Routing(6, 6, groups=6, groups_kept=6)),
    RouteCase(3, 64, Routing(33, 32, "sigmoid", normalize=False)),
    RouteCase(4, 64, Routing(1, 1)),
]


@dataclass(frozen=True)
class ExpertsCase:
    """T tokens that each take top_k of E experts, and all of them the last `always` of these, with weight 1:
    [hidden] -> [inner] -> [hidden], as `kind` and `down_kind`."""

    tokens: int
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    kind: str = "NVFP4"
    down_kind: str | None = None
    activation: str = "silu"
    bias: bool = False
    norm: bool = True
    residual: bool = True
    pre_quant_scale: bool = False
    always: int = 0

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("bias", "norm", "residual", "pre_quant_scale") if getattr(self, name))
        return (f"{self.tokens}x{self.top_k}of{self.num_experts}{f'-{self.always}always' if self.always else ''}"
                f"-{self.hidden}-{self.inner}-{self.kind}"
                f"{'+' + self.down_kind if self.down_kind else ''}-{self.activation}{flags}")

    def build(self):
        """(up, down: for each expert its parts; x float32 [T, hidden]; ids int32 and weights float32 [T, k];
        norm (weight, eps) or None; residual [T, hidden] or None)."""
        rng = np.random.default_rng(7)

        def parts(kind: str, count: int, n: int, k: int) -> list[Weight]:
            prescale = rng.uniform(0.5, 2, k).astype(np.float32) if self.pre_quant_scale else None
            return [make_weight(rng, kind, n, k, pre_quant_scale=prescale,
                                bias=rng.standard_normal(n).astype(np.float32) if self.bias else None)
                    for _ in range(count)]

        up = [parts(self.kind, 1 if self.activation == "relu2" else 2, self.inner, self.hidden)
              for _ in range(self.num_experts)]
        down = [parts(self.down_kind or self.kind, 1, self.hidden, self.inner) for _ in range(self.num_experts)]
        x = rng.standard_normal((self.tokens, self.hidden)).astype(np.float32)
        routed, chosen = self.num_experts - self.always, self.top_k - self.always
        popular = np.arange(routed) < max(chosen, routed // 2)  # some experts have no tokens
        ids = np.array([[*rng.permutation(np.flatnonzero(popular) if t % 3 else routed)[:chosen],
                         *range(routed, self.num_experts)] for t in range(self.tokens)], np.int32)
        weights = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
        weights /= weights[:, :chosen].sum(axis=1, keepdims=True)
        weights[:, chosen:] = 1
        norm = (rng.uniform(0.5, 1.5, self.hidden).astype(np.float32), 1e-5) if self.norm else None
        residual = rng.standard_normal(x.shape).astype(np.float32) if self.residual else None
        return up, down, x, ids, weights, norm, residual


# More than 8 tokens, but few for each expert.
SPREAD_EXPERTS = [
    *[ExpertsCase(t, 40, 4, 160, 112) for t in (10, 16, 23, 60)],
    ExpertsCase(20, 8, 2, 1600, 96, "MXFP4", activation="swiglu_oai", bias=True),  # of four warps, and of two
    ExpertsCase(37, 30, 3, 160, 112, activation="gelu_tanh", residual=False),
    ExpertsCase(13, 48, 22, 112, 80, activation="relu2", norm=False, residual=False),
    *[ExpertsCase(12, 12, 3, 96, 112, kind) for kind in ("FP8", "FP8/channel", "FP8/128x128", "BF16", "F16", "F32")],
    ExpertsCase(13, 12, 2, 96, 80, "NVFP4", "BF16", pre_quant_scale=True), ExpertsCase(11, 12, 2, 99, 50, "BF16"),
    ExpertsCase(30, 34, 5, 160, 112, activation="relu2", always=2),  # four blocks of one expert
]
EXPERTS = [
    *SPREAD_EXPERTS,
    *[ExpertsCase(t, 8, 2, 96, 80) for t in (1, 2, 8, 9, 40, 300)],
    *[ExpertsCase(t, 16, 4, 160, 112, residual=False) for t in (1, 5, 33)],
    *[ExpertsCase(t, 8, 4, 96, 96, "MXFP4", activation="swiglu_oai", bias=True) for t in (1, 7, 70)],
    *[ExpertsCase(t, 5, 3, 160, 112, "NVFP4", activation="gelu_tanh", residual=False) for t in (2, 20)],
    *[ExpertsCase(t, 40, 22, 112, 80, activation="relu2", norm=False, residual=False) for t in (1, 8, 11)],
    *[ExpertsCase(t, 6, 3, 96, 112, kind) for kind in ("FP8", "FP8/channel", "FP8/128x128", "BF16", "F16", "F32")
      for t in (3, 21)],
    *[ExpertsCase(t, 6, 2, 96, 80, "NVFP4", "BF16", pre_quant_scale=True) for t in (2, 30)],
    *[ExpertsCase(t, 6, 2, 99, 50, "BF16") for t in (2, 30)],                                        # odd K
    *[ExpertsCase(t, 6, 4, 2304, 1600, "MXFP4", activation="swiglu_oai", bias=True) for t in (1, 8)],
    *[ExpertsCase(t, 12, 6, 1536, 1552, activation="relu2") for t in (1, 8)],  # 97 row tiles, of several warps' columns
    *[ExpertsCase(t, 18, 5, 160, 112, activation="relu2", always=2) for t in (1, 8, 9, 70)],         # Nemotron 3
    ExpertsCase(8, 7, 4, 96, 80, "NVFP4", "BF16", pre_quant_scale=True, residual=False, always=1),
    ExpertsCase(1100, 7, 5, 160, 208, activation="relu2", always=2), ExpertsCase(1030, 4, 3, 96, 128, "FP8", always=1),
    ExpertsCase(4, 1, 1, 512, 1040), ExpertsCase(100, 1, 1, 512, 1040), ExpertsCase(600, 4, 4, 2048, 768),
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
    sinks: bool = False
    v_norm: bool = False
    values_are_keys: bool = False
    fp8_scales: tuple[float, float] | None = None

    def __str__(self) -> str:
        seqs = ",".join(f"{old}+{new}" for old, new in self.sequences[:4])
        extras = f"{'-w' + str(self.window) if self.window else ''}{'-norm' if self.norm else ''}"
        extras += "".join(f"-{name}" for name in ("sinks", "v_norm", "values_are_keys") if getattr(self, name))
        extras += "-fp8" if self.fp8_scales else ""
        return f"{seqs}{'...' if len(self.sequences) > 4 else ''}-h{self.heads}/{self.kv_heads}x{self.head_dim}{extras}"

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.heads, self.kv_heads, self.head_dim, self.head_dim**-0.5, self.window,
                              self.values_are_keys, fp8_scales=self.fp8_scales)

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
    # Without norm and rotation, so that what is stored is rounded from the same number by every backend.
    AttentionCase(((0, 130), (700, 1), (63, 1), (64, 9)), 8, 2, 128, rope=False, fp8_scales=(0.02, 0.011)),
    AttentionCase(((100, 40), (300, 1), (0, 1)), 4, 2, 48, rope=False, window=100, fp8_scales=(0.004, 0.003)),  # saturates
    AttentionCase(((600, 1), (17, 5)), 8, 1, 64, rope=False, fp8_scales=(1.0, 1.0)),
    AttentionCase(((70, 50), (300, 1)), 4, 2, 256, rope=False, values_are_keys=True, fp8_scales=(0.05, 0.04)),
]


@dataclass(frozen=True)
class MambaCase:
    """Sequences as (tokens already taken, new tokens); sizes of the mixer."""

    sequences: tuple[tuple[int, int], ...]
    heads: int
    head_dim: int
    groups: int
    state: int
    conv_kernel: int = 4

    def __str__(self) -> str:
        seqs = ",".join(f"{old}+{new}" for old, new in self.sequences[:4])
        return (f"{seqs}{'...' if len(self.sequences) > 4 else ''}-h{self.heads}x{self.head_dim}-g{self.groups}"
                f"-s{self.state}-k{self.conv_kernel}")

    @property
    def shape(self) -> MambaShape:
        return MambaShape(self.heads, self.head_dim, self.groups, self.state, self.conv_kernel)

    def weight(self) -> dict[str, np.ndarray]:
        """What ops.mamba_weight takes: heads that remember a few tokens, and heads that remember a thousand."""
        rng, shape = np.random.default_rng(5), self.shape
        dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.3), self.heads))
        values = dict(conv=rng.uniform(-1, 1, (shape.conv_width, self.conv_kernel)) / self.conv_kernel**0.5,
                      conv_bias=rng.uniform(-0.5, 0.5, shape.conv_width), A=-rng.uniform(1, 16, self.heads),
                      D=rng.uniform(-1, 2, self.heads), dt_bias=np.log(np.expm1(dt)),
                      norm=rng.uniform(0.5, 2, shape.inner))
        return {name: value.astype(np.float32) for name, value in values.items()}

    def batches(self) -> tuple[Batch | None, Batch]:
        """(a batch of what is taken already, the batch under test); slots are scattered."""
        slots = 1 + np.random.default_rng(2).permutation(len(self.sequences)).astype(np.int32)
        table = np.zeros((len(self.sequences), 1), np.int32)

        def batch(work: list[tuple[int, int, int]]) -> Batch:
            made = make_batch(work, table)
            return Batch(**{**made.__dict__, "slots": slots[[s for s, _, _ in work]]})

        filling = [(s, 0, old) for s, (old, _) in enumerate(self.sequences) if old]
        return (batch(filling) if filling else None,
                batch([(s, old, new) for s, (old, new) in enumerate(self.sequences)]))


MAMBA = [
    MambaCase(((0, 1),), 4, 40, 2, 16),
    MambaCase(((0, 37),), 8, 64, 2, 128),
    MambaCase(((0, 1500),), 4, 64, 1, 128),
    MambaCase(((1200, 1),), 4, 64, 4, 64),
    MambaCase(((3, 1), (2, 1), (0, 1), (1, 1), (100, 1)), 6, 80, 3, 32, 4),
    MambaCase(((0, 33), (17, 1), (2, 16), (1, 2), (64, 100)), 8, 40, 2, 32),
    MambaCase(((5, 9), (0, 3)), 4, 128, 2, 256),
    MambaCase(((2, 1), (1, 5)), 3, 100, 1, 20, 2),
    MambaCase(((1, 1), (7, 4)), 2, 48, 2, 50, 6),
    MambaCase(((0, 3), (4, 1)), 40, 64, 1, 16),
]

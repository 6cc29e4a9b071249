"""Attention, norms, embedding and batches on the GPU, on every generation's code path, against float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import ATTENTION, AttentionCase, dense, make_batch

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.formats.fp8 import E4M3, to_e4m3
from fp4rt.ops import AttentionShape

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")

ARCHITECTURES = (None, "sm_75", "sm_80", "sm_86", "sm_89")
HALF = 2.0**-11  # rounding to fp16, relative

MORE = [
    AttentionCase(((0, 100), (129, 1), (64, 64), (0, 1)), 12, 1, 64),  # a group of 12: two tiles of heads
    AttentionCase(((500, 1), (0, 1)), 12, 1, 128, norm=True),
    AttentionCase(((200, 1), (0, 33)), 20, 1, 32),  # 20: two blocks of heads
    AttentionCase(((200, 1), (0, 33)), 12, 1, 192),
    AttentionCase(((640, 1), (127, 1), (128, 1)), 6, 2, 112),
    AttentionCase(((300, 20), (63, 2)), 9, 3, 160, norm=True),
    AttentionCase(((300, 1), (3, 2)), 2, 2, 208),
    AttentionCase(((9000, 1), (8191, 1), (20000, 1)), 4, 1, 64),  # chunks of 2, 4 and 8 pages
    AttentionCase(((9000, 1), (40, 1)), 4, 1, 64, window=8500),
    AttentionCase(((1000, 1), (1000, 70)), 4, 2, 64, window=1),
    AttentionCase(((190, 1), ), 4, 2, 256, window=65, norm=True),
    AttentionCase(tuple((i % 5 * 63, 1 + i % 3 * 40) for i in range(40)), 6, 2,
                  48),  # more sequences than a warp
    AttentionCase(((100, 40), (0, 7), (511, 1), (30, 1)), 8, 2, 64, sinks=True),
    AttentionCase(((9000, 1), (0, 1), (300, 1)), 12, 1, 64, window=128, sinks=True),
    AttentionCase(((9000, 1), (20, 90)), 12, 1, 64, sinks=True),
    AttentionCase(((70, 50), (300, 1)), 4, 2, 256, window=100, norm=True, v_norm=True),
    AttentionCase(((70, 50), (1300, 1), (0, 1)), 4, 1, 512, norm=True, v_norm=True, values_are_keys=True),
    AttentionCase(((16, 1), (33, 1)), 16, 2, 512, rope=False, values_are_keys=True),
    AttentionCase(((5, 130),), 3, 3, 320, norm=True, v_norm=True, sinks=True),
]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: arch or "native")
def device(request):
    from fp4rt.ops.cuda.device import Device

    device = Device(request.param)
    with device:
        yield device
    device.close()


def activation(device, data: np.ndarray, exponent: int = 0):
    from fp4rt.ops.cuda.activation import Activation

    return Activation(device.upload(data.astype(np.float16)), exponent, 2.0**15)


@dataclasses.dataclass
class Layer:
    """One attention layer with random norms, and what it remembers: on the device, and in float64."""

    device: object
    case: AttentionCase
    num_pages: int
    exponent: int = -3

    def __post_init__(self):
        from fp4rt.ops.cuda import attention, rms_norm

        shape, rng = self.case.shape, np.random.default_rng(7)
        self.pages = attention.kv_pages(self.device, shape, self.num_pages)
        for store in (self.pages.keys, self.pages.values):
            # What nobody wrote must not be used.
            unwritten = np.full(store.shape, 0x7F if shape.fp8_scales else 0x7E00)  # NaN
            self.device.upload(unwritten.astype(np.uint8 if shape.fp8_scales else np.uint16), store)
        self.norms = [
            rng.uniform(0.5, 2, shape.head_dim).astype(np.float32) if normed else None
            for normed in (self.case.norm, self.case.norm, self.case.v_norm)
        ]
        self.sinks = rng.uniform(-2, 6, shape.num_heads).astype(np.float32) if self.case.sinks else None
        self.device_norms = [
            None if w is None else rms_norm.norm_weight(self.device, w, 1e-5) for w in self.norms
        ]
        self.inv_freq = 10000.0 ** -np.linspace(0, 1, shape.head_dim // 2).astype(np.float32)
        self.rope = (attention.rope_table(self.device, self.inv_freq, 1.25, 1 << 15)
                     if self.case.rope else None)
        self.keys: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}

    def run(self, qkv: np.ndarray, batch: Batch, shape: AttentionShape | None = None, **options) -> np.ndarray:
        """The device's output as float32; `shape` where it is not the case's."""
        from fp4rt.ops.cuda import attention
        from fp4rt.ops.cuda.batch import put_batch

        q_norm, k_norm, v_norm = self.device_norms
        on_device = put_batch(self.device, batch)
        x = activation(self.device, qkv, self.exponent)
        sinks = None if self.sinks is None else self.device.upload(self.sinks)
        out = attention.attention(self.device, x, on_device, self.pages, shape or self.case.shape, rope=self.rope,
                                  q_norm=q_norm, k_norm=k_norm, v_norm=v_norm, sinks=sinks, **options)
        result = self.device.fetch(out.data).result().astype(np.float32) * 2.0**out.exponent
        assert np.abs(result).max() <= out.bound
        assert not self.device.fetch(on_device.tickets).result().any()
        return result

    def expect(self, qkv: np.ndarray, batch: Batch, owners: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Float64 attention on operands rounded as the device rounds, and the largest value a row sees."""
        shape = self.case.shape
        heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        x = qkv.astype(np.float16).astype(np.float64).reshape(len(qkv), -1, dim) * 2.0**self.exponent
        q, k, v = np.split(x, [heads, heads + kv_heads], axis=1)
        k_scale, v_scale = shape.fp8_scales or (None, None)
        v = self._open(k if shape.values_are_keys else v, self.norms[2], None, v_scale)
        q, k = (self._open(part, norm, batch.positions, scale)
                for part, norm, scale in zip((q, k), self.norms, (None, k_scale)))
        out, largest = np.zeros((len(qkv), heads, dim)), np.zeros((len(qkv), 1))
        for s, owner in enumerate(owners):
            rows = slice(batch.starts[s], batch.starts[s + 1])
            self.keys[owner] = np.concatenate([self.keys.get(owner, k[:0]), k[rows]])
            self.values[owner] = np.concatenate([self.values.get(owner, v[:0]), v[rows]])
            keys, values = (np.repeat(a[owner], heads // kv_heads, axis=1) for a in (self.keys, self.values))
            for row in range(rows.start, rows.stop):
                end = int(batch.positions[row]) + 1
                begin = max(0, end - shape.window) if shape.window else 0
                scores = np.einsum("hd,khd->hk", q[row], keys[begin:end]) * shape.scale
                largest_score = scores.max(1, keepdims=True)
                weights = np.exp(scores - largest_score)
                total = weights.sum(1, keepdims=True)
                if self.sinks is not None:
                    total += np.exp(self.sinks[:, None] - largest_score)
                out[row] = np.einsum("hk,khd->hd", weights / total, values[begin:end])
                largest[row] = np.abs(values[begin:end]).max()
        return out.reshape(len(qkv), -1), largest

    def _open(self, x: np.ndarray, norm: np.ndarray | None, positions: np.ndarray | None,
              fp8_scale: float | None = None) -> np.ndarray:
        stored = 1.0 if norm is not None else 2.0**self.exponent
        if norm is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * norm
        if self.case.rope and positions is not None:
            angles = (positions.astype(np.float32)[:, None] * self.inv_freq).astype(np.float64)[:, None]
            low, high = np.split(x, 2, axis=-1)
            x = 1.25 * np.concatenate([low * np.cos(angles) - high * np.sin(angles),
                                       high * np.cos(angles) + low * np.sin(angles)], axis=-1)
        if fp8_scale is not None:
            return E4M3[to_e4m3((x / fp8_scale).astype(np.float32))].astype(np.float64) * fp8_scale
        return (x / stored).astype(np.float16).astype(np.float64) * stored


def random_qkv(case: AttentionCase, tokens: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((tokens, case.shape.input_width), np.float32) * 8
    return x.astype(np.float16)


@pytest.mark.parametrize("deterministic", [False, True], ids=["split", "deterministic"])
@pytest.mark.parametrize("case", ATTENTION + MORE, ids=str)
def test_attention(device, case: AttentionCase, deterministic: bool):
    filling, batch, num_pages = case.batches()
    layer = Layer(device, case, num_pages)
    if filling is not None:
        owners = [s for s, (old, _) in enumerate(case.sequences) if old]
        qkv = random_qkv(case, len(filling.tokens), 1)
        layer.run(qkv, filling, deterministic=deterministic)
        shape, layer.case = layer.case, dataclasses.replace(case, window=1)  # the oracle only remembers here
        layer.expect(qkv, filling, owners)
        layer.case = shape
    qkv = random_qkv(case, len(batch.tokens), 2)
    got = layer.run(qkv, batch, deterministic=deterministic)
    expected, largest = layer.expect(qkv, batch, list(range(len(case.sequences))))
    # Rounding of the weights and of the output, and operands whose fp16 rounding falls the other way.
    assert (np.abs(got - expected) <= 3 * HALF * largest).all(), np.abs(
        (got - expected) / largest).max() / HALF


COMPANY = AttentionCase(((700, 1), (64, 1), (0, 1), (9000, 1), (63, 1), (127, 1), (2047, 1), (5, 1)), 8, 2,
                        64, norm=True)
COMPANIES = [
    COMPANY,  # below, eight sequences have small blocks, or wide heads
    AttentionCase(((700, 1), (64, 1), (0, 1), (2100, 1), (63, 1), (512, 1), (1030, 1), (5, 1)), 16, 8, 256, window=1000,
                  norm=True, v_norm=True),
    AttentionCase(((700, 1), (64, 1), (0, 1), (2000, 1), (63, 1), (545, 1), (1030, 1), (5, 1)), 32, 8, 128),
    # Their window leaves some warps no key of a chunk.
    AttentionCase(((700, 1), (64, 1), (0, 1), (999, 1), (63, 1), (545, 1), (461, 1), (5, 1)), 24, 8, 128, window=450),
    AttentionCase(((700, 1), (63, 1), (0, 1), (1900, 1), (64, 1), (545, 1), (127, 1), (5, 1)), 16, 4, 128, norm=True),
    AttentionCase(((700, 1), (31, 1), (0, 1), (5000, 1), (32, 1), (545, 1), (1030, 1), (5, 1)), 64, 8, 512, norm=True,
                  v_norm=True, values_are_keys=True),
]


def filled(device, case: AttentionCase) -> tuple[Layer, Batch, np.ndarray]:
    filling, batch, num_pages = case.batches()
    layer = Layer(device, case, num_pages)
    layer.run(random_qkv(case, len(filling.tokens), 1), filling)
    return layer, batch, random_qkv(case, len(batch.tokens), 2)


def one_of(batch: Batch, s: int, width: int) -> Batch:
    rows = slice(batch.starts[s], batch.starts[s + 1])
    count = rows.stop - rows.start
    pages = np.zeros((1, 1, width), np.int32)
    pages[0, 0, :batch.pages.shape[2]] = batch.pages[0, s, :width]
    return Batch(batch.tokens[rows], batch.positions[rows], np.array([0, count], np.int32),
                 batch.lengths[s:s + 1], pages, np.zeros(1, np.int32), np.array([count - 1], np.int32))


@pytest.mark.parametrize("case", COMPANIES, ids=str)
def test_a_decoded_row_is_bit_equal_in_any_company(device, case: AttentionCase):
    layer, batch, qkv = filled(device, case)
    together = layer.run(qkv, batch)
    for s, length in enumerate(batch.lengths.tolist()):
        # By one table the chunks of a short context meet in a cluster, by the others in memory.
        for width in (-(-length // PAGE_TOKENS), batch.pages.shape[2], 256):
            assert (layer.run(qkv[s:s + 1], one_of(batch, s, width)) == together[s]).all()
    mixed = dataclasses.replace(case, sequences=case.sequences[:7] + ((0, 50),))
    layer, batch, _ = filled(device, mixed)
    alone = [layer.run(qkv[s:s + 1], one_of(batch, s, batch.pages.shape[2])) for s in range(7)]
    company = layer.run(np.concatenate([qkv[:7], random_qkv(mixed, 50, 3)]), batch)
    assert (company[:7] == np.concatenate(alone)).all()


@pytest.mark.parametrize("window", [None, 100])
def test_deterministic_attention_does_not_depend_on_chunks(device, window):
    case = AttentionCase(((0, 333),), 6, 2, 64, window=window, norm=True)
    _, whole, num_pages = case.batches()
    qkv, table = random_qkv(case, 333, 4), whole.pages[0]
    at_once = Layer(device, case, num_pages).run(qkv, whole, deterministic=True)
    layer, parts = Layer(device, case, num_pages), []
    for begin, end in ((0, 70), (70, 71), (71, 200), (200, 201), (201, 332), (332, 333)):
        parts.append(
            layer.run(qkv[begin:end], make_batch([(0, begin, end - begin)], table), deterministic=True))
    assert (np.concatenate(parts) == at_once).all()


@pytest.mark.parametrize("deterministic", [False, True], ids=["split", "deterministic"])
def test_a_layer_that_shares_pages_reads_them_and_writes_nothing(device, deterministic):
    case = AttentionCase(((200, 1), (0, 30), (64, 1)), 4, 2, 256, norm=True, v_norm=True)
    filling, batch, num_pages = case.batches()
    layer = Layer(device, case, num_pages)
    layer.run(random_qkv(case, len(filling.tokens), 1), filling)
    qkv = random_qkv(case, len(batch.tokens), 2)
    expected = layer.run(qkv, batch, deterministic=deterministic)
    stores = [device.fetch(store).result() for store in (layer.pages.keys, layer.pages.values)]
    q = np.ascontiguousarray(qkv[:, :4 * 256])
    sharing = dataclasses.replace(case.shape, shares=0)
    np.testing.assert_array_equal(layer.run(q, batch, sharing, deterministic=deterministic), expected)
    for store, before in zip((layer.pages.keys, layer.pages.values), stores):
        np.testing.assert_array_equal(device.fetch(store).result(), before)


@pytest.mark.parametrize("deterministic", [False, True], ids=["split", "deterministic"])
def test_pages_behind_the_window_are_not_read(device, deterministic):
    case = AttentionCase(((1000, 1), (700, 50), (130, 1)), 4, 2, 64, window=100)
    filling, batch, num_pages = case.batches()
    layer = Layer(device, case, num_pages)
    layer.run(random_qkv(case, len(filling.tokens), 1), filling)
    qkv = random_qkv(case, len(batch.tokens), 2)
    expected = layer.run(qkv, batch, deterministic=deterministic)
    pages = batch.pages.copy()
    for s, (old, _) in enumerate(case.sequences):
        pages[0, s, :(old - 100 + 1) // PAGE_TOKENS] = 0  # nobody's page: NaN
    got = layer.run(qkv, dataclasses.replace(batch, pages=pages), deterministic=deterministic)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0)])
def test_padded_rows_are_harmless(device, lengths):
    layer, batch, qkv = filled(device, COMPANY)
    alone = layer.run(
        qkv[:2],
        dataclasses.replace(batch, tokens=batch.tokens[:2], positions=batch.positions[:2],
                            starts=batch.starts[:3], lengths=batch.lengths[:2], pages=batch.pages[:, :2],
                            slots=batch.slots[:2], rows=batch.rows[:2]))
    padded = dataclasses.replace(batch, tokens=batch.tokens[:4],
                                 positions=np.array([*batch.positions[:2], 0, 0], np.int32),
                                 starts=batch.starts[:5], lengths=np.array([*batch.lengths[:2], *lengths],
                                                                           np.int32),
                                 pages=np.concatenate([batch.pages[:, :2], 0 * batch.pages[:, :2]], axis=1),
                                 slots=batch.slots[:4], rows=batch.rows[:4])
    for deterministic in (False, True):
        got = layer.run(qkv[:4], padded, deterministic=deterministic)
        assert np.isfinite(got).all()
        if not deterministic:
            assert (got[:2] == alone).all()


def test_tokens_that_no_sequence_owns_give_zeros(device):
    case = AttentionCase(((0, 20),), 4, 2, 64)
    _, batch, num_pages = case.batches()
    longer = dataclasses.replace(batch, tokens=np.zeros(32, np.int32),
                                 positions=np.arange(32, dtype=np.int32))
    qkv = random_qkv(case, 32, 5)
    got = Layer(device, case, num_pages).run(qkv, longer)
    assert (got[20:] == 0).all() and (got[:20] == Layer(device, case, num_pages).run(qkv[:20], batch)).all()


@pytest.mark.parametrize("tokens, width", [(1, 64), (3, 99), (5, 4096), (70, 5120), (2, 7)])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e4])
def test_rms_norm(device, tokens: int, width: int, magnitude: float):
    from fp4rt.ops.cuda import rms_norm

    rng = np.random.default_rng(width)
    x = (rng.standard_normal((tokens, width)) * magnitude).astype(np.float32)
    weight = (rng.standard_normal(width) * 300).astype(np.float32)
    y = rms_norm.rms_norm(device, device.upload(x), rms_norm.norm_weight(device, weight, 1e-5))
    got = device.fetch(y.data).result().astype(np.float64) * 2.0**y.exponent
    expected = x.astype(
        np.float64) / np.sqrt((x.astype(np.float64)**2).mean(1, keepdims=True) + 1e-5) * weight
    assert (np.abs(got - expected) <= 1.1 * HALF * np.abs(expected) + 2.0 ** (y.exponent - 24)).all()
    assert np.abs(got).max() <= y.bound


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("width", [64, 99, 4096])
def test_embedding(device, kind: str, tied: bool, width: int):
    from fp4rt.ops.cuda import embedding
    from fp4rt.ops.cuda.linear import linear_weight

    table = dense(np.random.default_rng(0), 323, width, kind)
    head = linear_weight(device, [table]) if tied else None
    tokens = np.array([0, 322, 17, 17, 16, 15, 300], np.int32)
    x = embedding.embed(device, device.upload(tokens),
                        embedding.embedding_weight(device, table, tied_to=head))
    expected = table.dequantize()[tokens]
    bound = 2.0**-21 * np.abs(expected).max(1,
                                            keepdims=True) if tied and kind == "F32" else 0  # two fp16 planes
    assert (np.abs(device.fetch(x).result() - expected) <= bound).all()
    rows = np.array([5, 0, 0], np.int32)
    got = device.fetch(embedding.gather_rows(device, device.upload(rows), x)).result()
    assert (got == device.fetch(x).result()[rows]).all()


@pytest.mark.parametrize("tied", [False, True])
def test_scaled_embedding(device, tied: bool):
    from fp4rt.ops.cuda import embedding
    from fp4rt.ops.cuda.linear import linear_weight

    table, tokens = dense(np.random.default_rng(0), 50, 96, "BF16"), np.array([0, 49, 7], np.int32)
    handle = embedding.embedding_weight(device, table, tied_to=linear_weight(device, [table]) if tied else None,
                                        scale=96**0.5)
    got = device.fetch(embedding.embed(device, device.upload(tokens), handle)).result()
    np.testing.assert_allclose(got, table.dequantize()[tokens] * np.float32(96**0.5), rtol=2.0**-22)


def test_softcap(device):
    from fp4rt.ops.cuda import embedding

    x = np.random.default_rng(0).uniform(-200, 200, (3, 5001)).astype(np.float32)
    got = device.fetch(embedding.softcap(device, device.upload(x), 30.0)).result()
    np.testing.assert_allclose(got, 30 * np.tanh(x.astype(np.float64) / 30), rtol=1e-6)


@pytest.mark.parametrize("width", [99, 1536, 2816, 5376])
@pytest.mark.parametrize("kinds", ["h", "f", "hn", "fnO", "hO", "hnhnO", "fnhO", "hf"])
def test_merge(device, width: int, kinds: str):
    """kinds: branches as h (fp16 with an exponent and, the second time, row factors) or f (float32), n for a norm on
    the branch before it, O for one on the sum."""
    from fp4rt.ops.cuda import merge, rms_norm
    from fp4rt.ops.cuda.activation import Activation

    rng = np.random.default_rng(width)
    norm = lambda: rng.uniform(0.5, 2, width).astype(np.float32)  # noqa: E731
    normed = lambda x, w: x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6) * w  # noqa: E731
    residual = rng.standard_normal((5, width)).astype(np.float32)
    branches, total = [], 0
    for i, kind in enumerate(kinds.rstrip("O")):
        if kind == "n":
            continue
        x = (rng.standard_normal((5, width)) * 3).astype(np.float16 if kind == "h" else np.float32)
        rows = rng.uniform(0.5, 2, 5).astype(np.float32) if kind == "h" and branches else None
        exact = x.astype(np.float64) * (4 if kind == "h" else 1) * (1 if rows is None else rows[:, None])
        data, weight = device.upload(x), norm() if kinds[i + 1:i + 2] == "n" else None
        if kind == "h":
            data = Activation(data, 2, 100.0, rows=None if rows is None else device.upload(rows))
        branches.append((data, None if weight is None else rms_norm.norm_weight(device, weight, 1e-6)))
        total = total + (exact if weight is None else normed(exact, weight))
    outer = norm() if kinds.endswith("O") else None
    expected = (residual + (total if outer is None else normed(total, outer))) * 0.75
    got = merge.merge(device, device.upload(residual), branches,
                      None if outer is None else rms_norm.norm_weight(device, outer, 1e-6), 0.75)
    np.testing.assert_allclose(device.fetch(got).result(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("tokens", [1, 12])
def test_per_layer_embeddings(device, kind: str, magnitude: float, tokens: int):
    from fp4rt.ops.cuda import per_layer, rms_norm
    from fp4rt.ops.cuda.linear import linear, linear_weight

    layers, width, d = 5, 48, 160
    rng = np.random.default_rng(1)
    table = dense(rng, 70, layers * width, kind)
    projection, gate, back = (dense(rng, *size, "BF16") for size in ((layers * width, d), (width, d), (d, width)))
    weight, ids = rng.uniform(0.5, 2, width).astype(np.float32), rng.integers(0, 70, tokens).astype(np.int32)
    h = (rng.standard_normal((tokens, d)) * magnitude).astype(np.float32)
    w = {name: one.dequantize().astype(np.float64) for name, one in (("projection", projection), ("gate", gate),
                                                                     ("back", back), ("table", table))}
    looked_up = w["table"][ids].reshape(tokens, layers, width) * width**0.5
    projected = (h @ w["projection"].T).reshape(tokens, layers, width) / d**0.5
    expected = projected / np.sqrt((projected**2).mean(2, keepdims=True) + 1e-6) * weight + looked_up
    expected /= np.sqrt(2)
    on_device = device.upload(h)
    inputs = per_layer.per_layer_inputs(device, on_device, device.upload(ids),
                                        per_layer.host_table(device, table, width**0.5), linear_weight(
                                            device, [projection]), rms_norm.norm_weight(device, weight, 1e-6))
    got = device.fetch(inputs.data).result().astype(np.float64).reshape(expected.shape) * 2.0**inputs.exponent
    assert np.abs(got).max() <= inputs.bound
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.abs(expected).max())
    y = h @ w["gate"].T
    gated = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))) * expected[:, 3]
    found = per_layer.per_layer_gate(device, on_device, linear_weight(device, [gate]), inputs, 3)
    rows = device.fetch(found.rows).result().astype(np.float64)[:, None]
    values = device.fetch(found.data).result().astype(np.float64) * 2.0**found.exponent
    assert np.abs(values).max() <= found.bound
    np.testing.assert_allclose(values * rows, gated, atol=8e-3 * np.abs(gated).max())
    out = linear(device, found, linear_weight(device, [back]))
    got = device.fetch(out.data).result().astype(np.float64) * 2.0**out.exponent * rows
    np.testing.assert_allclose(got, gated @ w["back"].T, atol=8e-3 * np.abs(gated @ w["back"].T).max())


def test_a_damaged_host_table_is_named(device):
    from fp4rt.errors import Fp4rtError
    from fp4rt.ops.cuda import per_layer

    table = dense(np.random.default_rng(1), 70, 48, "BF16")
    table.data[3, 5] = 0x7FC0
    with pytest.raises(Fp4rtError, match="w: holds NaN"):
        per_layer.host_table(device, table, 1.0)


def test_advance(device):
    from fp4rt.ops.cuda.batch import advance, put_batch

    pages = np.array([[[3, 4], [0, 0], [5, 0], [6, 7]]], np.int32)
    batch = Batch(np.zeros(4, np.int32), np.array([63, 0, 63, 2 * PAGE_TOKENS - 1], np.int32),
                  np.arange(5, dtype=np.int32), np.array([64, 1, 64, 2 * PAGE_TOKENS], np.int32), pages,
                  np.zeros(4, np.int32), np.arange(4, dtype=np.int32))
    on_device = put_batch(device, batch)
    advance(device, on_device, device.upload(np.array([9, 8, -1, 7], np.int32)))
    advance(device, on_device, device.upload(np.array([10, 11, 12, 13], np.int32)))
    read = lambda array: device.fetch(array).result().tolist()  # noqa: E731
    assert read(on_device.tokens) == [10, 11, 12, 13]
    assert read(on_device.positions) == [65, 0, 64, 2 * PAGE_TOKENS - 1]  # padded and full rows stay
    assert read(on_device.lengths) == [66, 1, 65, 2 * PAGE_TOKENS]
    put_batch(device, batch, into=on_device)
    assert read(on_device.lengths) == batch.lengths.tolist() and read(on_device.pages) == pages.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_is_finite(device, bad):
    from fp4rt.ops.cuda.batch import is_finite

    x = np.full((7, 1001), 3e38, np.float32)
    if bad is not None:
        x[6, 1000] = bad
    assert is_finite(device, device.upload(x)) == (bad is None)

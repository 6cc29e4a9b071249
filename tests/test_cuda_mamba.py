"""The Mamba2 mixer on the GPU, on every generation's code path, against the recurrence in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import MAMBA, MambaCase

from fp4rt.batch import Batch
from fp4rt.ops import MambaShape

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")

ARCHITECTURES = (None, "sm_75", "sm_80", "sm_86", "sm_89")
HALF = 2.0**-11  # rounding to fp16, relative
EPS = 1e-5
EXPONENT = 3     # of the projection's output


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: arch or "native")
def device(request):
    from fp4rt.ops.cuda.device import Device

    device = Device(request.param)
    with device:
        yield device
    device.close()


class Mixer:
    """One mixer and its state on the device, and the same in float64."""

    def __init__(self, device, case: MambaCase):
        from fp4rt.ops.cuda import mamba

        self.device, self.shape, self.values = device, case.shape, case.weight()
        self.weight = mamba.mamba_weight(device, self.shape, **self.values, eps=EPS)
        self.state = mamba.mamba_state(device, self.shape, len(case.sequences) + 1)
        for store in (self.state.recent, self.state.ssm):  # what a slot held before must not be used
            device.upload(np.full(store.shape, np.nan, store.dtype), store)
        self.expected_state: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def run(self, projected: np.ndarray, batch: Batch):
        """The device's output [T, inner] as float32."""
        from fp4rt.ops.cuda import mamba
        from fp4rt.ops.cuda.activation import Activation
        from fp4rt.ops.cuda.batch import put_batch

        x = Activation(self.device.upload(projected), EXPONENT, 2.0**15)
        out = mamba.mamba(self.device, x, put_batch(self.device, batch), self.state, self.weight, self.shape)
        values = self.device.fetch(out.data).result().astype(np.float32) * 2.0**out.exponent
        assert np.abs(values).max() <= out.bound and np.linalg.norm(values, axis=1).max() <= 1.001 * out.length
        return values

    def expect(self, projected: np.ndarray, batch: Batch) -> np.ndarray:
        shape, w = self.shape, {name: value.astype(np.float64) for name, value in self.values.items()}
        x = projected.astype(np.float64) * 2.0**EXPONENT
        z, xbc, dt = np.split(x, [shape.inner, shape.inner + shape.conv_width], axis=1)
        dt = np.logaddexp(0, dt + w["dt_bias"])
        y = np.zeros((len(x), shape.num_heads, shape.head_dim))
        for s, slot in enumerate(batch.slots.tolist()):
            rows = slice(batch.starts[s], batch.starts[s + 1])
            before, S = self.expected_state.get(slot, (
                np.zeros((shape.conv_kernel - 1, shape.conv_width)),
                np.zeros((shape.num_heads, shape.head_dim, shape.state_size))))
            inputs = np.concatenate([before, xbc[rows]])
            count = rows.stop - rows.start
            convolved = sum(inputs[i:i + count] * w["conv"][:, i] for i in range(shape.conv_kernel)) + w["conv_bias"]
            convolved /= 1 + np.exp(-convolved)
            xs, B, C = np.split(convolved, [shape.inner, shape.inner + shape.num_groups * shape.state_size], axis=1)
            xs = xs.reshape(count, shape.num_heads, shape.head_dim)
            B, C = (np.repeat(one.reshape(count, shape.num_groups, -1), shape.num_heads // shape.num_groups, axis=1)
                    for one in (B, C))
            for t in range(count):
                step = dt[rows.start + t][:, None, None]
                S = np.exp(step * w["A"][:, None, None]) * S + step * xs[t][:, :, None] * B[t][:, None]
                y[rows.start + t] = (S * C[t][:, None]).sum(2) + w["D"][:, None] * xs[t]
            self.expected_state[slot] = inputs[count:], S
        gated = (y.reshape(len(x), -1) * z / (1 + np.exp(-z))).reshape(len(x), shape.num_groups, -1)
        normed = gated / np.sqrt((gated**2).mean(2, keepdims=True) + EPS)
        return normed.reshape(len(x), -1) * w["norm"]


def random_projection(shape: MambaShape, tokens: int, seed: int) -> np.ndarray:
    """fp16 [T, input_width], times 2^EXPONENT of magnitude 1."""
    x = np.random.default_rng(seed).standard_normal((tokens, shape.input_width))
    return (x * 2.0**-EXPONENT).astype(np.float16)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """fp16 rounding of the output, and float32 along the way: a sum over a thousand tokens and `state` products."""
    assert (np.abs(found - expected) <= 1.1 * HALF * np.abs(expected) + 1e-4).all(), np.abs(found - expected).max()


@pytest.mark.parametrize("case", MAMBA, ids=str)
def test_mamba(device, case: MambaCase):
    filling, batch = case.batches()
    mixer = Mixer(device, case)
    for seed, step in enumerate((filling, batch)):
        if step is not None:
            projected = random_projection(case.shape, len(step.tokens), seed)
            assert_close(mixer.run(projected, step), mixer.expect(projected, step))


def test_the_cut_into_steps_and_the_company_change_no_bit(device):
    case = MambaCase(((0, 300), (0, 41)), 4, 64, 2, 128)
    _, batch = case.batches()
    projected = random_projection(case.shape, 341, 3)
    together = Mixer(device, case).run(projected, batch)
    for s, (first, count) in enumerate(((0, 300), (300, 41))):
        mixer, position = Mixer(device, case), 0
        for step in (1, 1, 2, 30, 1, 5, count - 40):
            rows = slice(first + position, first + position + step)
            part = Batch(batch.tokens[rows], batch.positions[rows], np.array([0, step], np.int32),
                         np.array([position + step], np.int32), batch.pages[:, s:s + 1], batch.slots[s:s + 1],
                         np.array([step - 1], np.int32))
            np.testing.assert_array_equal(mixer.run(projected[rows], part), together[rows])
            position += step


def test_padded_rows_and_tokens_that_no_sequence_owns_are_harmless(device):
    case = MambaCase(((0, 3), (0, 1)), 4, 40, 2, 32)
    _, batch = case.batches()
    projected = random_projection(case.shape, 8, 4)
    alone = Mixer(device, case).run(projected[:4], batch)
    padded = dataclasses.replace(batch, tokens=np.zeros(8, np.int32),
                                 positions=np.concatenate([batch.positions, np.zeros(4, np.int32)]),
                                 starts=np.array([*batch.starts, 5, 6], np.int32),
                                 lengths=np.array([*batch.lengths, 1, 1], np.int32),
                                 pages=np.zeros((1, 4, 1), np.int32), slots=np.array([*batch.slots, 0, 0], np.int32))
    got = Mixer(device, case).run(projected, padded)
    np.testing.assert_array_equal(got[:4], alone)
    assert np.isfinite(got).all() and (got[6:] == 0).all()


def test_too_large_a_state_is_said_in_one_line(device):
    from fp4rt.errors import Fp4rtError

    case = MambaCase(((0, 1),), 2, 64, 1, 512)
    with pytest.raises(Fp4rtError, match="ssm_state_size is 512"):
        Mixer(device, case)

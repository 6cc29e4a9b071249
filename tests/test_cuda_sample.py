"""The sampler on the GPU, on several generations' code paths, against sampling.draw."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fp4rt.ops import SamplerRow
from fp4rt.sampling import adjust, draw, gumbel

pytestmark = pytest.mark.gpu
pytest.importorskip("cupy")


@pytest.fixture(scope="module", params=(None, "sm_75", "sm_80"), ids=lambda arch: arch or "native")
def device(request):
    from fp4rt.ops.cuda.device import Device

    device = Device(request.param)
    with device:
        yield device
    device.close()


def row(**changes) -> SamplerRow:
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                    presence_penalty=0.0, frequency_penalty=0.0, seed=7, step=0, prompt=[], generated=[])
    return SamplerRow(**settings | changes)


def sample(device, logits: np.ndarray, rows: list[SamplerRow], steps: int = 1) -> list[list[int]]:
    """Ids of `steps` draws from the same logits, the device advancing the rows by itself."""
    from fp4rt.ops.cuda.sample import put_sampler
    from fp4rt.ops.cuda.sample import sample as draw_on_device

    sampler = put_sampler(device, rows, logits.shape[1])
    on_device = device.upload(np.ascontiguousarray(logits, np.float32))
    return [device.fetch(draw_on_device(device, on_device, sampler)).result().tolist() for _ in range(steps)]


def expect(logits: np.ndarray, rows: list[SamplerRow], steps: int) -> list[list[int]]:
    drawn = []
    for _ in range(steps):
        ids = [draw(x.astype(np.float32), one) for x, one in zip(logits, rows)]
        rows = [dataclasses.replace(one, step=one.step + 1, generated=[*one.generated, token])
                for one, token in zip(rows, ids)]
        drawn.append(ids)
    return drawn


def best_scores(logits: np.ndarray, settings: SamplerRow, ids: list[int]) -> float:
    """How far the score of the first id lies below that of the second, for two draws that differ."""
    z = adjust(logits, settings) / np.float32(settings.temperature)
    scores = [float(z[i]) + float(gumbel(np.array([i]), settings.seed, settings.step)[0]) for i in ids]
    return scores[1] - scores[0]


SETTINGS = [
    row(temperature=0.0),
    row(temperature=0.0, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.3,
        prompt=[1, 5, 5, 20], generated=[3, 3, 7]),
    row(),
    row(temperature=0.3),
    row(temperature=5.0, seed=2**64 - 1, step=2**31),
    row(top_k=1),
    row(top_k=40, seed=3),
    row(top_k=300, temperature=2.0),
    row(top_k=10**6),
    row(top_p=1e-6),
    row(top_p=0.3),
    row(top_p=0.9, seed=2**40),
    row(top_p=0.95, temperature=3.0),
    row(top_p=0.999),
    row(min_p=0.05),
    row(min_p=1.0),
    row(min_p=1e-5, temperature=0.01),
    row(top_k=20, top_p=0.8, min_p=0.02, temperature=0.6, seed=99),
    row(top_k=50, top_p=0.95, repetition_penalty=1.3, prompt=[0, 2, 4], generated=[9, 9, 9, 10]),
    row(top_p=0.5, frequency_penalty=-2.0, generated=[11] * 30),
    row(top_k=5, temperature=0.001),
    row(top_k=7, temperature=1e6),
    row(temperature=0.0, logit_bias=((1, 4.0), (2, 4.0), (40, -3.0))),
    row(logit_bias=tuple((i, i % 7 - 3.0) for i in range(1024)), top_p=0.9),
    row(repetition_penalty=1.3, prompt=[0, 2, 4], frequency_penalty=0.7, logit_bias=((0, -100.0), (9, 5.5)), top_k=30),
]
MASKED = [(0, 0.5), (1, 0.001), (2, 0.5), (6, 0.01), (7, 0.3), (11, 0.5), (15, 0.9), (17, 0.1), (18, 0.5), (22, 0.5),
          (23, 0.5), (24, 0.2)]  # settings, and the share of ids that their mask allows


def with_mask(settings: SamplerRow, share: float, vocabulary: int, rng: np.random.Generator) -> SamplerRow:
    bits = np.ones(-(-vocabulary // 32) * 32, bool)  # those beyond the vocabulary mean nothing
    bits[:vocabulary] = rng.random(vocabulary) < share
    bits[rng.integers(vocabulary)] = True
    return dataclasses.replace(settings, mask=np.packbits(bits, bitorder="little").view(np.uint32))


@pytest.mark.parametrize("vocabulary", [1, 3, 323, 8192, 32000, 128256, 151937])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 40.0])
def test_draws_are_those_of_the_definition(device, vocabulary: int, spread: float):
    rng = np.random.default_rng(vocabulary)
    rows = [dataclasses.replace(one, prompt=[i % vocabulary for i in one.prompt],
                                generated=[i % vocabulary for i in one.generated],
                                logit_bias=tuple(pair for pair in one.logit_bias if pair[0] < vocabulary))
            for one in SETTINGS]
    rows += [with_mask(rows[i], share, vocabulary, rng) for i, share in MASKED]
    logits = (rng.standard_normal((len(rows), vocabulary)) * spread).astype(np.float32)
    steps = 5
    got, expected = sample(device, logits, rows, steps), expect(logits, rows, steps)
    for r, one in enumerate(rows):
        for step in range(steps):
            a, b = got[step][r], expected[step][r]
            if a != b:  # float32 scores: only scores that round alike may swap, and then the histories part
                assert one.temperature > 0 and abs(best_scores(logits[r], one, [a, b])) < 1e-5, (one, step, a,
                                                                                                 b)
                break
            one = dataclasses.replace(one, step=one.step + 1, generated=[*one.generated, a])


@pytest.mark.parametrize("vocabulary", [40, 5000, 128256])
def test_ties_share_their_fate_and_go_to_the_lowest_id(device, vocabulary: int):
    rng = np.random.default_rng(1)
    logits = rng.integers(-3, 4, (len(SETTINGS), vocabulary)).astype(np.float32)
    logits[0, -5:] = 9
    rows = [dataclasses.replace(one, prompt=[], generated=[],
                                logit_bias=tuple(pair for pair in one.logit_bias if pair[0] < vocabulary))
            for one in SETTINGS]
    assert sample(device, logits, rows) == expect(logits, rows, 1)
    assert sample(device, np.zeros_like(logits), rows) == expect(np.zeros_like(logits), rows, 1)
    assert sample(device, -np.zeros_like(logits), rows) == expect(-np.zeros_like(logits), rows, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers(device, bad: float):
    logits = np.zeros((4, 20000), np.float32)
    logits[1, 19999] = logits[2, 0] = bad
    rows = [row(temperature=0.0), row(temperature=0.0), row(top_p=0.5, presence_penalty=1.0), row(top_k=3)]
    got = sample(device, logits, rows, 2)
    assert [ids[1:3] for ids in got] == [[-1, -1]] * 2 and all(ids[0] == 0 and ids[3] >= 0 for ids in got)


def test_a_refilled_sampler_is_a_new_one(device):
    from fp4rt.ops.cuda.sample import put_sampler
    from fp4rt.ops.cuda.sample import sample as draw_on_device

    logits = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    on_device = device.upload(logits)
    first, second = SETTINGS[:3], [SETTINGS[17], SETTINGS[1], SETTINGS[24]]
    sampler = put_sampler(device, first, 1000)
    draw_on_device(device, on_device, sampler)
    put_sampler(device, second, 1000, into=sampler)
    got = device.fetch(draw_on_device(device, on_device, sampler)).result().tolist()
    assert got == expect(logits, second, 1)[0]


def test_draws_follow_the_softmax(device):
    probability = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    n = 4000
    logits = np.tile(np.log(probability).astype(np.float32), (n, 1))
    for changes, expected in (({}, probability), ({"top_k": 2}, np.array([2, 1, 0, 0, 0]) / 3),
                              ({"top_p": 0.8}, np.array([4, 2, 1, 0, 0]) / 7)):
        (ids,) = sample(device, logits, [row(seed=i * 2**33 + i, **changes) for i in range(n)])
        counts = np.bincount(ids, minlength=5)
        assert (counts[expected == 0] == 0).all()
        assert (np.abs(counts - n * expected) <= 5 * math.sqrt(n) / 2).all()

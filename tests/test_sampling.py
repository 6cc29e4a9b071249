"""Sampling: options are checked, and a draw is what its definition says, against a slow direct reading of it."""

import math

import numpy as np
import pytest

from fp4rt.errors import Fp4rtError
from fp4rt.ops import SamplerRow
from fp4rt.sampling import Sampling, draw, gumbel, keep, penalize, philox


def row(**changes):
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                    frequency_penalty=0.0, seed=7, step=0, prompt=[], generated=[])
    return SamplerRow(**settings | changes)


@pytest.mark.parametrize("counter, key, expected", [  # Random123's kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox(counter, key)) == expected


def test_gumbel_layout_and_range():
    seed, step = 0x0123456789ABCDEF, 41
    ids = np.array([0, 3, 4, 9, 10, 4095])
    for number, value in zip(ids, gumbel(ids, seed, step), strict=True):
        word = philox((step, int(number) // 4, 0, 0), (0x89ABCDEF, 0x01234567))[number % 4]
        u = ((int(word) >> 8) + 0.5) / 2**24
        assert value == pytest.approx(-math.log(-math.log(u)), rel=1e-12)
    many = gumbel(np.arange(1 << 20), 3, 0)
    assert np.isfinite(many).all()
    assert many.mean() == pytest.approx(0.5772, abs=5 * 1.2825 / 2**10)
    assert many.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)


def kept_slowly(z, top_k, top_p, min_p):
    """The definition of `keep`, id by id."""
    alive = [i for i in range(len(z)) if top_k == 0 or sum(z > z[i]) < top_k]
    weight = {i: math.exp(float(z[i]) - float(max(z))) for i in alive}
    total = sum(weight.values())
    alive = [i for i in alive if top_p == 1 or sum(w for j, w in weight.items() if z[j] > z[i]) / total < top_p]
    return [i for i in alive if weight[i] >= min_p * max(weight.values())]


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.73, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.03, 0.5, 1.0])
def test_keep_is_its_definition(top_k, top_p, min_p):
    random = np.random.default_rng(top_k)
    for z in (random.normal(0, 2, 60).astype(np.float32),
              random.integers(-3, 3, 60).astype(np.float32),  # many ties
              np.zeros(60, np.float32)):
        assert keep(z, top_k, top_p, min_p).tolist() == kept_slowly(z, top_k, top_p, min_p)


def test_ties_at_the_threshold_stay_together():
    z = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    assert keep(z, 2, 1.0, 0.0).tolist() == [0, 1, 2, 3]  # the 2nd largest is held by three
    assert keep(z, 0, 0.39, 0.0).tolist() == [0]
    assert keep(z, 0, 0.45, 0.0).tolist() == [0, 1, 2, 3]


def test_penalties():
    logits = np.array([2.0, -2.0, 1.0, -1.0, 0.5], np.float32)
    before = logits.copy()
    settings = row(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, prompt=[0, 1],
                   generated=[3, 2, 2])
    assert penalize(logits, settings).tolist() == [1.0, -4.0, 0.5 - 0.25 - 1.0, -2.0 - 0.25 - 0.5, 0.5]
    assert (logits == before).all()


def test_greedy_takes_the_lowest_of_equals_after_penalties():
    logits = np.array([1, 3, 3, 2], np.float32)
    assert draw(logits, row(temperature=0.0)) == 1
    assert draw(logits, row(temperature=0.0, presence_penalty=0.5, generated=[1])) == 2
    assert draw(logits, row(temperature=0.0, repetition_penalty=4.0, prompt=[1, 2])) == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(bad, temperature):
    logits = np.zeros(9, np.float32)
    logits[5] = bad
    assert draw(logits, row(temperature=temperature)) == -1


def test_draws_follow_the_softmax():
    probability = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    logits = np.log(probability).astype(np.float32)
    n = 6000
    for settings, expected in (({}, probability),
                               ({"temperature": 0.5}, probability**2 / (probability**2).sum()),
                               ({"top_k": 2}, np.array([2, 1, 0, 0, 0]) / 3),
                               ({"top_p": 0.8}, np.array([4, 2, 1, 0, 0]) / 7),
                               ({"min_p": 0.2}, np.array([4, 2, 1, 0, 0]) / 7)):
        drawn = np.bincount([draw(logits, row(step=step, **settings)) for step in range(n)], minlength=5) / n
        assert (drawn[expected == 0] == 0).all()
        assert np.abs(drawn - expected).max() < 5 * math.sqrt(0.25 / n)  # five standard deviations


def test_a_draw_is_fixed_by_seed_and_step():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    drawn = [[draw(logits, row(seed=seed, step=step)) for step in range(20)] for seed in (1, 1, 2, 2**32 + 1)]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]
    assert len(set(drawn[0])) > 15


@pytest.mark.parametrize("name, value", [
    ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", "8"), ("max_tokens", 2**31),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e-4),
    ("temperature", "hot"), ("temperature", False), ("top_k", -1), ("top_k", 2.0), ("top_p", 0), ("top_p", 1.01),
    ("top_p", math.nan), ("min_p", -0.01), ("min_p", 1.5), ("repetition_penalty", 0), ("repetition_penalty", -2),
    ("presence_penalty", math.inf), ("frequency_penalty", [1]), ("seed", -1), ("seed", 2**64), ("seed", 1.0),
    ("stop", ""), ("stop", ("a", "")), ("stop", ("a", 3)), ("stop", 3), ("ignore_eos", 1),
])
def test_nonsense_is_named(name, value):
    with pytest.raises(Fp4rtError, match=f"^{name} is ") as caught:
        Sampling(**{name: value})
    assert caught.value.kind == "request" and "\n" not in str(caught.value)


def test_sensible_values_are_kept():
    given = Sampling(max_tokens=np.int64(3), temperature=np.float32(0.5), top_p=1, seed=2**64 - 1, stop=["a", "b"])
    assert (given.max_tokens, given.temperature, given.top_p, given.stop) == (3, 0.5, 1.0, ("a", "b"))
    assert type(given.max_tokens) is int and type(given.temperature) is float
    assert Sampling(stop="end").stop == ("end",)
    assert hash(given) == hash(Sampling(max_tokens=3, temperature=0.5, top_p=1.0, seed=2**64 - 1, stop=("a", "b")))


def test_resolve_reads_generation_config():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 77}
    settled = Sampling().resolve(config)
    assert (settled.temperature, settled.top_p, settled.top_k, settled.max_tokens) == (0.6, 0.9, 0, 77)
    assert (settled.min_p, settled.repetition_penalty, settled.presence_penalty) == (0.0, 1.0, 0.0)
    assert Sampling(temperature=0, max_tokens=5).resolve(config).temperature == 0
    assert Sampling().resolve({}).temperature == 0 and Sampling().resolve({}).max_tokens is None
    assert Sampling().resolve({"do_sample": False, "temperature": 0.7}).temperature == 0
    assert Sampling(temperature=0.8).resolve({"top_k": 20}).top_k == 20
    assert Sampling().resolve({"do_sample": True}).temperature == 1
    assert Sampling(seed=5).resolve({}).seed == 5
    assert Sampling().resolve({}).seed != Sampling().resolve({}).seed
    assert settled.resolve({}) == settled


def test_resolve_refuses_nonsense_in_the_file_unless_overridden():
    config = {"do_sample": True, "temperature": "warm"}
    with pytest.raises(Fp4rtError, match="generation_config.json: temperature is 'warm'") as caught:
        Sampling().resolve(config)
    assert caught.value.kind == "checkpoint"
    assert Sampling(temperature=0.3).resolve(config).temperature == 0.3

"""Sampling: options are checked, and a draw is what its definition says, against a slow direct reading of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from backends import BACKENDS, each_backend

from fp4rt.batch import Batch
from fp4rt.errors import Fp4rtError
from fp4rt.ops import SamplerRow
from fp4rt.ops.select import make_ops
from fp4rt.sampling import Sampling, adjust, draw, gumbel, keep, penalize, philox


def row(**changes):
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
                    frequency_penalty=0.0, seed=7, step=0, prompt=[], generated=[])
    return SamplerRow(**settings | changes)


def mask_of(ids, vocab_size):
    """The words of a mask that allows these ids; bits beyond the vocabulary are set, and mean nothing."""
    bits = np.ones(-(-vocab_size // 32) * 32, bool)
    bits[:vocab_size] = np.isin(np.arange(vocab_size), ids)
    return np.packbits(bits, bitorder="little").view("<u4")


@pytest.fixture
def ops(backend):
    arguments = BACKENDS[backend][0]
    ops = make_ops(arguments["device"], arguments.get("arch"), None, False)
    yield ops
    ops.close()


def handle(ops, array):
    """A host array as this backend's operations give theirs."""
    return ops.gpu.upload(array) if ops.name == "cuda" else array


def drawn(ops, logits, rows, steps):
    """int [steps, R]: draws from the same logits, which stay as they are."""
    held, sampler = handle(ops, logits.copy()), ops.sampler(rows, logits.shape[1])
    ids = np.stack([ops.fetch(ops.sample(held, sampler)).result() for _ in range(steps)])
    np.testing.assert_array_equal(ops.fetch(held).result(), logits)
    return ids


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
    ("logit_bias", 3), ("logit_bias", "ab"), ("logit_bias", {-1: 0}), ("logit_bias", {1.5: 0}),
    ("logit_bias", {"1": 0}), ("logit_bias", {1: 100.5}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: True}),
    ("logit_bias", {1: "2"}),
    ("logit_bias", ((1, 2), (1, 3))), ("logit_bias", dict.fromkeys(range(1025), 1)),
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
    assert Sampling(logit_bias=None).logit_bias == ()
    biased = Sampling(logit_bias={9: np.float32(-2.5), np.int64(3): 100})
    assert biased.logit_bias == ((3, 100.0), (9, -2.5)) and hash(biased) == hash(replace(biased, stop=()))
    assert len(Sampling(logit_bias=dict.fromkeys(range(1024), 1)).logit_bias) == 1024
    biased.check_vocabulary(10)
    with pytest.raises(Fp4rtError, match="logit_bias names token 9; this model's ids are 0 to 8"):
        biased.check_vocabulary(9)
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


def test_penalties_then_bias_then_mask():
    logits = np.array([2.0, -2.0, 1.0, -1.0, 0.5], np.float32)
    before = logits.copy()
    settings = row(repetition_penalty=2.0, prompt=[0, 1], logit_bias=((0, -3.0), (3, 2.5), (4, 100.0)),
                   mask=mask_of([0, 1, 3], 5))
    assert adjust(logits, settings).tolist() == [-2.0, -4.0, -math.inf, 1.5, -math.inf]
    assert draw(logits, replace(settings, temperature=0.0)) == 3
    assert (logits == before).all()


def test_what_a_mask_forbids_is_never_kept():
    z = np.array([1, -np.inf, 3, -np.inf, -np.inf, 2], np.float32)
    for top_k, top_p in ((0, 1.0), (5, 1.0), (4, 0.9999999), (3, 1.0), (0, 0.9999999)):
        assert keep(z, top_k, top_p, 0.0).tolist() == [0, 2, 5]
    assert keep(z, 2, 1.0, 0.0).tolist() == [2, 5] and keep(z, 0, 0.5, 0.0).tolist() == [2]


@each_backend
def test_a_bias_forbids_and_forces(ops):
    vocab_size = 500
    logits = np.random.default_rng(0).normal(0, 3, (6, vocab_size)).astype(np.float32)
    best = logits.argmax(axis=1)
    ids = drawn(ops, logits, [
        row(temperature=0.0, logit_bias=((int(best[0]), -100.0),)), row(temperature=0.0, logit_bias=((499, 100.0),)),
        row(logit_bias=((int(best[2]), -100.0),)), row(logit_bias=((0, 100.0),)),
        row(temperature=0.0), row(logit_bias=tuple((i, 100.0) for i in range(3)), top_p=0.999)], 200)
    assert (ids[:, 0] == np.argsort(logits[0])[-2]).all() and (ids[:, 1] == 499).all()
    assert (ids[:, 2] != best[2]).all() and len(set(ids[:, 2].tolist())) > 10 and (ids[:, 3] == 0).all()
    assert (ids[:, 4] == best[4]).all() and set(ids[:, 5].tolist()) == {0, 1, 2}


@each_backend
def test_biased_draws_follow_the_softmax(ops):
    probability = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625])
    n = 1000
    logits = np.tile(np.log(probability).astype(np.float32), (n, 1))
    bias = ((0, -math.log(4)), (4, math.log(4)))  # a fourth, four times
    expected = probability * [0.25, 1, 1, 1, 4] / (probability * [0.25, 1, 1, 1, 4]).sum()
    (ids,) = drawn(ops, logits, [row(seed=i, logit_bias=bias) for i in range(n)], 1)
    assert np.abs(np.bincount(ids, minlength=5) / n - expected).max() < 5 * math.sqrt(0.25 / n)


@each_backend
@pytest.mark.parametrize("vocab_size", [3, 64, 1003])
def test_a_mask_never_lets_a_forbidden_token_out(ops, vocab_size):
    rng = np.random.default_rng(vocab_size)
    settings = [dict(), dict(temperature=0.0), dict(top_k=3), dict(top_k=vocab_size - 1), dict(top_p=0.9999999),
                dict(min_p=1e-9),
                dict(temperature=100.0, top_k=40, top_p=0.95, logit_bias=((0, 100.0), (2, -50.0)),
                     presence_penalty=9.0),
                dict(temperature=1e-3, repetition_penalty=5.0, logit_bias=((1, 100.0),))]
    allowed = [np.sort(rng.choice(vocab_size, max(1, vocab_size // 7), replace=False)) for _ in settings]
    rows = [row(mask=mask_of(ids, vocab_size), **changes) for ids, changes in zip(allowed, settings)]
    logits = rng.normal(0, 4, (len(rows), vocab_size)).astype(np.float32)
    ids = drawn(ops, logits, rows, 1000)
    for r, only in enumerate(allowed):
        assert np.isin(ids[:, r], only).all()
    assert vocab_size == 3 or len(set(ids[:, 6].tolist())) > min(5, len(allowed[6]) - 1)
    assert (ids[:, 1] == allowed[1][logits[1][allowed[1]].argmax()]).all()
    assert (drawn(ops, logits, rows, 20) == ids[:20]).all()


@each_backend
def test_a_mask_is_copied_and_refilled(ops):
    logits = np.zeros((2, 70), np.float32)
    words = mask_of([69], 70)
    sampler = ops.sampler([row(mask=words), row(temperature=0.0)], 70)
    words[:] = 0
    held = handle(ops, logits)
    assert ops.fetch(ops.sample(held, sampler)).result().tolist() == [69, 0]
    sampler = ops.sampler([row(temperature=0.0), row(mask=mask_of([33], 70), logit_bias=((5, 1.0),))], 70, into=sampler)
    assert ops.fetch(ops.sample(held, sampler)).result().tolist() == [0, 33]
    sampler = ops.sampler([row(temperature=0.0, logit_bias=((5, 1.0),)), row(temperature=0.0)], 70, into=sampler)
    assert ops.fetch(ops.sample(held, sampler)).result().tolist() == [5, 0]


@each_backend
def test_a_history_goes_on_where_rows_change_places(ops):
    """What is drawn counts for a sequence wherever its row lies, though the host never tells."""
    penalties = dict(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4)
    seen = [([1, 2], []), ([], [3, 3]), ([5], [6])]
    logits = np.random.default_rng(4).normal(0, 2, (3, 9)).astype(np.float32)
    histories = [ops.history(prompt, generated, 9) for prompt, generated in seen]
    generated, sampler = [list(ids) for _, ids in seen], ops.sampler([row()] * 4, 9)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2], [0, 1]):
        sampler = ops.sampler([row(**penalties, history=histories[i]) for i in order], 9, into=sampler)
        held = handle(ops, logits[order])
        for _ in range(2):
            ids = ops.fetch(ops.sample(held, sampler)).result().tolist()
            assert ids == [draw(logits[i], row(**penalties, prompt=seen[i][0], generated=generated[i])) for i in order]
            for i, token in zip(order, ids):
                generated[i].append(token)
    assert len(set(map(tuple, generated))) == 3


@each_backend
def test_rows_beyond_those_that_were_put_are_greedy(ops):
    logits = np.random.default_rng(4).normal(0, 2, (3, 70)).astype(np.float32)
    sampler = ops.sampler([row(repetition_penalty=3.0, prompt=range(70))] * 4, 70)
    sampler = ops.sampler([row(mask=mask_of([69], 70))], 70, into=sampler)
    assert ops.fetch(ops.sample(handle(ops, logits), sampler)).result().tolist() == [69, *logits[1:].argmax(1)]


@each_backend
def test_a_batch_is_fed_what_was_drawn(ops):
    logits = np.zeros((3, 70), np.float32)
    logits[[0, 2], [7, 9]], logits[1] = 1, np.nan  # draws 7, nothing, 9
    ids = ops.sample(handle(ops, logits), ops.sampler([row(temperature=0.0)] * 3, 70))
    places = np.arange(5, dtype=np.int32)
    batch = ops.batch(Batch(np.array([-3, 8, -1, -2, -3], np.int32), places, np.arange(6, dtype=np.int32), places + 1,
                            np.ones((1, 5, 1), np.int32), places, places))
    ops.feed(batch, ids)
    assert ops.fetch(batch.tokens).result().tolist() == [9, 8, 7, 0, 9]


@each_backend
@pytest.mark.parametrize("changes, message", [
    (dict(mask=np.zeros(3, np.uint32)), "allows no token"),
    (dict(mask=np.array([0, 0, 0xFFFFFFC0], np.uint32)), "allows no token"),  # bits beyond the vocabulary alone
    (dict(mask=np.ones(2, np.uint32)), r"mask is uint32 \[2\]"), (dict(mask=np.ones(3, np.int32)), "mask is int32"),
    (dict(logit_bias=((70, 1.0),)), "logit_bias names token 70"),
])
def test_rows_that_cannot_be_drawn_are_refused(ops, changes, message):
    with pytest.raises(Fp4rtError, match=message) as caught:
        ops.sampler([row(), row(**changes)], 70)
    assert caught.value.kind == "request"


@each_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_under_a_mask(ops, bad):
    logits = np.zeros((2, 70), np.float32)
    logits[0, 69] = bad  # though it is forbidden
    assert drawn(ops, logits, [row(mask=mask_of([3], 70))] * 2, 1).tolist() == [[-1, 3]]


@each_backend
@pytest.mark.parametrize("vocab_size", [1, 40, 1024, 5001, 128256])
def test_logprobs(ops, vocab_size):
    """Against float64, with clusters of likely ids in one thread's share, and with ties."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(0, 4, (5, vocab_size)).astype(np.float32)
    logits[1] = rng.integers(-2, 3, vocab_size)
    logits[2, 7 % vocab_size::1024] += 40
    logits[3] -= 1000
    logits[4] = -0.0
    ids = rng.integers(0, vocab_size, 5).astype(np.int32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) \
        + exact.max(axis=1, keepdims=True)
    for top in (0, 1, 5, 20):
        if top > vocab_size:
            with pytest.raises(Fp4rtError, match=f"must be 0 to {vocab_size}"):
                ops.logprobs(handle(ops, logits), handle(ops, ids), top)
            continue
        for chosen in (handle(ops, ids), ids):
            got = ops.fetch(ops.logprobs(handle(ops, logits), chosen, top)).result()
            assert got.shape == (5, 1 + 2 * top) and got.dtype == np.float32
            likely = np.argsort(-logits, axis=1, kind="stable")[:, :top]
            assert (got[:, 1:1 + top] == likely).all()
            expected = np.concatenate([exact[np.arange(5), ids][:, None], np.take_along_axis(exact, likely, 1)], 1)
            assert np.abs(np.delete(got, np.s_[1:1 + top], 1) - expected).max() <= 5e-6 * max(1, np.abs(expected).max())
    with pytest.raises(Fp4rtError, match="21 likeliest"):
        ops.logprobs(handle(ops, logits), handle(ops, ids), 21)


@each_backend
def test_logprobs_of_rows_that_are_no_numbers(ops):
    logits = np.zeros((5, 3000), np.float32)
    logits[1, 2999], logits[2, 0], logits[3, 5] = np.nan, np.inf, -np.inf
    got = ops.fetch(ops.logprobs(handle(ops, logits), np.array([1, 1, 1, 1, -1], np.int32), 2)).result()
    assert np.isnan(got[1:]).all()
    assert got[0] == pytest.approx([-math.log(3000), 0, 1, -math.log(3000), -math.log(3000)], rel=1e-6)

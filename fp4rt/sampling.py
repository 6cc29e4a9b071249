"""How the next token is chosen: the options a caller may give, and their exact meaning on the host.

`draw` is the definition that every backend's sampler follows, and `logprobs` that of what it reports. Top-p (nucleus):
Holtzman et al. 2020; min-p: Nguyen et al. 2024; repetition penalty: Keskar et al. 2019; Gumbel-max trick: Gumbel 1954;
random stream: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from fp4rt.errors import Fp4rtError

if TYPE_CHECKING:
    from fp4rt.ops import SamplerRow

# What a number may be: (whole, least, most, in words). The bounds keep every intermediate finite in float32.
_RANGES = {
    "max_tokens": (True, 1, 2**31 - 1, "a whole number, at least 1"),
    "temperature": (False, 0.0, 1e6, "0 (greedy) or a number from 0.001 to 1000000"),
    "top_k": (True, 0, 2**31 - 1, "a whole number, 0 (off) or more"),
    "top_p": (False, 1e-6, 1.0, "a number above 0 and at most 1 (off)"),
    "min_p": (False, 0.0, 1.0, "a number from 0 (off) to 1"),
    "repetition_penalty": (False, 0.01, 100.0, "a number from 0.01 to 100 (1 is off)"),
    "presence_penalty": (False, -100.0, 100.0, "a number from -100 to 100 (0 is off)"),
    "frequency_penalty": (False, -100.0, 100.0, "a number from -100 to 100 (0 is off)"),
    "seed": (True, 0, 2**64 - 1, "a whole number from 0 to 2**64 - 1"),
}
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0}
MAX_BIASES = 1024       # ids that one row's logit_bias may hold
MAX_LOGPROBS = 20       # likeliest ids of a row whose log-probabilities may be asked for
_MIN_TEMPERATURE = 1e-3  # below it logits / temperature may leave float32; 0 says what is meant


def _number(name: str, value: Any) -> int | float:
    """`value` as a Python number within the option's range, or Fp4rtError("request") naming the option."""
    whole, least, most, words = _RANGES[name]
    kind = Integral if whole else Real
    if isinstance(value, kind) and not isinstance(value, (bool, np.bool_)):
        number = int(value) if whole else float(value)
        if least <= number <= most and not (name == "temperature" and 0 < number < _MIN_TEMPERATURE):
            return number
    raise Fp4rtError("request", f"{name} is {value!r}; it must be {words}", name)


def _biases(given: Mapping[int, float] | Iterable[tuple[int, float]] | None) -> tuple[tuple[int, float], ...]:
    """logit_bias as pairs by ascending id, or Fp4rtError("request") saying what is wrong in it."""
    words = f"it must be numbers from -100 to 100 for at most {MAX_BIASES} different token ids"
    try:
        pairs = [(token, bias) for token, bias in (given.items() if isinstance(given, Mapping) else given or ())]
    except (TypeError, ValueError):
        raise Fp4rtError("request", f"logit_bias is {given!r}; {words}") from None
    if len(pairs) > MAX_BIASES:
        raise Fp4rtError("request", f"logit_bias is for {len(pairs)} tokens; {words}")
    kept: dict[int, float] = {}
    for token, bias in pairs:
        if not (isinstance(token, Integral) and isinstance(bias, Real) and token >= 0 and -100 <= bias <= 100) \
                or isinstance(token, bool) or isinstance(bias, bool) or token in kept:
            raise Fp4rtError("request", f"logit_bias is {bias!r} for token {token!r}; {words}")
        kept[int(token)] = float(bias)
    return tuple(sorted(kept.items()))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when to stop. None means: as the checkpoint's generation_config.json says.

    max_tokens: how many tokens to make at most; None there too: as many as the context holds.
    temperature: 0 is greedy. top_k, top_p, min_p: which ids may be drawn; see `draw`.
    repetition_penalty: for ids in the prompt or generated; presence_, frequency_penalty: for generated ids.
    seed: 64 bits; None is a fresh one each time. The same seed, settings and logits give the same tokens.
    stop: strings that end the text (they are not part of it). ignore_eos: go on after an end-of-text token.
    logit_bias: {id: number from -100 to 100}, added to these ids' logits; kept as pairs by ascending id.
    Raises Fp4rtError("request") naming the option and its value.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = ()

    def __post_init__(self) -> None:
        for name in _RANGES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value))
        stop = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise Fp4rtError("request", f"stop is {self.stop!r}; it must be one or several strings, none empty")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.ignore_eos, bool):
            raise Fp4rtError("request", f"ignore_eos is {self.ignore_eos!r}; it must be True or False")
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises Fp4rtError("request") for a logit_bias on an id that the model does not have."""
        _check_ids(self.logit_bias, vocab_size)

    def resolve(self, generation_config: Mapping[str, Any]) -> Sampling:
        """The same with every None settled (max_tokens may stay None), as generation_config.json says.

        do_sample false or absent is temperature 0, as in HF transformers. An absent value is off; HF's own code
        would still apply its library's default of top_k = 50, which no checkpoint's author asked for. Raises
        Fp4rtError("checkpoint") for a nonsense value in the file, unless the caller has chosen that option.
        """
        chosen: dict[str, Any] = {}
        for name in [*_OFF, "max_tokens"]:
            if getattr(self, name) is not None:
                continue
            value = generation_config.get("max_new_tokens" if name == "max_tokens" else name)
            if name == "temperature" and not generation_config.get("do_sample"):
                value = 0.0
            try:
                chosen[name] = _OFF.get(name) if value is None else _number(name, value)
            except Fp4rtError as error:
                raise Fp4rtError("checkpoint", f"generation_config.json: {error}; or set that option") from None
        if self.seed is None:
            chosen["seed"] = secrets.randbits(64)
        return replace(self, **chosen)


def _check_ids(biases: tuple[tuple[int, float], ...], vocab_size: int) -> None:
    outside = [token for token, _ in biases if not 0 <= token < vocab_size]
    if outside:
        raise Fp4rtError("request", f"logit_bias names token {outside[0]}; this model's ids are 0 to {vocab_size - 1}")


def check_row(row: SamplerRow, vocab_size: int) -> None:
    """Raises Fp4rtError("request") for a bias outside the vocabulary, a mask of another size or of no id."""
    _check_ids(row.logit_bias, vocab_size)
    if row.mask is not None:
        words = -(-vocab_size // 32)
        if row.mask.dtype != np.uint32 or row.mask.shape != (words,):
            raise Fp4rtError("request", f"a row's mask is {row.mask.dtype} {list(row.mask.shape)}; it must be uint32 "
                                        f"[{words}], one bit for each of the model's {vocab_size} ids")
        if not allowed(row.mask, vocab_size).any():
            raise Fp4rtError("request", "a row's mask allows no token at all; its grammar is at a dead end")


def allowed(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """bool [V]: bit i % 32 of word i // 32, of a mask uint32 [ceil(V / 32)]."""
    octets = np.ascontiguousarray(mask, "<u4").view(np.uint8)
    return np.unpackbits(octets, count=vocab_size, bitorder="little").view(bool)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four uint32 words per counter, whose words are integers below 2**32 or arrays of them."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low
        c2, c3 = (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(word.astype(np.uint32) for word in np.broadcast_arrays(c0, c1, c2, c3))


def gumbel(ids: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Standard Gumbel numbers, float64, one per id (ids ascending): -log(-log(u)).

    u = ((x >> 8) + 0.5) * 2^-24, where x is word id % 4 of Philox with key (seed low, seed high) and counter
    (step, id // 4, 0, 0). u needs 25 bits: in float32 the largest would round to 1 and its Gumbel number to
    infinity, so it is float64 here and elsewhere must come from 1 - u above one half.
    """
    blocks = ids >> 2
    first = np.concatenate([[True], blocks[1:] != blocks[:-1]])
    words = philox((step & 0xFFFFFFFF, blocks[first], 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    bits = np.stack(words, axis=1)[np.cumsum(first) - 1, ids & 3]
    u = ((bits >> np.uint32(8)) + 0.5) * 2.0**-24
    return -np.log(-np.log(u))


def penalize(logits: np.ndarray, row: SamplerRow) -> np.ndarray:
    """logits float32 [V] under the repetition, then the presence and frequency penalties (a copy if any)."""
    if row.repetition_penalty != 1:
        logits = logits.copy()
        seen = np.unique(np.concatenate([np.asarray(ids, np.int64) for ids in (row.prompt, row.generated)]))
        penalty = np.float32(row.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if (row.presence_penalty or row.frequency_penalty) and len(row.generated):
        logits = logits.copy()
        ids, counts = np.unique(np.asarray(row.generated, np.int64), return_counts=True)
        frequency = np.float32(row.frequency_penalty) * counts.astype(np.float32)
        logits[ids] = logits[ids] - np.float32(row.presence_penalty) - frequency
    return logits


def adjust(logits: np.ndarray, row: SamplerRow) -> np.ndarray:
    """logits float32 [V] under penalties, then logit_bias, then the mask: -inf where it forbids (a copy if any)."""
    adjusted = penalize(logits, row)
    if (row.logit_bias or row.mask is not None) and adjusted is logits:
        adjusted = logits.copy()
    if row.logit_bias:
        ids, biases = zip(*row.logit_bias)
        adjusted[list(ids)] += np.array(biases, np.float32)
    if row.mask is not None:
        adjusted[~allowed(row.mask, len(logits))] = -np.inf
    return adjusted


def keep(z: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The ids (ascending) that may be drawn, from z = logits / temperature, float32 [V]; never one whose z is -inf.

    top_k: every id with z >= the k-th largest z; 0 is off. top_p, over the softmax of what that leaves: an id
    stays if and only if the ids with strictly larger z hold a mass below top_p. min_p: probability >= min_p times
    the largest. All three are thresholds on z, so equal logits always share their fate.
    """
    threshold = np.finfo(np.float32).min
    if 0 < top_k < len(z):
        threshold = max(threshold, np.partition(z, len(z) - top_k)[len(z) - top_k])
    if top_p < 1:
        ranked = np.sort(z[z >= threshold])[::-1]
        mass = np.exp(ranked.astype(np.float64) - ranked[0])
        mass /= mass.sum()
        first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))  # of each run of equal z
        above = np.concatenate([[0.0], np.cumsum(mass)])[first]
        threshold = ranked[first[np.count_nonzero(above < top_p) - 1]]
    kept = np.flatnonzero(z >= threshold)
    if min_p > 0:
        kept = kept[z[kept].astype(np.float64) - z.max() >= math.log(min_p)]
    return kept


def draw(logits: np.ndarray, row: SamplerRow) -> int:
    """The next id from logits float32 [V], or -1 where they hold a NaN or an infinity (the mask's -inf come after).

    First `adjust`: penalties, logit_bias, mask. Temperature 0: the largest logit. Otherwise z = logits / temperature,
    and of the ids that `keep` leaves the one with the largest z + gumbel: a draw from their softmax. Ties go to the
    lowest id.
    """
    if not np.isfinite(logits).all():
        return -1
    logits = adjust(logits, row)
    if row.temperature == 0:
        return int(np.argmax(logits))
    z = logits / np.float32(row.temperature)
    kept = keep(z, row.top_k, row.top_p, row.min_p)
    return int(kept[np.argmax(z[kept] + gumbel(kept, row.seed, row.step))])


def logprobs(logits: np.ndarray, token: int, top: int) -> np.ndarray:
    """One row of Ops.logprobs, float32 [1 + 2 top], from the model's own logits float32 [V]."""
    if token < 0 or not np.isfinite(logits).all():
        return np.full(1 + 2 * top, np.nan, np.float32)
    exact = logits.astype(np.float64)
    exact -= exact.max() + math.log(np.exp(exact - exact.max()).sum())
    likely = np.flatnonzero(logits >= np.partition(logits, -top)[-top]) if top else np.empty(0, np.intp)
    likely = likely[np.argsort(-logits[likely], kind="stable")][:top]
    return np.concatenate([exact[[token]], likely, exact[likely]], dtype=np.float32, casting="same_kind")


def check_logprobs(top: int, vocab_size: int) -> None:
    """Raises Fp4rtError("request") for more log-probabilities of likeliest ids than Ops.logprobs gives."""
    most = min(MAX_LOGPROBS, vocab_size)
    if not 0 <= top <= most:
        raise Fp4rtError("request", f"log-probabilities of the {top} likeliest ids; it must be 0 to {most}")

"""How well a model predicts a text: perplexity with its error, and the divergence from another run of the same text.

A text longer than the window is read in overlapping windows: each predicts the tokens that the one before did not
reach, with the tokens before them as context (the strided evaluation of Baevski and Auli 2019).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp4rt.errors import Fp4rtError
from fp4rt.llm import LLM

WINDOW = 512        # tokens, unless told: what is held at once is window x vocabulary logits
KEPT = 256          # of each distribution the likeliest ids, and the probability of all others together
ROWS = 64           # distributions worked on at a time
VERSION = 1


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions of one run, compactly: the likeliest ids of each and what is left.

    ids int32 [T]: the text. window, stride: how it was read. nll float64 [n]: minus log probability of each predicted
    token, ids[1:] in order. top int32 [n, k], log_probabilities float32 [n, k]: the likeliest ids, likeliest first;
    rest float32 [n]: the probability of all other ids together.
    """

    ids: np.ndarray
    window: int
    stride: int
    nll: np.ndarray
    top: np.ndarray
    log_probabilities: np.ndarray
    rest: np.ndarray

    def save(self, path: Path) -> None:
        """Write an .npz. Raises Fp4rtError("request") where that is not possible."""
        try:
            with path.open("wb") as stream:
                np.savez(stream, version=VERSION, **self.__dict__)
        except OSError as error:
            raise Fp4rtError("request", f"{path}: cannot be written ({error.strerror})") from None

    @staticmethod
    def load(path: Path, vocab_size: int) -> Distributions:
        """What `save` wrote. Raises Fp4rtError("request") for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                fields = {name: file[name] for name in ("version", *Distributions.__dataclass_fields__)}
            version, window, stride = (int(fields.pop(name)) for name in ("version", "window", "stride"))
        except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or "not a file that --save-logits wrote"
            raise Fp4rtError("request", f"{path}: cannot be read ({reason})") from None
        found = Distributions(window=window, stride=stride, **fields)
        n, k = found.nll.size, found.top.shape[-1] if found.top.ndim == 2 else 0
        expected = {"ids": (n + 1,), "nll": (n,), "top": (n, k), "log_probabilities": (n, k), "rest": (n,)}
        if version != VERSION or not n or not k or any(getattr(found, name).shape != shape
                                                       for name, shape in expected.items()):
            raise Fp4rtError("request", f"{path}: not a file that this version's --save-logits wrote; write it again")
        if found.top.min() < 0 or found.top.max() >= vocab_size:
            raise Fp4rtError("request", f"{path}: holds token ids beyond this model's vocabulary of {vocab_size}; it is "
                                        "of another model")
        return found


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error (tokens taken as independent)."""

    mean: float
    error: float

    @staticmethod
    def of(values: np.ndarray) -> Estimate:
        error = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else float("inf")
        return Estimate(float(values.mean()), float(error))


@dataclass(frozen=True)
class Comparison:
    """This run against a reference run of the same text.

    divergence: KL(reference || this) in nats, over the reference's likeliest ids and all others as one: a lower bound
    of the full divergence, and equal to it where the others are given alike. top_agreement: how often both have the
    same likeliest id. nll_difference: this minus the reference, token by token.
    """

    divergence: Estimate
    top_agreement: Estimate
    nll_difference: Estimate


@dataclass(frozen=True)
class Result:
    """tokens: how many were predicted. nll in nats. perplexity: exp(nll), its error to first order."""

    tokens: int
    nll: Estimate
    comparison: Comparison | None

    @property
    def perplexity(self) -> Estimate:
        value = float(np.exp(self.nll.mean))
        return Estimate(value, value * self.nll.error)


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first): read ids[begin:end], predict ids[first:end]; in all, every id but the first once."""
    found = [(0, min(window, tokens), 1)]
    while found[-1][1] < tokens:
        begin, end = found[-1][0] + stride, found[-1][1]
        found.append((begin, min(begin + window, tokens), end))
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 log probabilities of float32 logits [n, V]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _likeliest(log_p: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of each row, largest first, the lower id first among equals; int32 [n, count]."""
    if count < log_p.shape[1]:
        some = np.argpartition(-log_p, count - 1, axis=1)[:, :count]
        some.sort(axis=1)
    else:
        some = np.broadcast_to(np.arange(log_p.shape[1]), log_p.shape)
    order = np.argsort(-np.take_along_axis(log_p, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1).astype(np.int32)


def _divergence(log_p: np.ndarray, top: np.ndarray, reference: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """KL(reference || this) [n]: log_p float64 [n, V] of this run; the reference's top ids, their logs, the rest."""
    here = np.take_along_axis(log_p, top, 1)
    reference, rest = reference.astype(np.float64), rest.astype(np.float64)
    others = np.maximum(1 - np.exp(here).sum(axis=1), 0)
    tail = np.where(rest > 0, rest * (np.log(np.maximum(rest, 1e-300)) - np.log(np.maximum(others, 1e-12))), 0)
    return (np.exp(reference) * (reference - here)).sum(axis=1) + tail


def measure(llm: LLM, ids: Sequence[int], *, window: int | None = None, stride: int | None = None,
            reference: Distributions | None = None, keep: bool = False,
            progress: Callable[[list], Iterable] = lambda items: items) -> tuple[Result, Distributions | None]:
    """Perplexity of ids[1:] given what stands before them, within windows.

    window: tokens of context at most (512, or the model's room if that is less); stride: by how much it moves on (half
    of it). reference: another run to compare with, of the same ids, window and stride. keep: return this run's
    distributions too. Raises Fp4rtError.
    """
    if len(ids) < 2:
        raise Fp4rtError("request", f"the text has {len(ids)} tokens; at least 2 are needed to predict one")
    window = min(WINDOW, llm.max_model_len) if window is None else window
    if not 2 <= window <= llm.max_model_len:
        raise Fp4rtError("request", f"--window is {window}; 2 to {llm.max_model_len} tokens fit")
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride < window:
        raise Fp4rtError("request", f"--stride is {stride}; with --window {window} it must be 1 to {window - 1}")
    if reference is not None and ((reference.window, reference.stride) != (window, stride)
                                  or not np.array_equal(reference.ids, ids)):
        raise Fp4rtError("request", "the reference run read another text, or in other pieces: its --window is "
                         f"{reference.window}, its --stride {reference.stride}, its text {reference.ids.size} tokens; "
                         f"here it is {window}, {stride}, {len(ids)}")
    ids = np.asarray(ids, np.int32)
    kept = min(KEPT, llm.engine.model.config.vocab_size)
    names = ("nll", "top", "log_probabilities", "rest", "kl", "same")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for begin, end, first in progress(windows(ids.size, window, stride)):
        logits = llm.logits(ids[begin:end])
        for row in range(first, end, ROWS):
            targets = np.arange(row, min(row + ROWS, end))
            log_p = log_softmax(logits[targets - 1 - begin])
            parts["nll"].append(-log_p[np.arange(targets.size), ids[targets]])
            if keep:
                top = _likeliest(log_p, kept)
                some = np.take_along_axis(log_p, top, 1)
                rest = np.maximum(1 - np.exp(some).sum(axis=1), 0) if kept < log_p.shape[1] else np.zeros(len(top))
                parts["top"].append(top)
                parts["log_probabilities"].append(some.astype(np.float32))
                parts["rest"].append(rest.astype(np.float32))
            if reference is not None:
                where = targets - 1
                parts["kl"].append(_divergence(log_p, reference.top[where], reference.log_probabilities[where],
                                               reference.rest[where]))
                parts["same"].append(log_p.argmax(axis=1) == reference.top[where, 0])
    joined: dict[str, Any] = {name: np.concatenate(part) for name, part in parts.items() if part}
    comparison = None
    if reference is not None:
        comparison = Comparison(Estimate.of(joined["kl"]), Estimate.of(joined["same"].astype(np.float64)),
                                Estimate.of(joined["nll"] - reference.nll))
    result = Result(joined["nll"].size, Estimate.of(joined["nll"]), comparison)
    if not keep:
        return result, None
    return result, Distributions(ids, window, stride, joined["nll"], joined["top"], joined["log_probabilities"],
                                 joined["rest"])

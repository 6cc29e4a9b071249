"""What an application holds: load a checkpoint, then generate, stream, chat, or look at logits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence as SequenceOf
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.checkpoint import Checkpoint, read_json
from fp4rt.engine import Engine, Sequence
from fp4rt.errors import Fp4rtError, shown
from fp4rt.loading import Loader
from fp4rt.models import load_model, read_config
from fp4rt.ops import Ops
from fp4rt.ops.select import make_ops
from fp4rt.room import DEFAULT_CONTEXT, check_context, check_count, make_engine, parse_size
from fp4rt.sampling import Sampling
from fp4rt.session import Session
from fp4rt.source import resolve
from fp4rt.text import Piece, Splitter, StopStrings, Text

Message = dict[str, Any]
Prompt = str | SequenceOf[int]


@dataclass(frozen=True)
class Output:
    """What came of one prompt.

    ids: the generated token ids, the stop id included. text: without special tokens, and up to a stop string; in a
    chat the answer alone. reasoning: what a chat's model thought before, "" where it did not; stop strings do not
    count in it. finish_reason: "stop" (a stop id or stop string) or "length" (max_tokens, or the context is full).
    """

    ids: list[int]
    text: str
    reasoning: str
    finish_reason: str
    prompt_tokens: int


@dataclass
class Timing:
    """When things happened in the newest call, in seconds; for the command line's last line and for `fp4rt bench`."""

    started: float = 0.0
    first_token: float = 0.0
    prefilled: float = 0.0  # when the last sequence drew its first token
    finished: float = 0.0
    prompt_tokens: int = 0   # that were computed: not those found in the prefix cache
    generated_tokens: int = 0
    decoded_tokens: int = 0  # of those, after `prefilled`

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, until every sequence has its first token."""
        return self.prompt_tokens / max(self.prefilled - self.started, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens per second of all sequences together, once every one has its first; 0 where none came later."""
        return self.decoded_tokens / max(self.finished - self.prefilled, 1e-9) if self.decoded_tokens else 0.0


def load(model: str | Path, *, device: str = "auto", arch: str | None = None, max_model_len: int | None = None,
         gpu_memory: int | str | None = None, deterministic: bool = False, kv_dtype: str = "auto",
         scale_layout: str = "auto", revision: str | None = None, lm_head: str | None = None,
         requantize: str | None = None, kv_tokens: int | str | None = None, max_num_seqs: int | None = None,
         max_num_batched_tokens: int | None = None, prefix_caching: bool = True, snapshots: int | None = None,
         speculate: int = 0, progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items) -> LLM:
    """Load a checkpoint: a directory, a Hugging Face repository id, or "demo".

    device: "auto" (CUDA where an NVIDIA driver answers, else CPU), "cuda", "cpu" or "reference".
    arch: "sm_75", "sm_80", "sm_86", "sm_89": run that generation's code path and limits on a newer GPU.
    max_model_len: tokens of context to make room for; by default min(the model's, 8192, what free memory allows).
    gpu_memory: bytes (or "14.5GiB") that weights, cache and workspace may take together.
    deterministic: bit-equal tokens under any batching, at a cost. scale_layout: "auto", "linear" or "swizzled".
    kv_dtype: "auto" keeps keys and values in fp16 (on a CPU in float32), "fp8" in one byte each: E4M3, by the
    checkpoint's scales where it has them.
    lm_head: "nvfp4" or "fp8": quantize an unquantized head as it is loaded. requantize: "bf16-layers=nvfp4" or
    "bf16-layers=fp8": so for the other unquantized linears, but routers. Both trade quality for speed.
    kv_tokens: tokens that all sequences together may remember; by default max_model_len, "all": as many as memory
    allows. max_num_seqs: sequences that may run in one step. max_num_batched_tokens: tokens of one step; a prompt that
    is longer takes several. prefix_caching: keep what was remembered while there is room, for prompts that begin alike.
    snapshots: of recurrent state, where models that have it begin such prompts; by default what 1 GiB holds, 2 to 16
    of them, or fewer where they do not fit beside the context.
    speculate: how many tokens to guess at once from what the text said before, checked in one step: faster where it
    repeats itself, not for models with recurrent layers. progress: wraps the iteration over layers. Raises Fp4rtError.
    """
    started = time.perf_counter()
    if scale_layout not in ("auto", "linear", "swizzled"):
        raise Fp4rtError("request", f"scale_layout is {scale_layout!r}; it must be auto, linear or swizzled")
    budget = parse_size(gpu_memory)
    requantizer = None
    if lm_head is not None or requantize is not None:
        from fp4rt.quantize import make_requantizer

        requantizer = make_requantizer(lm_head, requantize)
    checkpoint = Checkpoint(resolve(str(model), revision=revision), scale_layout=scale_layout)
    _, sizes = read_config(checkpoint)
    longest = sizes.max_position_embeddings
    check_context(max_model_len, longest)
    check_count("max_num_seqs", max_num_seqs, 1024)
    check_count("max_num_batched_tokens", max_num_batched_tokens, 1 << 16)
    check_count("snapshots", snapshots or None, 4096)
    check_count("speculate", speculate or None, 32)
    room = max_model_len or min(longest, DEFAULT_CONTEXT)
    ops = make_ops(device, arch, budget, deterministic)
    try:
        loader = Loader(ops, kv_dtype, *([requantizer] if requantizer else []))
        positions = max(room, PAGE_TOKENS)  # a recorded step may be padded by as many tokens as a page holds
        decoder = load_model(checkpoint, loader, positions, progress)
        if requantizer:
            requantizer.finish()
        engine, context, workspace = make_engine(
            ops, decoder, room, must=max_model_len is not None, kv_tokens=kv_tokens, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, prefix_caching=prefix_caching, snapshots=snapshots,
            speculate=speculate)
        return LLM(checkpoint, ops, loader, engine, context, workspace, time.perf_counter() - started)
    except BaseException:
        ops.close()
        raise


class LLM:
    """A loaded model. A context manager; `close()` gives all memory back. Calls from several threads take turns.

    A process that is forked off cannot use it: load one there, after a spawn.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Ops, loader: Loader, engine: Engine, context: int,
                 workspace: int, load_seconds: float):
        self.checkpoint, self.ops = checkpoint, ops
        self._engine: Engine | None = engine
        self.max_model_len = context
        self.load_seconds, self.workspace_bytes = load_seconds, workspace
        self.step_bytes, self.token_flops, self.linears = loader.step_bytes, loader.token_flops, loader.linears
        self.weight_bytes = loader.weight_bytes
        self.timing = Timing()
        path = checkpoint.path / "generation_config.json"
        self.generation_config = read_json(path) if path.is_file() else {}
        self._text: Text | None = None
        self._lock, self._owner = threading.Lock(), None
        # Held while the engine works for a call, not while a stream waits to go on; a finalizer may come in between.
        self._working = threading.RLock()
        cache = engine.cache
        room = f"{context} tokens" if cache.tokens < context + PAGE_TOKENS else (
            f"{cache.tokens} tokens, {context} of one sequence at most")
        if context < (longest := engine.model.config.max_position_embeddings):
            room += f" (the model takes {longest}: max_model_len)"
        self.report = [
            f"{checkpoint.path.name}: {checkpoint.config['model_type']} on {ops.device}", *loader.report(),
            f"weights {self.weight_bytes / 1e6:.1f} MB, K/V {cache.nbytes / 1e6:.1f} MB for {room}, "
            f"workspace {workspace / 1e6:.1f} MB",
            *([f"recurrent state: {cache.num_slots} slots and {cache.num_snapshots} snapshots of "
               f"{cache.plan.slot_bytes / 1e6:.1f} MB each, counted with the K/V"] if cache.plan.slot_bytes else []),
            *([ops.notice] if ops.notice else [])]

    @property
    def engine(self) -> Engine:
        """What runs the sequences. Raises Fp4rtError once this LLM is closed."""
        return self._check_open()

    def _check_open(self) -> Engine:
        engine = self._engine  # another thread may close it now
        if engine is None:
            raise Fp4rtError("request", "this LLM is closed")
        return engine

    # -- Text ---------------------------------------------------------------------------------------------------

    @property
    def has_text(self) -> bool:
        return (self.checkpoint.path / "tokenizer.json").is_file()

    @property
    def text(self) -> Text:
        """Tokenizer, chat template and stop ids. Raises Fp4rtError where the checkpoint has no tokenizer."""
        self._check_open()
        if self._text is None:
            self._text = Text(self.checkpoint.path, self.checkpoint.config)
        return self._text

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked: text goes through the tokenizer, ids must be within the vocabulary."""
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        vocab = self.engine.model.config.vocab_size
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
            raise Fp4rtError("request", f"a prompt is {shown(prompt)}; it must be text or token ids", param="prompt")
        prompt = list(prompt)
        ids = [int(i) if isinstance(i, (int, np.integer)) and not isinstance(i, bool) else -1 for i in prompt]
        for given, i in zip(prompt, ids):
            if not 0 <= i < vocab:
                raise Fp4rtError("request", f"prompt holds {given!r}; token ids are whole numbers from 0 to {vocab - 1}",
                                 param="prompt")
        return ids

    # -- Generating ---------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt | SequenceOf[Prompt], sampling: Sampling | None = None) -> list[Output]:
        """Continue a prompt (text or ids) or several together; one Output for each, in their order."""
        single = isinstance(prompt, str) or _is_ids(prompt) or not isinstance(prompt, Iterable)
        prompts = [prompt] if single else list(prompt)
        if not prompts:
            raise Fp4rtError("request", "no prompt was given")
        return self._collect([self.sequence(self.encode(one), sampling, i) for i, one in enumerate(prompts)])

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Continue one prompt, yielding text as whole characters become known."""
        with closing(self.pieces(self.sequence(self.encode(prompt), sampling))) as pieces:
            yield from (text for _, text in pieces)

    def chat(self, messages: SequenceOf[Message], sampling: Sampling | None = None, *, think: bool | None = None,
             **template_arguments: Any) -> Output:
        """The assistant's reply to messages, through the checkpoint's own chat template.

        think: whether to reason before the answer; None is as the template does by itself. template_arguments: what
        else it looks at, such as reasoning_effort. Raises Fp4rtError("request") where it cannot be told.
        """
        ids = self.text.encode_chat(messages, think=think, **template_arguments)
        return self._collect([self.sequence(ids, sampling)], [self.text.splitter(ids)])[0]

    def stream_chat(self, messages: SequenceOf[Message], sampling: Sampling | None = None, *,
                    think: bool | None = None, **template_arguments: Any) -> Iterator[Piece]:
        """`chat`, yielding pieces as they become known: ("reasoning", text) and ("answer", text)."""
        ids = self.text.encode_chat(messages, think=think, **template_arguments)
        yield from self.pieces(self.sequence(ids, sampling), self.text.splitter(ids))

    def session(self, sampling: Sampling | None = None) -> Session:
        """A conversation whose keys and values are kept between turns."""
        return Session(self, sampling)

    def logits(self, ids: SequenceOf[int]) -> np.ndarray:
        """float32 [len(ids), vocab_size]: the next-token logits at every position."""
        ids = self.encode(ids)
        self._check_length(ids)
        with self.turn(), self._working:
            return self.engine.logits(ids)

    def sequence(self, ids: list[int], sampling: Sampling | None, index: int = 0) -> Sequence:
        """What the engine runs for a prompt, checked and resolved; prompts of one call draw from different streams."""
        self._check_length(ids, need=1)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise Fp4rtError("request", f"sampling is a {type(sampling).__name__}; give an fp4rt.Sampling")
        resolved = (sampling or Sampling()).resolve(self.generation_config)
        resolved.check_vocabulary(self.engine.model.config.vocab_size)
        limit = self.max_model_len
        if resolved.max_tokens is not None:
            limit = min(limit, len(ids) + resolved.max_tokens)
        stop_ids = frozenset(self._stop_ids()) if not resolved.ignore_eos else frozenset()
        return Sequence(ids, resolved, (resolved.seed + index) % 2**64, stop_ids, limit)

    def _stop_ids(self) -> Iterable[int]:
        if self.has_text:
            return self.text.stop_ids
        stated = [source.get("eos_token_id") for source in (self.generation_config, self.checkpoint.config)]
        return [i for one in stated for i in (one if isinstance(one, list) else [one]) if isinstance(i, int)]

    def _check_length(self, ids: list[int], need: int = 0) -> None:
        if not ids:
            raise Fp4rtError("request", "the prompt has no tokens")
        if len(ids) + need > self.max_model_len:
            raise Fp4rtError("request", f"the prompt has {len(ids)} tokens; the context holds {self.max_model_len}"
                             f"{', with room for an answer' if need else ''}: shorten it or raise max_model_len "
                             f"(the model takes {self.engine.model.config.max_position_embeddings})")

    def _collect(self, sequences: list[Sequence], splitters: SequenceOf[Splitter | None] = ()) -> list[Output]:
        splitters = splitters or [None] * len(sequences)
        texts = {id(one): self.decoder(one, splitter) for one, splitter in zip(sequences, splitters)}
        pieces: dict[int, list[Piece]] = {id(sequence): [] for sequence in sequences}
        for sequence, token in self._run(sequences):
            pieces[id(sequence)] += texts[id(sequence)].push(sequence, token)
        outputs = []
        for one in sequences:
            said = {"answer": "", "reasoning": ""}
            for kind, text in [*pieces[id(one)], *texts[id(one)].finish(one)]:
                said[kind] += text
            outputs.append(Output(one.generated, said["answer"], said["reasoning"], one.finish_reason,
                                  one.prompt_length))
        return outputs

    def pieces(self, sequence: Sequence, splitter: Splitter | None = None) -> Iterator[Piece]:
        """Run one sequence; its text as it becomes known."""
        decoder = self.decoder(sequence, splitter)
        for _, token in self._run([sequence]):
            yield from decoder.push(sequence, token)
        yield from decoder.finish(sequence)

    def decoder(self, sequence: Sequence, splitter: Splitter | None) -> TextOut:
        """What makes text of a sequence's tokens. Raises Fp4rtError for stop strings without a tokenizer."""
        if sequence.sampling.stop and not self.has_text:
            self.text  # raises: stop strings need a tokenizer
        return TextOut(self.text if self.has_text else None, sequence.sampling.stop, splitter)

    def _run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The engine's events for these sequences, timed, one caller at a time."""
        with self.turn():
            timing = self.timing = Timing(time.perf_counter())
            for sequence, token in self._events(sequences):
                timing.finished = time.perf_counter()
                timing.first_token = timing.first_token or timing.finished
                timing.generated_tokens += 1
                timing.decoded_tokens += 1
                if sequence.error is not None:
                    raise sequence.error
                if len(sequence.ids) == sequence.prompt_length + 1:
                    timing.prompt_tokens += sequence.prompt_length - sequence.cached_tokens
                    timing.prefilled, timing.decoded_tokens = timing.finished, 0
                yield sequence, token

    def _events(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The engine's events. Raises Fp4rtError where this LLM is closed between two of them."""
        events = self.engine.run(sequences)
        try:
            while True:
                with self._working:
                    self._check_open()
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            with self._working:
                events.close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One call at a time; a second one from the same thread would wait for itself, so it is refused."""
        self._check_open()
        if self._owner == threading.get_ident():
            raise Fp4rtError("request", "a stream of this LLM is still open in this thread; finish or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def close(self) -> None:
        """Give all memory back. Calls that are not done, and streams that are open, end with an Fp4rtError when they
        go on; closing twice is fine."""
        with self._working:
            if self._engine is not None:
                self._engine = None
                self.ops.close()
        if self._text is not None:
            self._text.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_ids(prompt: Any) -> bool:
    return hasattr(prompt, "__len__") and len(prompt) > 0 and all(isinstance(i, (int, np.integer)) for i in prompt)


class TextOut:
    """Text of one sequence as its tokens come, thoughts told apart in a chat; a stop string in the answer ends it."""

    def __init__(self, text: Text | None, stop: tuple[str, ...], splitter: Splitter | None):
        self.stream = text.stream() if text else None
        self.stops, self.splitter = StopStrings(stop), splitter

    def push(self, sequence: Sequence, token: int) -> list[Piece]:
        if self.stream is None or token in sequence.stop_ids:
            return []
        text = self.stream.push(token)
        pieces = self._until_stop(self.splitter.push(token, text) if self.splitter else [("answer", text)])
        if self.stops.found:
            sequence.finish_reason = "stop"
        return pieces

    def finish(self, sequence: Sequence) -> list[Piece]:
        if self.stream is None or self.stops.found:
            return []
        text = self.stream.finish()
        pieces = self._until_stop(self.splitter.finish(text) if self.splitter else [("answer", text)])
        if self.stops.found:  # in what was held back
            sequence.finish_reason = "stop"
        rest = self.stops.finish()
        return [*pieces, ("answer", rest)] if rest else pieces

    def _until_stop(self, pieces: list[Piece]) -> list[Piece]:
        ended = [(kind, self.stops.push(text) if kind == "answer" else text)
                 for kind, text in pieces if not self.stops.found]
        return [(kind, text) for kind, text in ended if text]

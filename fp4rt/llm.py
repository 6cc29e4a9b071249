"""What an application holds: load a checkpoint, then generate, stream, chat, or look at logits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence as SequenceOf
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.cache import Cache, Plan, Remembered, pages_for
from fp4rt.checkpoint import Checkpoint, read_json
from fp4rt.engine import LEASE, LOGITS_ROWS, Engine, Sequence
from fp4rt.errors import Fp4rtError
from fp4rt.loading import Loader
from fp4rt.models import load_model, read_config
from fp4rt.ops import Ops
from fp4rt.ops.select import make_ops
from fp4rt.sampling import Sampling
from fp4rt.source import resolve
from fp4rt.text import Piece, Splitter, StopStrings, Text

DEFAULT_CONTEXT = 8192  # tokens of room unless more is asked for: enough for most, small on every card

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
    prompt_tokens: int = 0
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


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a number or from text such as "14.5GiB", "800 MB" or "2g" (with an i powers of 1024, without one of 1000)."""
    if size is None or isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str):
        text = size.strip().lower().removesuffix("b")
        power = 1024 if text.endswith("i") else 1000
        text = text.removesuffix("i")
        exponent = "kmgt".find(text[-1:]) + 1 if text[-1:].isalpha() else 0
        try:
            value = float(text[:-1] if exponent else text) * power**exponent
            if 1 <= value < 1e15:
                return int(value)
        except ValueError:
            pass
    raise Fp4rtError("request", f"gpu_memory is {size!r}; write a size such as 14.5GiB")


def load(model: str | Path, *, device: str = "auto", arch: str | None = None, max_model_len: int | None = None,
         gpu_memory: int | str | None = None, deterministic: bool = False, kv_dtype: str = "auto",
         scale_layout: str = "auto", revision: str | None = None, lm_head: str | None = None,
         requantize: str | None = None,
         progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items) -> LLM:
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
    progress: wraps the iteration over layers. Raises Fp4rtError.
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
    room = max_model_len or min(longest, DEFAULT_CONTEXT)
    ops = make_ops(device, arch, budget, deterministic)
    try:
        loader = Loader(ops, kv_dtype, *([requantizer] if requantizer else []))
        decoder = load_model(checkpoint, loader, room, progress)
        if requantizer:
            requantizer.finish()
        engine, context, workspace = _make_engine(ops, decoder, room, must=max_model_len is not None)
        return LLM(checkpoint, ops, loader, engine, context, workspace, time.perf_counter() - started)
    except BaseException:
        ops.close()
        raise


def check_context(max_model_len: int | None, longest: int) -> None:
    """Raises Fp4rtError("request") for a context that a model of `longest` tokens cannot have."""
    if max_model_len is not None and not (isinstance(max_model_len, int) and 1 <= max_model_len <= longest):
        raise Fp4rtError("request", f"max_model_len is {max_model_len!r}; this model takes 1 to {longest} tokens")


def reserve_workspace(ops: Ops, decoder: Any, plan: Plan, room: int) -> int:
    """Make a backend ready for the widest steps that contexts of `room` tokens can need: bytes."""
    scratch = Cache(plan, [1] * len(plan.windows), 1)

    def step(tokens: int, sequences: int, rows: int) -> None:
        zeros = np.zeros(tokens, np.int32)
        starts = np.arange(sequences + 1, dtype=np.int32) * (tokens // sequences)
        pages = np.zeros((len(plan.windows), sequences, pages_for(room)), np.int32)
        decoder(ops.batch(Batch(zeros, zeros, starts, zeros[:sequences] + room, pages, zeros[:sequences],
                                np.arange(rows, dtype=np.int32))), scratch.layers)

    def widest() -> None:
        tokens, sequences = min(ops.step_tokens, room), plan.sequences
        step(tokens, 1, min(LOGITS_ROWS, tokens))                       # a prompt, and its logits
        step(sequences, sequences, sequences)                           # as many sequences as may run
        step(max(tokens, 2 * sequences), sequences, sequences)          # prompts beside them

    return ops.reserve(widest)


def cache_pages(ops: Ops, plan: Plan, tokens: int) -> list[int]:
    """Pages per group for `tokens` tokens in all; behind a window, for as many sequences as it pays to run together."""
    return plan.pages(tokens, max(ops.step_tokens, LEASE), max(1, plan.sequences // 8))


def _make_engine(ops: Ops, decoder: Any, room: int, must: bool) -> tuple[Engine, int, int]:
    """An engine, its context and its workspace in bytes: room for `room` tokens, or for what fits unless they `must`."""
    plan = Plan(ops, decoder.memory)
    workspace = reserve_workspace(ops, decoder, plan, room)
    free, fits = ops.free_memory(), room

    def size(tokens: int) -> list[int]:
        return cache_pages(ops, plan, tokens)

    while free is not None and fits > 0 and plan.nbytes(size(fits), plan.sequences) > free:
        fits = (fits - 1) // PAGE_TOKENS * PAGE_TOKENS if not must else 0
    if fits <= 0:
        raise Fp4rtError("memory", f"remembering {room} tokens takes {plan.nbytes(size(room), plan.sequences) / 1e6:.0f} MB "
                         f"and {free / 1e6:.0f} MB are free beside weights and workspace; ask for fewer with max_model_len")
    return Engine(ops, decoder, Cache(plan, size(fits), plan.sequences), plan.sequences), fits, workspace


class LLM:
    """A loaded model. A context manager; `close()` gives all memory back. Calls from several threads take turns."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops, loader: Loader, engine: Engine, context: int,
                 workspace: int, load_seconds: float):
        self.checkpoint, self.ops, self.engine = checkpoint, ops, engine
        self.max_model_len = context
        self.load_seconds, self.workspace_bytes = load_seconds, workspace
        self.step_bytes, self.linears = loader.step_bytes, loader.linears
        self.weight_bytes = loader.weight_bytes
        self.timing = Timing()
        path = checkpoint.path / "generation_config.json"
        self.generation_config = read_json(path) if path.is_file() else {}
        self._text: Text | None = None
        self._lock, self._owner = threading.Lock(), None
        self._sessions: list[Session] = []
        cache = engine.cache
        self.report = [
            f"{checkpoint.path.name}: {checkpoint.config['model_type']} on {ops.device}", *loader.report(),
            f"weights {self.weight_bytes / 1e6:.1f} MB, K/V {cache.nbytes / 1e6:.1f} MB for {context} tokens, "
            f"workspace {workspace / 1e6:.1f} MB",
            *([ops.notice] if ops.notice else [])]

    # -- Text ---------------------------------------------------------------------------------------------------

    @property
    def text(self) -> Text:
        """Tokenizer, chat template and stop ids. Raises Fp4rtError where the checkpoint has no tokenizer."""
        if self._text is None:
            self._text = Text(self.checkpoint.path, self.checkpoint.config)
        return self._text

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt, checked: text goes through the tokenizer, ids must be within the vocabulary."""
        if isinstance(prompt, str):
            return self.text.encode(prompt)
        vocab = self.engine.model.config.vocab_size
        ids = [int(i) if isinstance(i, (int, np.integer)) and not isinstance(i, bool) else -1 for i in prompt]
        for given, i in zip(prompt, ids):
            if not 0 <= i < vocab:
                raise Fp4rtError("request", f"prompt holds {given!r}; token ids are whole numbers from 0 to {vocab - 1}")
        return ids

    # -- Generating ---------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt | SequenceOf[Prompt], sampling: Sampling | None = None) -> list[Output]:
        """Continue a prompt (text or ids) or several together; one Output for each, in their order."""
        prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else list(prompt)
        if not prompts:
            raise Fp4rtError("request", "no prompt was given")
        return self._collect([self._sequence(self.encode(one), sampling, i) for i, one in enumerate(prompts)])

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[str]:
        """Continue one prompt, yielding text as whole characters become known."""
        with closing(self._stream(self._sequence(self.encode(prompt), sampling))) as pieces:
            yield from (text for _, text in pieces)

    def chat(self, messages: SequenceOf[Message], sampling: Sampling | None = None, *, think: bool | None = None,
             **template_arguments: Any) -> Output:
        """The assistant's reply to messages, through the checkpoint's own chat template.

        think: whether to reason before the answer; None is as the template does by itself. template_arguments: what
        else it looks at, such as reasoning_effort. Raises Fp4rtError("request") where it cannot be told.
        """
        ids = self.text.encode_chat(messages, think=think, **template_arguments)
        return self._collect([self._sequence(ids, sampling)], [self.text.splitter(ids)])[0]

    def stream_chat(self, messages: SequenceOf[Message], sampling: Sampling | None = None, *,
                    think: bool | None = None, **template_arguments: Any) -> Iterator[Piece]:
        """`chat`, yielding pieces as they become known: ("reasoning", text) and ("answer", text)."""
        ids = self.text.encode_chat(messages, think=think, **template_arguments)
        yield from self._stream(self._sequence(ids, sampling), self.text.splitter(ids))

    def session(self, sampling: Sampling | None = None) -> Session:
        """A conversation whose keys and values are kept between turns."""
        return Session(self, sampling)

    def logits(self, ids: SequenceOf[int]) -> np.ndarray:
        """float32 [len(ids), vocab_size]: the next-token logits at every position."""
        ids = self.encode(ids)
        self._check_length(ids)
        with self._turn():
            self._make_room(len(ids))
            return self.engine.logits(ids)

    def _sequence(self, ids: list[int], sampling: Sampling | None, index: int = 0) -> Sequence:
        """A checked, resolved sequence. Several prompts of one call draw from different random streams."""
        self._check_length(ids, need=1)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise Fp4rtError("request", f"sampling is a {type(sampling).__name__}; give an fp4rt.Sampling")
        resolved = (sampling or Sampling()).resolve(self.generation_config)
        limit = self.max_model_len
        if resolved.max_tokens is not None:
            limit = min(limit, len(ids) + resolved.max_tokens)
        stop_ids = frozenset(self._stop_ids()) if not resolved.ignore_eos else frozenset()
        return Sequence(ids, resolved, (resolved.seed + index) % 2**64, stop_ids, limit)

    def _stop_ids(self) -> Iterable[int]:
        if (self.checkpoint.path / "tokenizer.json").is_file():
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
        texts = {id(one): self._decoder(one, splitter) for one, splitter in zip(sequences, splitters)}
        pieces: dict[int, list[Piece]] = {id(sequence): [] for sequence in sequences}
        for sequence, token in self._run(sequences):
            pieces[id(sequence)] += texts[id(sequence)].push(sequence, token)
        outputs = []
        for one in sequences:
            said = {"answer": "", "reasoning": ""}
            for kind, text in [*pieces[id(one)], *texts[id(one)].finish()]:
                said[kind] += text
            outputs.append(Output(one.generated, said["answer"], said["reasoning"], one.finish_reason,
                                  one.prompt_length))
        return outputs

    def _stream(self, sequence: Sequence, splitter: Splitter | None = None) -> Iterator[Piece]:
        decoder = self._decoder(sequence, splitter)
        for _, token in self._run([sequence]):
            yield from decoder.push(sequence, token)
        yield from decoder.finish()

    def _decoder(self, sequence: Sequence, splitter: Splitter | None) -> _TextOut:
        has_text = (self.checkpoint.path / "tokenizer.json").is_file()
        if sequence.sampling.stop and not has_text:
            self.text  # raises: stop strings need a tokenizer
        return _TextOut(self.text if has_text else None, sequence.sampling.stop, splitter)

    def _run(self, sequences: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The engine's events for these sequences, timed, one caller at a time."""
        with self._turn():
            self._make_room(max(sequence.limit for sequence in sequences), keep=sequences)
            timing = self.timing = Timing(time.perf_counter())
            timing.prompt_tokens = sum(len(s.ids) - s.remembered for s in sequences)
            for sequence, token in self.engine.run(sequences):
                timing.finished = time.perf_counter()
                timing.first_token = timing.first_token or timing.finished
                timing.generated_tokens += 1
                timing.decoded_tokens += 1
                if len(sequence.ids) == sequence.prompt_length + 1:
                    timing.prefilled, timing.decoded_tokens = timing.finished, 0
                yield sequence, token

    def _make_room(self, tokens: int, keep: list[Sequence] | None = None) -> None:
        """Let conversations that are not running forget what they hold where a call may need the room."""
        own = [sequence.held for sequence in keep or []]
        cache = self.engine.cache
        if not cache.fits(cache.missing(own[0] if own else Remembered(), tokens)):
            for session in self._sessions:
                if not any(session.held is held for held in own):
                    session.forget()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time; a second one from the same thread would wait for itself, so it is refused."""
        if self.engine is None:
            raise Fp4rtError("request", "this LLM is closed")
        if self._owner == threading.get_ident():
            raise Fp4rtError("request", "a stream of this LLM is still open in this thread; finish or close it first")
        with self._lock:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def close(self) -> None:
        """Give all memory back. The LLM cannot be used afterwards; closing twice is fine."""
        if self.engine is not None:
            self.engine = None
            self._sessions.clear()
            self.ops.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_ids(prompt: Any) -> bool:
    return len(prompt) > 0 and all(isinstance(i, (int, np.integer)) for i in prompt) if hasattr(prompt, "__len__") else False


class _TextOut:
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

    def finish(self) -> list[Piece]:
        if self.stream is None or self.stops.found:
            return []
        text = self.stream.finish()
        pieces = self._until_stop(self.splitter.finish(text) if self.splitter else [("answer", text)])
        rest = self.stops.finish()
        return [*pieces, ("answer", rest)] if rest else pieces

    def _until_stop(self, pieces: list[Piece]) -> list[Piece]:
        ended = [(kind, self.stops.push(text) if kind == "answer" else text)
                 for kind, text in pieces if not self.stops.found]
        return [(kind, text) for kind, text in ended if text]


@dataclass
class Session:
    """One conversation: messages so far, and the keys and values of the ids they became."""

    llm: LLM
    sampling: Sampling | None = None
    messages: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    held: Remembered = field(default_factory=Remembered)
    reused_tokens: int = 0  # of the newest prompt, how many were remembered

    def __post_init__(self) -> None:
        self.llm._sessions.append(self)

    def send(self, content: str, *, think: bool | None = None, **template_arguments: Any) -> Iterator[str]:
        """Add a user's turn and stream the answer, as `stream` does, without the reasoning."""
        with closing(self.stream(content, think=think, **template_arguments)) as pieces:
            yield from (text for kind, text in pieces if kind == "answer")

    def stream(self, content: str, *, think: bool | None = None, **template_arguments: Any) -> Iterator[Piece]:
        """Add a user's turn and stream the reply as `LLM.stream_chat` does.

        The reply becomes part of `messages` (what came of it, if stopped), reasoning as "reasoning_content", of which
        the template decides what the model sees again.
        """
        turn = [*self.messages, {"role": "user", "content": content}]
        ids = self.llm.text.encode_chat(turn, think=think, **template_arguments)
        sequence = self.llm._sequence(ids, self.sampling)
        common = next((i for i, (a, b) in enumerate(zip(self.ids, ids)) if a != b), min(len(self.ids), len(ids)))
        common = min(common, len(ids) - 1)
        if not self.llm.engine.cache.reaches_back(self.held, common):
            self.forget()
            common = 0
        sequence.remembered = self.reused_tokens = common
        sequence.keep, sequence.held = True, self.held
        said = {"answer": "", "reasoning": ""}
        try:
            for kind, text in self.llm._stream(sequence, self.llm.text.splitter(ids)):
                said[kind] += text
                yield kind, text
        finally:
            self.ids = sequence.ids[:sequence.remembered]
            thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
            self.messages = [*turn, {"role": "assistant", "content": said["answer"], **thought}]

    def forget(self) -> None:
        """Free the keys and values; the messages stay and are computed again when needed."""
        self.llm.engine.cache.give_back(self.held)
        self.ids = []

    def clear(self) -> None:
        """Start the conversation anew (a system message stays)."""
        self.forget()
        self.messages = [message for message in self.messages if message.get("role") == "system"]

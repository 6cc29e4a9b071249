"""Text to token ids and back, as a checkpoint's own tokenizer and chat template say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fp4rt.checkpoint import read_json
from fp4rt.errors import Fp4rtError
from fp4rt.text.reasoning import PROMPT_TAIL, Kind, Piece, Splitter, make_splitter, name_thoughts, switch_thinking
from fp4rt.text.stream import StopStrings, TextStream, TokenBytes
from fp4rt.text.template import ChatTemplate, find_template
from fp4rt.text.tools import Tool, ToolCall, ToolFormat, ToolSplitter, find_format

__all__ = ["RESERVED", "SPECIAL", "Kind", "Piece", "Splitter", "StopStrings", "Text", "TextStream", "Tool",
           "ToolCall", "ToolFormat", "ToolSplitter"]

MAX_TOKENIZER_BYTES = 256 << 20
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
# Variables of a chat template that are not a caller's to set.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "think", "sampling", *SPECIAL})


class Text:
    """The text side of a checkpoint directory.

    stop_ids: ids that end a text: the union of what generation_config.json, config.json (its text_config too) and
    tokenizer_config.json (or special_tokens_map.json) name. vocab_size: ids the tokenizer knows, which may be fewer or
    more than the model's. Raises Fp4rtError("checkpoint") naming the file that is missing or wrong.
    """

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path = Path(path)
        self._tokenizer = _read_tokenizer(self.path / "tokenizer.json")
        self._config = self._read_optional("tokenizer_config.json")
        self._tokens_map = self._read_optional("special_tokens_map.json")
        self._bytes = TokenBytes(self._tokenizer, str(self.path / "tokenizer.json"))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.stop_ids = self._read_stop_ids(config)
        self._template: ChatTemplate | None = None

    # -- Text and ids -------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The ids of a text; with `add_special`, between the BOS or EOS that the tokenizer itself puts around it.

        Raises Fp4rtError("request") for what is not Unicode text.
        """
        if not isinstance(text, str):
            raise Fp4rtError("request", f"the prompt is a {type(text).__name__}; it must be text")
        try:
            text.encode()
            # Of the library's ways only those for batches let Python's other threads run meanwhile.
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except UnicodeEncodeError as error:
            raise Fp4rtError("request", f"the prompt is not valid Unicode text (a lone surrogate at character "
                                        f"{error.start})") from None
        except Exception as error:  # the library raises nothing more specific
            raise Fp4rtError("checkpoint", f"{self.path}/tokenizer.json: cannot encode the prompt ({error})") from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids: exactly the pieces that `stream` gives for them, joined."""
        stream = self.stream(skip_special)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder that is fed one id at a time."""
        return TextStream(self._bytes, skip_special)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for, special ones spelled out; none for an id without a token."""
        return self._bytes.of(token, skip_special=False)

    @property
    def added(self) -> dict[str, tuple[int, bool]]:
        """The tokenizer's added tokens: {spelling: (id, whether it is special)}."""
        return {token.content: (i, token.special) for i, token in self._tokenizer.get_added_tokens_decoder().items()}

    # -- Chat ---------------------------------------------------------------------------------------------------

    def render_chat(self, messages: Sequence[dict[str, Any]], /, *, add_generation_prompt: bool = True,
                    tools: list[dict[str, Any]] | None = None, think: bool | None = None, **arguments: Any) -> str:
        """The text of a conversation by the checkpoint's chat template.

        messages: [{"role": ..., "content": ...}, ...]; an assistant's may have a "reasoning_content". tools: function
        descriptions as JSON schema. think: whether to reason; None is as the template does by itself. arguments: what
        else this template looks at ("reasoning_effort", ...). Raises Fp4rtError: "request" where the template refuses
        the messages or cannot be told to think or not to, "checkpoint" where there is no template, it is broken, or
        it exceeds its time or memory.
        """
        if taken := RESERVED & arguments.keys():
            raise Fp4rtError("request", f"{', '.join(sorted(taken))}: set by the conversation or the tokenizer, not a "
                                        "template argument")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise Fp4rtError("request", "messages must be a list with at least one message")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Fp4rtError("request", f"messages[{index}] must be an object with a role and a content")
            if not isinstance(message.get("content"), (str, list, type(None))):
                kind = type(message["content"]).__name__
                raise Fp4rtError("request", f"messages[{index}]: content is a {kind}; it must be text")
            for part in message["content"] if isinstance(message.get("content"), list) else []:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text":
                    raise Fp4rtError("request", f"messages[{index}]: content holds a part of type {str(kind)[:40]!r}; "
                                                "only text is taken, no images or audio")
        if think is not None:
            messages, arguments = switch_thinking(think, self.template.interest(bool(tools)), messages, arguments)
        return self.template.render({**self.special_tokens, "messages": [*map(name_thoughts, messages)], "tools": tools,
                                     "documents": None, "add_generation_prompt": add_generation_prompt, **arguments})

    def encode_chat(self, messages: Sequence[dict[str, Any]], /, **arguments: Any) -> list[int]:
        """The ids of `render_chat`, without adding special tokens: the template has written them already."""
        return self.encode(self.render_chat(messages, **arguments), add_special=False)

    @property
    def special_tokens(self) -> dict[str, str]:
        """What tokenizer_config.json, or else special_tokens_map.json, names of bos_token, eos_token, pad_token and
        unk_token: {name: spelling}."""
        return {name: token for name in SPECIAL if (token := self._special(name)) is not None}

    def splitter(self, prompt: Sequence[int]) -> Splitter | None:
        """What tells reasoning from answer in the reply to a chat's ids; None where the model marks no thoughts."""
        return make_splitter(self.added, self.template.source(), self.prompt_end(prompt))

    def tool_format(self) -> ToolFormat | None:
        """How this checkpoint calls tools; None where its chat template knows of none."""
        return find_format(self.added, self.template.source(tools=True))

    def tool_splitter(self, prompt: Sequence[int], tools: Sequence[Tool], format: ToolFormat) -> ToolSplitter:
        """`splitter` for a chat with tools: takes the calls out too."""
        return format.splitter(tools, self.splitter(prompt), self.prompt_end(prompt))

    def prompt_end(self, prompt: Sequence[int]) -> str:
        """The last tokens of a prompt as text, special ones spelled out: enough to see what they have opened."""
        return self.decode(prompt[-PROMPT_TAIL:], skip_special=False)

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint brings a chat template; one that is broken counts."""
        return (self.path / "chat_template.jinja").is_file() or self._config.get("chat_template") is not None

    @property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template. Raises Fp4rtError("checkpoint") where it has none."""
        if self._template is None:
            self._template = find_template(self.path, self._config)
        return self._template

    def close(self) -> None:
        """End the processes that render the chat template. What is left without it ends with this object."""
        if self._template is not None:
            self._template.close()

    # -- Files --------------------------------------------------------------------------------------------------

    def _read_optional(self, name: str) -> dict[str, Any]:
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def _special(self, name: str) -> str | None:
        """A special token's text, a string or {"content": string}; older exports name it in the second file."""
        for file, source in (("tokenizer_config.json", self._config), ("special_tokens_map.json", self._tokens_map)):
            value = source.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
            if value is not None:
                raise Fp4rtError("checkpoint", f"{self.path / file}: {name} is {value!r}; expected text")
        return None

    def _read_stop_ids(self, config: dict[str, Any]) -> frozenset[int]:
        found: set[int] = set()
        nested = config.get("text_config")
        for file, source in (("generation_config.json", self._read_optional("generation_config.json")),
                             ("config.json", config), ("config.json", nested if isinstance(nested, dict) else {})):
            stated = source.get("eos_token_id")
            for i in stated if isinstance(stated, list) else [] if stated is None else [stated]:
                if type(i) is not int or i < 0:
                    raise Fp4rtError("checkpoint", f"{self.path / file}: eos_token_id is {stated!r}; expected ids")
                found.add(i)
        eos = self._special("eos_token")
        eos_id = self._tokenizer.token_to_id(eos) if eos else None
        return frozenset(found if eos_id is None else {*found, eos_id})


def _read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json, without the truncation and padding that a training script may have left in it."""
    if not path.is_file():
        raise Fp4rtError("checkpoint", f"{path.parent}: has no tokenizer.json; copy it from the original model, or "
                                       "give token ids instead of text")
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise Fp4rtError("checkpoint", f"{path}: {path.stat().st_size} bytes is too large for a tokenizer")
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except OSError as error:
        raise Fp4rtError("checkpoint", f"{path}: cannot be read ({error.strerror})") from None
    except Fp4rtError:
        raise
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())[:200]
        raise Fp4rtError("checkpoint", f"{path}: not a tokenizer ({reason}); download it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

"""A conversation: its messages, and each reply as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fp4rt.sampling import Sampling
from fp4rt.text import Piece

if TYPE_CHECKING:
    from fp4rt.llm import LLM, Message


@dataclass
class Session:
    """One conversation. What its earlier turns came to is found in the prefix cache, so only what is new is computed.

    context_tokens: of the newest prompt and its reply. reused_tokens: of that prompt, how many were found.
    """

    llm: LLM
    sampling: Sampling | None = None
    messages: list[Message] = field(default_factory=list)
    context_tokens: int = 0
    reused_tokens: int = 0

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
        sequence = self.llm.sequence(ids, self.sampling)
        said = {"answer": "", "reasoning": ""}
        try:
            for kind, text in self.llm.pieces(sequence, self.llm.text.splitter(ids)):
                said[kind] += text
                yield kind, text
        finally:
            self.context_tokens, self.reused_tokens = len(sequence.ids), sequence.cached_tokens
            thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
            self.messages = [*turn, {"role": "assistant", "content": said["answer"], **thought}]

    def clear(self) -> None:
        """Start the conversation anew (a system message stays)."""
        self.context_tokens = self.reused_tokens = 0
        self.messages = [message for message in self.messages if message.get("role") == "system"]

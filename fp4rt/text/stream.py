"""Text that comes token by token: bytes of tokens to whole characters, and an end at a stop string."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from fp4rt.errors import Fp4rtError


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (Radford et al. 2019): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


class TokenBytes:
    """What each token adds to the text, as bytes, by the decoder that tokenizer.json names.

    Read are byte-level BPE, and byte fallback or plain pieces under Replace, Metaspace, Fuse and Strip at the start;
    these cover the published language models. `strip`: spaces that are removed at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, file: str):
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._known: dict[int, bytes] = {}
        self._alphabet: dict[str, int] | None = None
        self._byte_fallback, self._replace, self.strip = False, [], 0
        decoder = tokenizer.decoder and json.loads(tokenizer.decoder.__getstate__())
        steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
        fused = False
        for step in steps:
            if not self._read_step(step or {"type": "none"}, fused):
                raise Fp4rtError("checkpoint", f"{file}: its decoder {json.dumps(step)} is not one that fp4rt reads; "
                                               "give token ids instead of text")
            fused |= step["type"] == "Fuse"

    def _read_step(self, step: dict[str, Any], fused: bool) -> bool:
        """Take in one step of the decoder; False if it is unknown, or means something else at this place."""
        match step:
            case {"type": "ByteLevel"}:
                self._alphabet = _byte_alphabet()
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                self._replace.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if not fused:
                self._replace.append((old, " "))
                self.strip += step.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                self.strip += start
            case _:
                return False
        return True

    def of(self, token: int, skip_special: bool) -> bytes:
        """The bytes of one token; none for a special one that is skipped, and for an id without a token."""
        if skip_special and token in self._special:
            return b""
        if token not in self._known:
            self._known[token] = self._spell(self._tokenizer.id_to_token(token) or "")
        return self._known[token]

    def _spell(self, piece: str) -> bytes:
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[char] for char in piece)
            except KeyError:  # an added token, which is written as it is
                return piece.encode()
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            try:
                return bytes([int(piece[3:5], 16)])
            except ValueError:
                pass
        for old, new in self._replace:
            piece = piece.replace(old, new)
        return piece.encode()


class TextStream:
    """Ids in, text out, whole characters only: a character that tokens share comes with the last of them.

    The work per token does not depend on what came before. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, token_bytes: TokenBytes, skip_special: bool = True):
        self._bytes, self._skip_special = token_bytes, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = token_bytes.strip

    def push(self, token: int) -> str:
        """The text that this token completes, often none."""
        return self._stripped(self._utf8.decode(self._bytes.of(int(token), self._skip_special)))

    def finish(self) -> str:
        """What an incomplete character at the end amounts to."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            spaces = min(self._strip, len(text) - len(text.lstrip(" ")))
            self._strip = self._strip - spaces if spaces == len(text) else 0
            return text[spaces:]
        return text


class StopStrings:
    """Ends a text before the first stop string, however the text is cut into pieces.

    Of several, the one that is complete first ends it. What could be the beginning of one is held back until that is
    settled, no more. Each character costs one step of the Knuth-Morris-Pratt automaton (1977) per stop string.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that the text ends with now
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What of the text so far is known not to be in a stop string, beyond what was returned before."""
        if self.found or not self._stops:
            return "" if self.found else text
        held = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            longest = 0
            for index, (stop, borders) in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != char:
                    matched = borders[matched - 1]
                matched += stop[matched] == char
                if matched == len(stop):
                    longest, self.found = max(longest, matched), True
                self._matched[index] = matched
            if self.found:
                self._held = ""
                return held[:end - longest]
        keep = len(held) - max(self._matched)
        self._held = held[keep:]
        return held[:keep]

    def finish(self) -> str:
        """The text ends here: what was held back."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders, length = [0], 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length - 1]
        length += stop[length] == char
        borders.append(length)
    return borders

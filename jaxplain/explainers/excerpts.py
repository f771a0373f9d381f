"""Excerpts as prompts show them: pieces of text with an activation each, and text made safe to mark up."""

import codecs
import dataclasses
import re

import numpy as np
from jaxtyping import Float

from jaxplain.configs.explanation import Sign
from jaxplain.store.exemplar import Exemplar, Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excerpt:
    r"""A text cut into pieces, with the neuron's activation at each.

    Attributes:
        pieces: Mostly tokens; tokens that only together make a character are one piece. Bytes that
            are no UTF-8 are surrogates (Python's surrogateescape), which `escape` writes as `\xe2`.
        activations: float32 [N], counted so that the explained sign is positive. NaN where a token
            does not count for the neuron.
    """

    pieces: tuple[str, ...]
    activations: Float[np.ndarray, "N"]

    @property
    def strengths(self) -> Float[np.ndarray, "N"]:
        """Activations of the explained sign; 0 where there is none."""
        return np.maximum(np.nan_to_num(self.activations), 0)

    def opposite(self) -> "Excerpt":
        """The same for the other sign."""
        return Excerpt(pieces=self.pieces, activations=-self.activations)

    def around_peak(self, context: int | None) -> "Excerpt":
        """The piece with the highest activation and `context` pieces on either side; all for None."""
        if context is None:
            return self
        peak = int(np.argmax(self.strengths))
        kept = slice(max(0, peak - context), peak + context + 1)
        return Excerpt(pieces=self.pieces[kept], activations=self.activations[kept])


def excerpt_of(exemplar: Exemplar, sign: Sign) -> Excerpt:
    """An exemplar as an excerpt, seen from one sign."""
    pieces, groups = _pieces(exemplar.tokens.tolist(), exemplar.vocabulary)
    signed = exemplar.activations if sign == "max" else -exemplar.activations
    # A character made of several tokens is as strong as the strongest of them.
    counted = np.where(np.isnan(signed), -np.inf, signed)
    strongest = np.array([counted[group].max() for group in groups], np.float32)
    return Excerpt(pieces=pieces, activations=np.where(np.isneginf(strongest), np.nan, strongest))


def _pieces(tokens: list[int], vocabulary: Vocabulary) -> tuple[tuple[str, ...], list[slice]]:
    """The text of tokens, cut where a token ends on a whole character, and which tokens each piece is."""
    pieces: list[str] = []
    groups: list[slice] = []
    start, spelled = 0, b""
    for stop, token in enumerate(tokens, 1):
        spelled += vocabulary.bytes_of(token) or f"<token {token}>".encode()
        if stop < len(tokens) and _ends_within_character(spelled):
            continue
        pieces.append(spelled.decode("utf-8", "surrogateescape"))
        groups.append(slice(start, stop))
        start, spelled = stop, b""
    return tuple(pieces), groups


def _ends_within_character(spelled: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(spelled)
    return bool(decoder.getstate()[0])


_MARK = re.compile(r"\{\{([^{}|]+)\|(-?\d+)\}\}")
_WORD = re.compile(r"\s?\w+|\s?[^\w\s]|\s+")


def marked_excerpt(text: str) -> Excerpt:
    """An excerpt written by hand: `{{piece|activation}}` marks, all else is cut into words and silent."""
    pieces: list[str] = []
    activations: list[float] = []
    for place, part in enumerate(_MARK.split(text)):
        if place % 3 == 0:
            words = _WORD.findall(part)
            pieces += words
            activations += [0.0] * len(words)
        elif place % 3 == 1:
            pieces.append(part)
        else:
            activations.append(float(part))
    return Excerpt(pieces=tuple(pieces), activations=np.array(activations, np.float32))


_FIRST_SURROGATE = 0xDC00  # surrogateescape writes byte b as this plus b
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_LINE_ENDS = (0x2028, 0x2029)
_ESCAPED = re.compile(r"\\(n|t|r|x([0-9a-f]{2})|u([0-9a-f]{4})|.)", re.DOTALL)


def escape(text: str, delimiters: str = "") -> str:
    """Text on one line, with a backslash before every character that occurs in a delimiter.

    Control characters and bytes that are no UTF-8 are written in hexadecimal.
    """
    return "".join([_escaped(character, delimiters) for character in text])


def _escaped(character: str, delimiters: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character in delimiters:
        return "\\" + character
    code = ord(character)
    if _FIRST_SURROGATE + 128 <= code < _FIRST_SURROGATE + 256:
        return f"\\x{code - _FIRST_SURROGATE:02x}"
    if code < 32 or code == 127:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if 127 < code < 160 or code in _LINE_ENDS else character


def unescape(text: str) -> str:
    """What `escape` was given."""
    return _ESCAPED.sub(_unescaped, text)


def _unescaped(match: re.Match[str]) -> str:
    if match[2]:
        code = int(match[2], 16)
        return chr(code if code < 128 else _FIRST_SURROGATE + code)
    if match[3]:
        return chr(int(match[3], 16))
    return {"n": "\n", "t": "\t", "r": "\r"}.get(match[1], match[1])

"""The bytes behind every token id, whatever kind of tokenizer made it."""

import json
import re

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes]:
    """Bytes of token ids 0 to `size` - 1; joined over a sequence they give its text.

    Ids without a token (padding of the embedding) have no bytes. A single token may hold part of a
    character.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend else None
    byte_level = "ByteLevel" in json.dumps(decoder)
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    found = []
    for index, token in enumerate(tokens):
        if token is None:
            found.append(b"")
        elif index in added:
            found.append(added[index].content.encode())
        else:
            found.append(piece_bytes(token, "byte-level" if byte_level else "sentencepiece"))
    return found + [b""] * (size - len(found))


def piece_bytes(token: str, form: str) -> bytes:
    """The bytes of a token as a tokenizer of a form writes it: `byte-level`, `sentencepiece`, or `text`.

    A token with a character that no byte is written as is its text, as special tokens are.
    """
    if form == "byte-level" and all(character in _BYTE_OF_CHARACTER for character in token):
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    if form == "sentencepiece":
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        token = token.replace("\u2581", " ")  # its mark for a space
    return token.encode("utf-8", "surrogatepass")


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE (Radford et al., 2019) writes printable bytes as themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_of_character()

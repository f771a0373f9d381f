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
        elif byte_level:
            found.append(bytes(_BYTE_OF_CHARACTER[c] for c in token))
        elif match := _BYTE_TOKEN.fullmatch(token):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(token.replace("\u2581", " ").encode())  # SentencePiece's mark for a space
    return found + [b""] * (size - len(found))


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE (Radford et al., 2019) writes printable bytes as themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_of_character()

"""Sequences that are met again and again, each kept once and numbered by its first appearance."""

import array
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxplain.errors import JaxplainError
from jaxplain.store.repeats import spans
from jaxplain.store.writer import SequenceBlock

_TOKENS_PER_BLOCK = 2**24
_TOKEN = np.dtype("<i4")


class SequenceTable:
    """The sequences met so far. Use as a context manager.

    Tokens lie in a file that goes when it is closed; memory holds some 150 bytes for each sequence.

    Args:
        folder: Where that file is.
    """

    def __init__(self, folder: Path):
        self._rows: dict[bytes, int] = {}
        self._tokens = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed with the table
        self._lengths, self._corpora = array.array("i"), array.array("i")

    def __enter__(self) -> "SequenceTable":
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """The most tokens that a sequence has."""
        return max(self._lengths, default=0)

    def digest(self, vocabulary: Sequence[bytes]) -> str:
        """A hash of all sequences and of what their tokens stand for."""
        words = [hashlib.blake2b(word, digest_size=16).digest() for word in vocabulary]
        return hashlib.blake2b(b"".join([*words, *self._rows]), digest_size=16).hexdigest()

    def add(self, token_T: Int[np.ndarray, "T"], corpus: int = 0) -> int:
        """The number of a sequence, which gets one, and its corpus, where it is new."""
        key = _digest(token_T)
        row = self._rows.setdefault(key, len(self._rows))
        if row == len(self._lengths):
            self._tokens.write(token_T.astype(_TOKEN).tobytes())
            self._lengths.append(len(token_T))
            self._corpora.append(corpus)
        return row

    def number(self, token_T: Int[np.ndarray, "T"]) -> int:
        """The number of a sequence that was added.

        Raises JaxplainError where it was not, since what is read a second time has changed.
        """
        row = self._rows.get(_digest(token_T))
        if row is None:
            raise JaxplainError("the source changed while it was read; start again when it is at rest.")
        return row

    def blocks(self) -> Iterator[SequenceBlock]:
        """All sequences in order, as rows of a token table.

        Where they come from is not known, so each stands as a document of its own, named by its tokens.
        """
        length_N, corpus_N = (np.array(values, np.int32) for values in (self._lengths, self._corpora))
        document_N = np.fromiter(
            (int.from_bytes(key[:8], "little") >> 1 for key in self._rows), np.int64, len(self._rows)
        )
        self._tokens.seek(0)
        for span in spans(len(length_N), max(1, _TOKENS_PER_BLOCK // max(1, self.longest))):
            lengths = length_N[span]
            flat = np.frombuffer(self._tokens.read(int(lengths.sum()) * _TOKEN.itemsize), _TOKEN)
            token_NT = np.full((len(lengths), self.longest), -1, np.int32)
            token_NT[np.arange(self.longest) < lengths[:, None]] = flat
            yield SequenceBlock(
                token_NT=token_NT,
                corpus_N=corpus_N[span],
                document_N=document_N[span],
                start_N=np.zeros(len(lengths), np.int32),
                length_N=lengths,
            )


def _digest(token_T: Int[np.ndarray, "T"]) -> bytes:
    return hashlib.blake2b(token_T.astype(_TOKEN).tobytes(), digest_size=16).digest()

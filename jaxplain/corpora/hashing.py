"""Hashes that are the same on every machine and in every run."""

import hashlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int


def text_hash(text: str) -> int:
    """63 bits of a text's BLAKE2b digest."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def split_of(document: int, splits: Mapping[str, float]) -> str | None:
    """The split of a document by its id; None where the shares leave it out.

    It depends on the id and the shares alone, so that another seed never moves a document from
    the data that is scored to the data that is explained.
    """
    number = int(splits_of(np.array([document], np.int64), splits)[0])
    return list(splits)[number] if number < len(splits) else None


def splits_of(document_N: Int[np.ndarray, "N"], splits: Mapping[str, float]) -> Int[np.ndarray, "N"]:
    """The number of each document's split, as `split_of` names it; one too many where there is none."""
    edges = np.cumsum(list(splits.values()))
    if edges[-1] > 1 - 1e-9:  # shares that sum to one but for rounding leave nothing out
        edges[-1] = 1.0
    return np.searchsorted(edges, _uniform(_mix(document_N.astype(np.uint64))), side="right")


def lottery(
    seed: int, document_N: Int[np.ndarray, "N"], start_N: Int[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """A uniform float32 in (0, 1) for each window, from the seed and where the window comes from.

    The windows with the highest numbers are a fair sample, whichever run or slice they are seen in.
    """
    seeded = _mix(np.array([seed % 2**64], np.uint64))
    return _uniform(_mix(_mix(seeded ^ document_N.astype(np.uint64)) ^ start_N.astype(np.uint64)))


def token_lottery(
    seed: int, document_N: Int[np.ndarray, "N"], start_N: Int[np.ndarray, "N"], tokens: int
) -> Float[np.ndarray, "N T"]:
    """A number for each token of each window, as `lottery` has one for each window; float32 below 0.

    The highest are near 0, where float32 tells so many numbers apart that ties do not matter.
    """
    seeded = _mix(_mix(np.array([seed % 2**64], np.uint64)))  # another stream than the windows'
    window_N = _mix(_mix(seeded ^ document_N.astype(np.uint64)) ^ start_N.astype(np.uint64))
    bits_NT = _mix(window_N[:, None] ^ np.arange(tokens, dtype=np.uint64))
    return -(((bits_NT >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53).astype(np.float32)


def _mix(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 (Steele, Lea & Flood, 2014), of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(bits: np.ndarray) -> np.ndarray:
    # 23 bits and a half step: float32 then represents every value, and neither 0 nor 1 occurs.
    return (((bits >> np.uint64(41)).astype(np.float64) + 0.5) / 2**23).astype(np.float32)

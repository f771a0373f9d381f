"""Exemplars as pages show them: tokens with a shade each, and no character that could do anything else."""

import dataclasses
import html
import unicodedata
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from jaxplain.store.exemplar import Exemplar

STEPS = 8
LONGEST_TOKEN, LONGEST_TEXT = 400, 20_000
_BEFORE, _AFTER = 18, 10
_MARKS = {"\n": "⏎", "\t": "⇥", "\x7f": "␡"}
# Joiners, without which some scripts and pictures would fall apart.
_JOINERS = "\u200c\u200d"
# Marks that steer the order in which letters are laid out, or that cannot be seen at all.
_STEERING = frozenset("\u061c\u200b\u200e\u200f\u2028\u2029\u2060\ufeff") | {
    chr(code) for start, stop in ((0x202A, 0x202F), (0x2066, 0x206A)) for code in range(start, stop)
}


def visible(text: str, *, longest: int = LONGEST_TEXT) -> str:
    """Text whose control characters have become signs for them, and of which no more than some is shown."""
    shown = text[:longest]
    if not shown.isprintable():
        shown = "".join(map(_sign, shown))
    return shown if len(text) <= longest else f"{shown}… ({len(text):,} characters)"


def visible_lines(text: str, *, longest: int = LONGEST_TEXT) -> str:
    """The same, but that lines still end."""
    shown = "\n".join(visible(line) for line in text[:longest].split("\n"))
    return shown if len(text) <= longest else f"{shown}… ({len(text):,} characters)"


def _sign(character: str) -> str:
    if character.isprintable() and character not in _STEERING:
        return character
    if character in _MARKS:
        return _MARKS[character]
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Cf") and character not in _JOINERS
    return f"[U+{code:04X}]" if character in _STEERING or is_control else character


@dataclasses.dataclass(frozen=True, kw_only=True)
class Excerpt:
    """An exemplar, ready to be laid out; `is_cut` where some of it is far from the peak."""

    kind: str
    exemplar: Exemplar
    html: Markup
    is_cut: bool
    peak: str

    @property
    def name(self) -> str:
        """What a link calls it."""
        return f"{self.kind}-{self.exemplar.rank}"

    @property
    def document(self) -> str:
        """The document's hash."""
        return f"{self.exemplar.document & (2**64 - 1):016x}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is shaded most strongly: the highest and the lowest activation, at least 0 and at most 0."""

    highest: float
    lowest: float

    @classmethod
    def of(cls, exemplars: Mapping[str, Sequence[Exemplar]]) -> "Scale":
        """The scale of all exemplars of a neuron."""
        found = [e.activations for several in exemplars.values() for e in several if len(e.activations)]
        if not found:
            return cls(0.0, 0.0)
        acts_N = np.concatenate(found)
        acts_N = acts_N[np.isfinite(acts_N)]
        return cls(float(acts_N.max(initial=0.0)), float(acts_N.min(initial=0.0)))

    def shades(self, acts_T: Float[np.ndarray, "T"]) -> list[str]:
        """The shades of tokens: p1 to p8 above 0, n1 to n8 below, none near it, x for what does not count."""
        end_T = np.where(acts_T > 0, self.highest, -self.lowest)
        with np.errstate(divide="ignore", invalid="ignore"):
            step_T = np.rint(STEPS * acts_T / end_T)
        step_T = np.where(np.isfinite(acts_T), np.nan_to_num(step_T), STEPS + 1)
        return [_SHADES[step] for step in np.clip(step_T, -STEPS, STEPS + 1).astype(int).tolist()]


_SHADES = {step: f"{'p' if step > 0 else 'n'}{abs(step)}" for step in range(-STEPS, STEPS + 1)}
_SHADES |= {0: "", STEPS + 1: "x"}


def shaded(
    texts: Sequence[str],
    acts_T: Float[np.ndarray, "T"],
    scale: Scale,
    near: range | None = None,
    *,
    says: Callable[[float], str] = "{:.4g}".format,
) -> Markup:
    """Tokens as HTML, with their shades and values; those outside `near` are far.

    `says` puts a value into words. (There are thousands on a page, for which a template is too slow.)
    """
    spans = []
    for at, (text, shade, value) in enumerate(zip(texts, scale.shades(acts_T), acts_T.tolist(), strict=True)):
        classes = f"{shade} far" if near is not None and at not in near else shade
        title = "does not count" if value != value else html.escape(says(value))
        shown = html.escape(visible(text, longest=LONGEST_TOKEN))
        spans.append(f'<span class="{classes}" title="{title}">{shown}</span>')
    return Markup("".join(spans))


def peak_of(exemplar: Exemplar, kind: str) -> int:
    """The place of the token that the exemplar is about; 0 where no token counts."""
    acts_T = exemplar.activations
    if not len(acts_T) or np.isnan(acts_T).all():
        return 0
    if kind == "min":
        return int(np.nanargmin(acts_T))
    return int(np.nanargmax(np.abs(acts_T) if kind == "random" else acts_T))


def near_peak(exemplar: Exemplar, kind: str) -> range:
    """The tokens that are shown at first."""
    peak = peak_of(exemplar, kind)
    return range(max(0, peak - _BEFORE), peak + _AFTER + 1)


def excerpt_of(exemplar: Exemplar, kind: str, scale: Scale) -> Excerpt:
    """An exemplar with its shades, of which what is near the peak is shown at first."""
    peak, near = peak_of(exemplar, kind), near_peak(exemplar, kind)
    acts_T = exemplar.activations
    value = float(acts_T[peak]) if len(acts_T) else float("nan")
    return Excerpt(
        kind=kind,
        exemplar=exemplar,
        html=shaded(exemplar.token_strings, acts_T, scale, near),
        is_cut=near.start > 0 or near.stop < len(acts_T),
        peak="-" if np.isnan(value) else f"{value:.4g}",
    )

"""What a store gives of a neuron: exemplars, statistics, and the vocabulary that texts are made with."""

import codecs
import dataclasses

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exemplar:
    """One sequence kept for a neuron.

    Attributes:
        rank: 0 for the strongest.
        score: The highest activation for kinds max and quantile, the lowest for min; the drawn number for
            random, NaN in stores that were imported.
        sequence: The sequence's row in the split's token table.
        tokens: Token ids without padding, int32 [T].
        activations: The neuron's activation at each token, float32 [T]; NaN where a token does not count.
        corpus: Name of the source.
        document: Hash of the document in which the sequence begins, the same in every run.
        start: Number of that document's tokens that come before the sequence.
        stratum: For kind quantile, the levels between which the score lies in the distribution of all
            sequences' highest activations.
        vocabulary: The bytes of every token id.
    """

    rank: int
    score: float
    sequence: int
    tokens: Int[np.ndarray, "T"]
    activations: Float[np.ndarray, "T"]
    corpus: str
    document: int
    start: int
    stratum: tuple[float, float] | None = None
    vocabulary: "Vocabulary" = dataclasses.field(repr=False)

    @property
    def token_strings(self) -> list[str]:
        """The text that each token adds; joined they are `text`.

        A character whose bytes are spread over several tokens stands with the last of them.
        """
        return self.vocabulary.strings(self.tokens)

    @property
    def text(self) -> str:
        """The whole sequence as text."""
        return self.vocabulary.text(self.tokens)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return Exemplars([self])._repr_html_()


class Exemplars(list[Exemplar]):
    """Exemplars, strongest first. A list that notebooks show as excerpts."""

    def _repr_html_(self) -> str:
        from jaxplain.viewer.notebook import exemplars_html  # only where a notebook asks for it

        return exemplars_html(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeuronStatistics:
    """Over all tokens that count: how many, and the shape of the activation's distribution.

    Attributes:
        count: Tokens that count; 0 where a store was imported from something that does not tell.
        mean: The activation's mean.
        variance: Its variance, divided by the count.
        skewness: Its third standardised moment, m3 / m2**1.5; NaN where the variance is 0.
        kurtosis: Its fourth standardised moment, m4 / m2**2, not the excess: a Gaussian has 3. NaN where
            the variance is 0.
        fraction_active: Share of the tokens with an activation above `statistics.active_above` of the run.
    """

    count: int
    mean: float
    variance: float
    skewness: float
    kurtosis: float
    fraction_active: float


class Vocabulary:
    """The bytes of every token id."""

    def __init__(self, text: np.ndarray, end: np.ndarray):
        self._text, self._end = text.tobytes(), end

    def bytes_of(self, token: int) -> bytes:
        """A token's bytes; none for padding."""
        if token < 0:
            return b""
        start = self._end[token - 1] if token else 0
        return self._text[start : self._end[token]]

    def tokens(self) -> list[bytes]:
        """The bytes of all tokens, by their ids."""
        return [self.bytes_of(token) for token in range(len(self._end))]

    def text(self, tokens: Int[np.ndarray, "T"]) -> str:
        """The text of a sequence of tokens."""
        return b"".join(map(self.bytes_of, tokens.tolist())).decode("utf-8", "replace")

    def strings(self, tokens: Int[np.ndarray, "T"]) -> list[str]:
        """The text that every token adds; joined they are the whole text.

        A character whose bytes are spread over several tokens stands with the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.bytes_of(token)) for token in tokens.tolist()]
        return [*texts[:-1], texts[-1] + decoder.decode(b"", final=True)] if texts else []

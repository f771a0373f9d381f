"""What simulators share, whether they are being trained or used: the form in which they are asked."""

import dataclasses
from typing import Literal

from jaxplain.configs.checks import require

PREDECESSOR_TEMPLATE = "## Neuron Description: {explanation}\n\n ## Input: "


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadoutConfig:
    """How a finetuned simulator is asked, and where its answer stands.

    The defaults are the form of Choi et al. (2024), so that their simulators load here and ours there.

    Args:
        template: What stands before the sequence's own tokens; {explanation} is put in.
        logits: Which logits are those of levels 0 to 10, at the token in question: `first` are the
            first 11 of the vocabulary; `digits` those of the tokens "0" to "10".
        special_tokens: `remap` has added tokens stand for the special tokens within sequences, so that
            they lose the meaning that the model gives them; `keep` leaves them.
        added_tokens: Tokens that the model has and its tokenizer files lack, in the order of their ids. For
            simulators that were made elsewhere.
        remapped: Which added token stands for which special one. For simulators made elsewhere.
    """

    template: str = PREDECESSOR_TEMPLATE
    logits: Literal["first", "digits"] = "first"
    special_tokens: Literal["keep", "remap"] = "keep"
    added_tokens: list[str] = dataclasses.field(default_factory=list)
    remapped: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.template.count("{explanation}") == 1,
            "readout.template",
            self.template,
            "name {explanation} in it, once",
        )
        for name in self.remapped.values():
            require(
                name in self.added_tokens,
                "readout.remapped",
                self.remapped,
                f"list {name!r} among readout.added_tokens",
            )
        require(
            self.special_tokens == "keep" or not self.remapped,
            "readout.special_tokens",
            self.special_tokens,
            "it derives what readout.remapped spells out, so give one of the two",
        )

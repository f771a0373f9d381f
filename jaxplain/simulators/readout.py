"""The form in which a finetuned simulator is asked, and how its logits become levels."""

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.configs.simulation import ReadoutConfig
from jaxplain.errors import JaxplainError
from jaxplain.simulators.simulation import LEVELS
from jaxplain.store.reader import Store
from jaxplain.subjects.subject import open_subject, tokenizer_hash
from jaxplain.subjects.tokenizers import require_same_tokenizer


class Readout:
    """A readout config with the tokenizer that it is for, which has the added tokens.

    Attributes:
        level_ids: The tokens whose logits are those of levels 0 to 10, int32 [11].
    """

    def __init__(self, config: ReadoutConfig, tokenizer: PreTrainedTokenizerBase):
        self._template, self._tokenizer = config.template, tokenizer
        self.level_ids = _level_ids(config, tokenizer)
        size = 1 + max(tokenizer.get_vocab().values())
        self._remapped_V = np.arange(size, dtype=np.int32)
        for original, added in config.remapped.items():
            self._remapped_V[_id_of(tokenizer, original)] = _id_of(tokenizer, added)

    def prompt(self, explanation: str) -> list[int]:
        """The tokens that come before a sequence."""
        text = self._template.replace("{explanation}", explanation)
        return self.sequence(np.array(self._tokenizer(text)["input_ids"], np.int32)).tolist()

    def sequence(self, tokens: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
        """Tokens of the subject as the simulator reads them."""
        return self._remapped_V[tokens]


def expected_levels(probabilities: Float[np.ndarray, "... 11"]) -> Float[np.ndarray, "..."]:
    """The mean of the levels by their probabilities, float32 [...]."""
    return probabilities @ np.arange(LEVELS, dtype=np.float32)


def require_tokenizer_of(store: Store, tokenizer: PreTrainedTokenizerBase, *, what: str) -> None:
    """Raise JaxplainError unless a tokenizer is that of the store's subject, apart from added tokens.

    The message calls the tokenizer's owner `what`.
    """
    if tokenizer_hash(tokenizer) == store.attributes["tokenizer_hash"]:
        return
    known = store.attributes["subject"]
    subject = open_subject(
        SubjectConfig(
            id=known["id"],
            revision=known.get("revision"),
            tokenizer=store.config["subject"].get("tokenizer"),
        ),
        field="the store's subject",
    )
    require_same_tokenizer(tokenizer, subject.tokenizer, what=what)


def _level_ids(config: ReadoutConfig, tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, "11"]:
    if config.logits == "first":
        return np.arange(LEVELS, dtype=np.int32)
    ids = [tokenizer.encode(str(level), add_special_tokens=False) for level in range(LEVELS)]
    for level, found in enumerate(ids):
        if len(found) != 1:
            raise JaxplainError(
                f"readout.logits is 'digits', but {level} is {len(found)} tokens of this tokenizer; "
                "use 'first'."
            )
    return np.array(ids, np.int32)[:, 0]


def _id_of(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    if not isinstance(found, int) or (found == tokenizer.unk_token_id and name != tokenizer.unk_token):
        raise JaxplainError(f"readout.remapped names {name!r}, which is no token of this tokenizer.")
    return found

"""The tokenizer that a GGUF file's metadata describes, as one of the tokenizers library.

Byte-level BPE with merges (llama.cpp's model `gpt2`) and SentencePiece's BPE by scores (its model `llama`).
How text is split before BPE is only named in the file, by `tokenizer.ggml.pre`.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from jaxplain.errors import JaxplainError
from jaxplain.subjects.gguf import GGUFFile

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5  # llama.cpp's types of tokens
_SPACE = "\u2581"

_REMEDY = "name the tokenizer's own Hugging Face folder or hub id in subject.tokenizer"

_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Splitting:
    """How text is split into what BPE works on: by patterns one after the other, then into bytes.

    `digits` come apart first. `gpt2` splits as GPT-2 does, at the end. With `whole` a piece that is a token
    is not merged, and `bos` begins a text where the file does not say.
    """

    patterns: tuple[str, ...] = ()
    digits: bool = False
    gpt2: bool = False
    normalizer: Any = None
    whole: bool = False
    bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"

_SPLITTINGS: Mapping[str, _Splitting] = {
    "llama-bpe": _Splitting(patterns=(_LLAMA3,), whole=True, bos=True),
    "qwen2": _Splitting(patterns=(_QWEN2,), normalizer=normalizers.NFC()),
    "smollm": _Splitting(digits=True, gpt2=True),
    "gpt-2": _Splitting(gpt2=True),
    # What llama.cpp falls back to, whatever the model was trained with.
    "default": _Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""By `tokenizer.ggml.pre`. That Qwen composes characters first (NFC) is the original tokenizer's way;
llama.cpp leaves it out."""


def gguf_tokenizer(file: GGUFFile) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises JaxplainError for one of another kind, naming the remedy."""
    return PreTrainedTokenizerFast(tokenizer_object=_backend(file), **_settings(file))


def write_gguf_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Write it as tokenizer.json and tokenizer_config.json. Raises JaxplainError as `gguf_tokenizer` does."""
    _backend(file).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | _settings(file)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def require_tokens_of(tokenizer: PreTrainedTokenizerBase, file: GGUFFile) -> None:
    """Raise JaxplainError unless a tokenizer's ids mean what they mean in the file.

    Tokens that the one or the other lacks, and special ones, may be called differently.
    """
    tokens = file.metadata.get(f"{_KEY}tokens", [])
    kinds = file.metadata.get(f"{_KEY}token_type", [_NORMAL] * len(tokens))
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if number < len(tokens) and kinds[number] == _NORMAL and tokens[number] != token:
            raise JaxplainError(
                f"subject.tokenizer is not the tokenizer of {file.path.name}: its token {number} is "
                f"{token!r}, and the file's is {tokens[number]!r}."
            )


def _settings(file: GGUFFile) -> dict[str, Any]:
    """What transformers is told beside the definition itself."""
    metadata = file.metadata
    tokens = metadata[f"{_KEY}tokens"]
    named = {role: tokens[metadata[_KEY + key]] for role, key in _ROLES.items() if _KEY + key in metadata}
    settings = named | {
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata[f"{file.architecture}.context_length"],
    }
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return settings


def _backend(file: GGUFFile) -> Tokenizer:
    metadata, name = file.metadata, file.path.name
    kind = metadata.get(f"{_KEY}model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers or f"{_KEY}tokens" not in metadata:
        raise JaxplainError(
            f"the tokenizer of {name} is of the kind {kind!r}; known are {' and '.join(makers)}, "
            f"so {_REMEDY}."
        )
    tokens = metadata[f"{_KEY}tokens"]
    kinds = metadata.get(f"{_KEY}token_type", [_NORMAL] * len(tokens))
    used = len(tokens)
    while used and kinds[used - 1] == _UNUSED:  # rows that only round the embedding up
        used -= 1
    tokenizer, bos = makers[kind](file, tokens[:used], kinds[:used])
    special = {_CONTROL} if kind == "gpt2" else {_CONTROL, _UNKNOWN}
    add = functools.partial(_added, tokens, kinds[:used])
    tokenizer.add_special_tokens(add(special, special=True))
    if plain := add({_USER_DEFINED}, special=False):
        tokenizer.add_tokens(plain)
    begin = _end_token(file, "bos", default=bos)
    end = _end_token(file, "eos", default=False)
    if begin or end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end],
            pair=[*begin, "$A", *end, *begin, "$B", *end],
            special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys([*begin, *end])],
        )
    return tokenizer


def _added(tokens: list[str], kinds: list[int], wanted: set[int], *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(token, special=special, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in wanted
    ]


def _end_token(file: GGUFFile, role: str, *, default: bool) -> list[str]:
    """The token that every text begins or ends with, if there is one."""
    number = file.metadata.get(f"{_KEY}{role}_token_id")
    wanted = file.metadata.get(f"{_KEY}add_{role}_token", default)
    return [file.metadata[f"{_KEY}tokens"][number]] if wanted and number is not None else []


def _byte_level(file: GGUFFile, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    pre = file.metadata.get(f"{_KEY}pre")
    way = _SPLITTINGS.get(pre) if isinstance(pre, str) else None
    merges = file.metadata.get(f"{_KEY}merges")
    if way is None or merges is None:
        lacks = "has no merges" if merges is None else f"splits text in the way {pre!r}"
        raise JaxplainError(
            f"the tokenizer of {file.path.name} {lacks}; known are the ways {', '.join(_SPLITTINGS)}, "
            f"so {_REMEDY}."
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=way.whole,
        )
    )
    if way.normalizer is not None:
        tokenizer.normalizer = way.normalizer
    steps: list[pre_tokenizers.PreTokenizer] = []
    if way.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in way.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=way.gpt2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, way.bos


def _sentencepiece(file: GGUFFile, tokens: list[str], kinds: list[int]) -> tuple[Tokenizer, bool]:
    """SentencePiece merges whatever makes the piece of the highest score, so the scores rank the merges."""
    scores = file.metadata.get(f"{_KEY}scores")
    if scores is None:
        raise JaxplainError(f"the tokenizer of {file.path.name} has no scores; {_REMEDY}.")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = file.metadata.get(f"{_KEY}unknown_token_id", 0)
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind not in (_NORMAL, _USER_DEFINED)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, dict(zip(tokens, scores, strict=False)), skip_tokens=whole),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    leading = file.metadata.get(f"{_KEY}add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if leading else spaces
    strip = [decoders.Strip(" ", left=1, right=0)] if leading else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True

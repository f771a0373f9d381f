"""Finding a subject by id: its folder, its tokenizer, its architecture, and what identifies it."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from jax.sharding import Mesh
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import Family, architecture_of, family_of
from jaxplain.subjects.gguf import GGUF_SUFFIX, gguf_weight_hash, is_gguf, open_gguf
from jaxplain.subjects.gguf_config import gguf_config
from jaxplain.subjects.gguf_tokenizer import gguf_tokenizer, require_tokens_of
from jaxplain.subjects.loading import PICKLE_SUFFIXES, load_decoder, pickle_refusal
from jaxplain.subjects.packaged import PACKAGED_SUBJECTS, packaged_folder

_TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_HUB_FILES = [*_TOKENIZER_FILES, "*.safetensors"]
_HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights in other layouts
_HASHED_BYTES_PER_TENSOR = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on disk, not yet loaded: in a Hugging Face `folder`, or in the GGUF file of that path.

    `revision` is the hub's commit, where it comes from there.
    """

    id: str
    revision: str | None
    folder: Path
    family: Family
    arch: Architecture
    tokenizer: PreTrainedTokenizerBase
    dtype: jnp.dtype

    def load(
        self, mesh: Mesh, *, depth: int | None = None, with_head: bool = False, over_data: bool = False
    ) -> Decoder:
        """The model on the mesh, its first `depth` layers only where that is given; see `load_decoder`."""
        return load_decoder(
            self.folder,
            self.family,
            self.arch,
            mesh=mesh,
            dtype=self.dtype,
            depth=depth,
            with_head=with_head,
            over_data=over_data,
        )

    def weight_hash(self) -> str:
        """A fingerprint of the weights, see `weight_hash`."""
        return weight_hash(self.folder)

    def tokenizer_hash(self) -> str:
        """SHA-256 of the tokenizer's full definition."""
        return tokenizer_hash(self.tokenizer)


def weight_hash(folder: Path) -> str:
    """A fingerprint of a model's weights: SHA-256 over every tensor's header and first 4 KiB."""
    if is_gguf(folder):
        return gguf_weight_hash(open_gguf(folder))
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for name, tensor in sorted(header.items()):
                start, stop = tensor["data_offsets"]
                file.seek(8 + size + start)
                digest.update(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                digest.update(file.read(min(stop - start, _HASHED_BYTES_PER_TENSOR)))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's full definition."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def open_subject(config: SubjectConfig, *, field: str = "subject.id") -> Subject:
    """Find a packaged subject, a local folder or GGUF file, or a hub model, in this order.

    Raises JaxplainError where there is none of that name, or it is of no supported family; `field` is
    what the config calls its id.
    """
    folder = find_folder(config.id, config.revision, field=field)
    stated = gguf_config(open_gguf(folder)) if is_gguf(folder) else None
    if stated is None and not (folder / "config.json").exists():
        raise JaxplainError(
            f"the subject's folder {folder} holds no config.json; it must be a Hugging Face model folder."
        )
    try:
        if stated is None:
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            hf_config = AutoConfig.for_model(**stated)
    except Exception as error:  # every config class of transformers validates in its own way
        raise JaxplainError(
            f"the subject's {folder if stated else folder / 'config.json'} describes no supported model: "
            f"{first_line(error)}."
        ) from error
    assert isinstance(hf_config, PreTrainedConfig)
    family, arch = family_of(hf_config), architecture_of(hf_config)
    return Subject(
        id=config.id,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        folder=folder,
        family=family,
        arch=arch,
        tokenizer=_tokenizer(config, folder),
        dtype=jnp.dtype(config.dtype),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The attributes in a folder's config.json, or those that a GGUF file's metadata stand for."""
    if is_gguf(folder):
        return gguf_config(open_gguf(folder))
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _tokenizer(config: SubjectConfig, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, or else the model's own."""
    if config.tokenizer is None and is_gguf(folder):
        return gguf_tokenizer(open_gguf(folder))
    if config.tokenizer is None:
        place, remedy = folder, "name another in subject.tokenizer, or fetch the model again"
    else:
        place = find_folder(config.tokenizer, field="subject.tokenizer", files=_TOKENIZER_FILES)
        remedy = "name a folder with tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer fails in any of several libraries
        raise JaxplainError(
            f"{place} holds no tokenizer that can be read: {first_line(error)}; {remedy}."
        ) from error
    if is_gguf(folder):
        require_tokens_of(tokenizer, open_gguf(folder))
    return tokenizer


def find_folder(
    model: str, revision: str | None = None, *, field: str, files: Sequence[str] = _HUB_FILES
) -> Path:
    """The folder of a packaged subject, a local folder or GGUF file, or what the hub gives, in this order.

    Of the hub's files those of the patterns `files` are fetched.

    Raises JaxplainError, which names the config's field, where there is none of that name or revision.
    """
    path = Path(model).expanduser()
    local = bool(model) and (path.is_dir() or path.is_file() or path.suffix == GGUF_SUFFIX)
    # The folder of a hub's snapshot is called by its revision.
    if (model in PACKAGED_SUBJECTS or local) and revision not in (None, path.name):
        raise JaxplainError(
            f"the revision {revision!r} is given for {field} {model!r}, but only models of the Hugging Face "
            "hub have revisions; leave it out."
        )
    if model in PACKAGED_SUBJECTS:
        return packaged_folder(model)
    if model and path.is_dir():
        return path.resolve()
    if model and path.suffix in PICKLE_SUFFIXES:
        raise JaxplainError(pickle_refusal(f"{field} {model!r}"))
    if local:
        if path.is_file() and is_gguf(path):
            return path.resolve()
        why = "is no GGUF file" if path.is_file() else "there is no such file"
        raise JaxplainError(f"{field} is {model!r}, but {why}.")
    if not model or model[0] in "/.~":
        raise JaxplainError(f"{field} is {model!r}, but there is no such folder.")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(files),
                ignore_patterns=_HUB_DUPLICATES,
            )
        )
    except RevisionNotFoundError as error:
        raise JaxplainError(
            f"the Hugging Face hub's {model} ({field}) has no revision {revision!r}; give a branch, tag or "
            "commit that it has."
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        asked = f" at revision {revision!r}" if revision is not None else ""
        raise JaxplainError(
            f"{field} is {model!r}, which is no packaged subject "
            f"({', '.join(PACKAGED_SUBJECTS)}) and no folder, and the Hugging Face hub does not "
            f"give it{asked}: {first_line(error)}."
        ) from error

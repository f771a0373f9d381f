"""Finding a subject by id: its folder, its tokenizer, its architecture, and what identifies it."""

import dataclasses
import hashlib
import json
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from jaxplain.configs.extraction import SubjectConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.subjects.architecture import Architecture
from jaxplain.subjects.decoder import Decoder
from jaxplain.subjects.families import Family, architecture_of, family_of
from jaxplain.subjects.loading import load_decoder
from jaxplain.subjects.packaged import PACKAGED_SUBJECTS, packaged_folder

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights in other layouts
_HASHED_BYTES_PER_TENSOR = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model on disk, not yet loaded. `revision` is the hub's commit, where it comes from there."""

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
    """A fingerprint of a folder's weights: SHA-256 over every tensor's header and first 4 KiB."""
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
    """Find a packaged subject, a local folder or a hub model, in this order.

    Raises JaxplainError where there is none of that name, or it is of no supported family; `field` is
    what the config calls its id.
    """
    folder = find_folder(config.id, config.revision, field=field)
    if not (folder / "config.json").exists():
        raise JaxplainError(
            f"the subject's folder {folder} holds no config.json; it must be a Hugging Face model folder."
        )
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # every config class of transformers validates in its own way
        raise JaxplainError(
            f"the subject's {folder / 'config.json'} describes no supported model: {first_line(error)}."
        ) from error
    assert isinstance(hf_config, PreTrainedConfig)
    family, arch = family_of(hf_config), architecture_of(hf_config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a broken tokenizer fails in any of several libraries
        raise JaxplainError(
            f"the subject's folder {folder} holds no tokenizer that can be read: {first_line(error)}."
        ) from error
    return Subject(
        id=config.id,
        revision=folder.name if folder.parent.name == "snapshots" else None,
        folder=folder,
        family=family,
        arch=arch,
        tokenizer=tokenizer,
        dtype=jnp.dtype(config.dtype),
    )


def find_folder(model: str, revision: str | None = None, *, field: str) -> Path:
    """The folder of a packaged subject, a local one, or what the hub gives for an id, in this order.

    Raises JaxplainError, which names the config's field, where there is none of that name.
    """
    if model in PACKAGED_SUBJECTS:
        return packaged_folder(model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path.resolve()
    if not model or model[0] in "/.~":
        raise JaxplainError(f"{field} is {model!r}, but there is no such folder.")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_DUPLICATES,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise JaxplainError(
            f"{field} is {model!r}, which is no packaged subject "
            f"({', '.join(PACKAGED_SUBJECTS)}) and no folder, and the Hugging Face hub does not "
            f"give it: {first_line(error)}."
        ) from error

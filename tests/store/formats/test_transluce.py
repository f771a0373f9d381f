"""Arrays of Transluce's observatory: ours, and such as its own code writes."""

import json
import math
import pickle

import numpy as np
import pytest

import jaxplain
from jaxplain.errors import JaxplainError
from jaxplain.export import main as export
from jaxplain.ingest import main as ingest
from jaxplain.store.formats import transluce_source
from jaxplain.store.formats.transluce_source import Tokenizer, import_transluce
from tests import tiny
from tests.store.formats import stores
from tests.store.formats.stores import PAD, SILENT

WIDTH = 7  # of the made-up model's layers
TOKENIZER = Tokenizer(vocabulary=stores.WORDS, pad_token=PAD, hash="abc")
FOLDER = "articles_fineweb_made_up_instruct_chat_5seqlen"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stores.write(tmp_path_factory.mktemp("run") / "exemplars.zarr", splits=("train", "valid"))


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    export([store.zarr_path, str(out), "--format", "transluce", "--pad-token", str(PAD), "--quiet"])
    return out / FOLDER


def test_folders_config_and_arrays_are_those_that_the_tool_opens(folder):
    config = json.loads((folder / "exemplar_config.json").read_text())
    assert config == {
        "hf_model_id": "org/Made-Up-Instruct",
        "hf_dataset_configs": [
            {"hf_dataset_id": "articles", "dataset_config_name": None, "hf_split": "train", "seed": 54},
            {
                "hf_dataset_id": "HuggingFaceFW/fineweb",
                "dataset_config_name": "sample-10BT",
                "hf_split": "train",
                "seed": 54,
            },
        ],
        "sampling_ratios": None,
        "num_seqs": stores.SEQUENCES,
        "seq_len": stores.TOKENS,
        "k": stores.K,
        "num_top_acts_to_save": stores.K,
        "batch_size": 1,
        "rand_seqs": stores.K // 2,
        "seed": 3,
        "activation_type": "MLP",
    }
    splits = ["random_train", "random_valid", "train", "valid"]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == splits
    for split in splits:
        assert sorted(p.name for p in (folder / split).iterdir()) == ["layer1", "layer4"]
        ranks = stores.K // 2 if split.startswith("random") else stores.K
        for kind in ("max", "min"):
            load = {
                name: np.load(folder / split / "layer4" / f"{kind}_{name}.npy", allow_pickle=False)
                for name in ("seq_acts", "seq_ids", "dataset_ids")
            }
            assert load["seq_acts"].shape == load["seq_ids"].shape == (WIDTH, ranks, stores.TOKENS)
            assert load["dataset_ids"].shape == (WIDTH, ranks)
            assert [str(array.dtype) for array in load.values()] == ["float32", "int32", "int32"]
            # Padding is on the left, and is never the extreme.
            padded = load["seq_ids"] == PAD
            assert (np.diff(padded.astype(int), axis=-1) <= 0).all()
            assert np.isneginf(load["seq_acts"][padded]).all() or kind == "min"
    acts = np.load(folder / "train" / "layer1" / "max_acts.npy")
    assert acts.shape == (WIDTH, stores.K)
    assert (folder / "train" / "layer1" / "step.txt").read_text() == str(stores.SEQUENCES - 1)


def test_arrays_have_every_value(store, folder):
    split = store["train"]
    places = {"articles": 0, "fineweb": 1}  # by name
    for layer, index in stores.names(split):
        for kind in ("max", "min"):
            acts, ids, corpora = (
                np.load(folder / "train" / f"layer{layer}" / f"{kind}_{name}.npy")[index]
                for name in ("seq_acts", "seq_ids", "dataset_ids")
            )
            for exemplar in split.neuron(layer, index).exemplars(kind):
                held = ~np.isnan(exemplar.activations)
                row_acts, row_ids = acts[exemplar.rank], ids[exemplar.rank]
                assert row_acts[-held.sum() :].tolist() == exemplar.activations[held].tolist()
                assert row_ids[-held.sum() :].tolist() == exemplar.tokens[held].tolist()
                assert (row_ids[: -held.sum()] == PAD).all()
                assert corpora[exemplar.rank] == places[exemplar.corpus]
    assert (np.load(folder / "train" / "layer4" / "max_seq_ids.npy")[3] == PAD).all(), "not asked for"
    tokens = split.neuron(1, 0).stats.count
    assert (folder / "train" / "layer1" / "num_tokens_seen.txt").read_text() == str(tokens)


def test_what_is_exported_and_imported_is_the_same(store, folder, tmp_path):
    found = import_transluce(folder, str(tmp_path / "back"), SILENT, tokenizer=TOKENIZER)
    back = jaxplain.open_store(tmp_path / "back")
    assert found.neurons == 2 * WIDTH
    assert back.splits == ("train", "valid")
    assert back.attributes["tokenizer_hash"] == "abc"
    for name in back.splits:
        old, new = store[name], back[name]
        assert stores.names(new) == stores.names(old)
        for layer, index in stores.names(old):
            ours, theirs = old.neuron(layer, index), new.neuron(layer, index)
            for kind in ("max", "min", "random"):
                for mine, other in zip(ours.exemplars(kind), theirs.exemplars(kind), strict=True):
                    assert stores.counted(new, other) == stores.counted(old, mine)
                    assert other.corpus == mine.corpus
                    assert other.score == mine.score or kind == "random"
            assert theirs.stats.count == ours.stats.count
            assert math.isnan(theirs.stats.mean)
            assert theirs.quantile(1.0) == ours.exemplars("max", limit=1)[0].score, "tails are exact"


def test_a_sequence_is_kept_once(store, folder, tmp_path):
    import_transluce(folder, str(tmp_path / "back"), SILENT, tokenizer=TOKENIZER)
    rows = jaxplain.open_store(tmp_path / "back")["train"]
    tokens = rows.sequences(np.arange(rows.sequence_count))["token"]
    assert len(np.unique(tokens, axis=0)) == len(tokens) <= stores.SEQUENCES


def write_tree(path, *, splits=("train",), kinds=("max", "min"), random=False, seed=0):
    """Two layers of three neurons as the observatory's own code saves them; gives their arrays."""
    rng = np.random.default_rng(seed)
    neurons, ranks, tokens = 3, 4, 6
    path.mkdir(parents=True, exist_ok=True)
    datasets = [{"hf_dataset_id": name, "seed": 54} for name in ("org/zeta", "alpha")]
    config = {"hf_model_id": "org/model", "hf_dataset_configs": datasets, "k": ranks, "seq_len": tokens}
    (path / "exemplar_config.json").write_text(json.dumps(config))
    pool = rng.integers(2, len(stores.WORDS), (8, tokens)).astype(np.int32)
    for row, padded in enumerate(rng.integers(0, 3, len(pool))):
        pool[row, :padded] = PAD
    saved = {}
    for split in [*splits, *(f"random_{s}" for s in splits if random)]:
        for layer in (0, 2):
            folder = path / split / f"layer{layer}"
            folder.mkdir(parents=True)
            for kind in kinds:
                rows = np.stack([rng.permutation(len(pool))[:ranks] for _ in range(neurons)])
                ids = pool[rows]
                acts = (rng.integers(-40, 41, ids.shape) / 8).astype(np.float32)
                if not split.startswith("random"):
                    acts[ids == PAD] = -np.inf if kind == "max" else np.inf
                arrays = {"seq_acts": acts, "seq_ids": ids, "dataset_ids": (rows % 2).astype(np.int32)}
                for name, array in arrays.items():
                    np.save(folder / f"{kind}_{name}.npy", array)
                saved[split, layer, kind] = arrays
            if not split.startswith("random"):
                (folder / "num_tokens_seen.txt").write_text("1234")
                (folder / "step.txt").write_text("7")
    return saved


def expected(arrays, kind, neuron):
    """A neuron's exemplars: score, tokens and activations, strongest first."""
    found = []
    for acts, ids, corpus in zip(
        *(arrays[n][neuron] for n in ("seq_acts", "seq_ids", "dataset_ids")), strict=True
    ):
        first = int(np.argmax(ids != PAD))
        acts, ids = acts[first:], ids[first:]
        found.append((acts.max() if kind == "max" else acts.min(), ids.tolist(), acts.tolist(), int(corpus)))
    return found if kind == "random" else sorted(found, key=lambda e: -e[0] if kind == "max" else e[0])


def test_the_observatorys_own_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(transluce_source, "_BLOCK_BYTES", 1)  # a neuron at a time
    saved = write_tree(tmp_path / "data", splits=("train", "test"), random=True)
    import_transluce(tmp_path / "data", str(tmp_path / "out"), SILENT, tokenizer=TOKENIZER)
    store = jaxplain.open_store(tmp_path / "out")
    assert store.corpora == ("alpha", "zeta"), "as the observatory sorts them"
    assert store.attributes["imported"]["config"]["hf_model_id"] == "org/model"
    corpus_of = {}
    for (name, layer, kind), arrays in saved.items():
        if name.startswith("random"):
            continue
        for neuron in range(3):
            found = store[name].neuron(layer, neuron)
            assert found.stats.count == 1234
            pairs = zip(found.exemplars(kind), expected(arrays, kind, neuron), strict=True)
            for exemplar, (score, tokens, acts, corpus) in sorted(pairs, key=lambda pair: pair[1][1]):
                assert exemplar.score == score
                if [e.score for e in found.exemplars(kind)].count(score) == 1:
                    assert exemplar.tokens.tolist() == tokens
                    assert exemplar.activations.tolist() == acts
                corpus_of.setdefault(tuple(tokens), corpus)
    random = store["train"].neuron(2, 1).exemplars("random")
    both = [expected(saved["random_train", 2, kind], "random", 1) for kind in ("max", "min")]
    tokens = [tuple(t) for lists in both for _, t, _, _ in lists]
    assert [tuple(e.tokens.tolist()) for e in random] == list(dict.fromkeys(tokens))
    assert all(math.isnan(e.score) for e in random), "what they were drawn by is not known"


def test_one_sign_alone(tmp_path):
    write_tree(tmp_path / "data", kinds=("max",))
    found = import_transluce(tmp_path / "data", str(tmp_path / "out"), SILENT, tokenizer=TOKENIZER)
    assert jaxplain.open_store(tmp_path / "out")["train"].kinds == ("max",)
    assert "exemplars of kind min" in found.not_known


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    write_tree(tmp_path / "data")
    (tmp_path / "data" / "neuron_level").mkdir()
    (tmp_path / "data" / "neuron_level" / "0.pkl").write_bytes(pickle.dumps(Trap()))
    np.save(tmp_path / "data" / "layer0_act_percs.npy", np.array(Trap(), object), allow_pickle=True)
    import_transluce(tmp_path / "data", str(tmp_path / "out"), SILENT, tokenizer=TOKENIZER)
    path = tmp_path / "data" / "train" / "layer0" / "max_seq_acts.npy"
    np.save(path, np.array(Trap(), object), allow_pickle=True)
    with pytest.raises(JaxplainError, match=r"max_seq_acts\.npy could not be read"):
        import_transluce(tmp_path / "data", str(tmp_path / "new"), SILENT, tokenizer=TOKENIZER)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    write_tree(tmp_path / "data")
    folder = tmp_path / "data" / "train" / "layer0"

    def refused(match, tokenizer=TOKENIZER):
        with pytest.raises(JaxplainError, match=match):
            import_transluce(tmp_path / "data", str(tmp_path / "out"), SILENT, tokenizer=tokenizer)
        assert not (tmp_path / "out" / "exemplars.zarr").exists()

    other = Tokenizer(vocabulary=stores.WORDS, pad_token=9, hash="")
    refused(rf"padded with token {PAD}, and not with 9; give --pad-token {PAD}", other)
    refused("but the tokenizer's are 0 to 4", Tokenizer(vocabulary=stores.WORDS[:5], pad_token=PAD, hash=""))
    (folder / "num_tokens_seen.txt").write_text("many")
    refused("should hold a number of tokens")
    (folder / "num_tokens_seen.txt").write_text("5")
    np.save(folder / "max_dataset_ids.npy", np.zeros((3, 1), np.int32))
    refused("do not fit one another")
    (folder / "max_dataset_ids.npy").unlink()
    refused("could not be read: .*No such file")
    (tmp_path / "data" / "exemplar_config.json").write_text("{}")
    refused("has no hf_model_id")


def test_by_the_command_with_the_subjects_tokenizer(tmp_path, capsys):
    write_tree(tmp_path / "data")
    tiny.write_model(tmp_path / "model", tiny.LLAMA)
    source = [str(tmp_path / "data"), str(tmp_path / "out")]
    ingest([*source, "--tokenizer", str(tmp_path / "model"), "--pad-token", str(PAD)])
    assert "mean, variance, skewness, kurtosis and fraction_active" in capsys.readouterr().out
    assert jaxplain.open_store(tmp_path / "out")["train"].neuron(0, 0).exemplars()[0].text
    with pytest.raises(JaxplainError, match="--strata is for neuron-records"):
        ingest([*source, "--strata", "0.5"])
    with pytest.raises(JaxplainError, match="2 folders of transluce are given"):
        ingest([source[0], *source])


def test_a_store_that_does_not_fit_the_form_is_refused(store, tmp_path):
    def refused(match, path=None, *arguments):
        with pytest.raises(JaxplainError, match=match):
            export([path or store.zarr_path, str(tmp_path / "out"), "--format", "transluce", *arguments])
        assert not (tmp_path / "out").exists()

    refused("--pad-token is missing")
    refused("--pad-token is 99, but the store's tokens are 0 to 9", None, "--pad-token", "99")
    experts = stores.write(tmp_path / "experts" / "exemplars.zarr", experts=2)
    refused("is a mixture of experts, and transluce has no place", experts.zarr_path, "--pad-token", "1")
    single = stores.write(tmp_path / "single" / "exemplars.zarr", kinds=("max",), splits=("other",))
    refused("needs exemplars of kinds max and min", single.zarr_path, "--pad-token", "1")
    other = stores.write(tmp_path / "other" / "exemplars.zarr", splits=("other",))
    refused("knows the splits train, valid, test", other.zarr_path, "--pad-token", "1")


def test_export_in_small_blocks(store, folder, tmp_path, monkeypatch):
    from jaxplain.store.formats import neurons

    monkeypatch.setattr(neurons, "_MOST_NEURONS", 1)
    export([store.zarr_path, str(tmp_path), "--format", "transluce", "--pad-token", str(PAD)])
    for path in (tmp_path / FOLDER).rglob("*.npy"):
        np.testing.assert_array_equal(np.load(path), np.load(folder / path.relative_to(tmp_path / FOLDER)))

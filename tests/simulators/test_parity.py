"""The finetuned simulator, its loss and its gradients against torch, on tiny models with added tokens."""

import json

import jax
import numpy as np
import pytest

import jaxplain
from jaxplain.configs.explanation import LocalModelConfig
from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.configs.finetuning import TrainingConfig
from jaxplain.configs.simulation import PREDECESSOR_TEMPLATE, ReadoutConfig
from jaxplain.mesh import make_mesh
from jaxplain.simulators.finetuned import FinetunedSimulator
from jaxplain.simulators.pairs import Batch
from jaxplain.simulators.parts import READOUT, decoder_of, parameters_of
from jaxplain.simulators.simulation import Job
from jaxplain.simulators.training import Trainer
from jaxplain.subjects import saving
from jaxplain.subjects.subject import open_subject
from tests import tiny

pytestmark = pytest.mark.parity

# As of a simulator made elsewhere: a padding token and stand-ins that its tokenizer files do not have.
ADDED = ["<PAD>", "<||bos||>", "<||end||>"]
REMAPPED = {"<|bos|>": "<||bos||>", "<|end|>": "<||end||>"}
EXPLANATIONS = ["cats and dogs", "the end of a sentence: <|end|>", "x", "rivers under blue houses"]


@pytest.fixture(scope="module")
def tokens(explained):
    """How many tokens the tokenizer has by itself."""
    return len(open_subject(SubjectConfig(id=str(explained / "model"))).tokenizer)


@pytest.fixture(scope="module", params=["untied", "tied"])
def folder(request, tmp_path_factory, tokens):
    config = tiny.VARIANTS["llama-gqa" if request.param == "untied" else "llama-mqa-tied"]
    config = config | {"max_position_embeddings": 256, "vocab_size": tokens + len(ADDED)}
    return tiny.write_model(tmp_path_factory.mktemp(request.param) / "simulator", config)


@pytest.fixture(scope="module")
def sequences(explained):
    rows = jaxplain.open_store(explained / "run")["valid"].sequences(np.arange(5))["token"]
    return [row[row >= 0] for row in rows]


def torch_model(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def torch_simulation(folder, tokens, explanations, sequence):
    """Expected levels [E, T]: prompts padded on the left, the sequence behind, special tokens replaced."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    pad = tokens  # the first added token
    prompts = [tokenizer(PREDECESSOR_TEMPLATE.format(explanation=e))["input_ids"] for e in explanations]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p + sequence.tolist() for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + len(sequence)) for p in prompts])
    for original, added in REMAPPED.items():
        ids[ids == tokenizer.convert_tokens_to_ids(original)] = tokens + ADDED.index(added)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        logits = torch_model(folder).eval()(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    levels = torch.softmax(logits[:, width:, :11].double(), -1)
    return (levels @ torch.arange(11).double()).numpy()


def test_expected_levels_are_torch_s(folder, tokens, sequences, explained):
    readout = ReadoutConfig(added_tokens=ADDED, remapped=REMAPPED)
    store = jaxplain.open_store(explained / "run")
    simulator = FinetunedSimulator(str(folder), readout, LocalModelConfig(batch_size=8), store)
    jobs = [
        Job(layer=0, index=n, sign="max", explanation=text, sequences=sequences)
        for n, text in enumerate(EXPLANATIONS)
    ]
    found = {job.index: simulations for job, simulations in simulator.simulate(iter(jobs))}
    for place, sequence in enumerate(sequences):
        expected_ET = torch_simulation(folder, tokens, EXPLANATIONS, sequence)
        for number, expected in enumerate(expected_ET):
            np.testing.assert_allclose(found[number][place].expected, expected, atol=1e-4)


@pytest.mark.parametrize("remat", [False, True])
def test_loss_and_gradients_are_torch_s(folder, remat):
    import torch

    rng = np.random.default_rng(0)
    batch = Batch(
        prompts_EP=rng.integers(0, 370, (8, 9)).astype(np.int32),
        tokens_EST=rng.integers(0, 370, (8, 2, 21)).astype(np.int32),
        levels_EST=np.where(rng.random((8, 2, 21)) < 0.4, -1, rng.integers(0, 11, (8, 2, 21))).astype(
            np.int32
        ),
    )
    batch.prompts_EP[3, 5:] = -1
    batch.tokens_EST[4, 1, 15:] = batch.levels_EST[4, 1, 15:] = -1

    # Torch reads prompt and sequence anew for every sequence, one row of equal lengths after the other.
    model = torch_model(folder)
    logits, targets = [], []
    for e, prompt in enumerate(batch.prompts_EP):
        for tokens, levels in zip(batch.tokens_EST[e], batch.levels_EST[e], strict=True):
            sequence, row = tokens[tokens >= 0], prompt[prompt >= 0].tolist()
            ids = torch.tensor([[*row, *sequence.tolist()]])
            logits.append(model(ids).logits[0, len(row) :, :11])
            targets.append(torch.as_tensor(levels[: len(sequence)]).long())
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=-1)
    loss.backward()

    subject = open_subject(SubjectConfig(id=str(folder)))
    mesh = make_mesh(MeshConfig(data=4, model=2), batch_size=8, mlp_width=48)
    config = TrainingConfig(
        parts="full", batch_size=8, compute_dtype="float32", clip=1e9, remat=remat, reset_readout=False
    )
    trainer = Trainer(subject.load(mesh, with_head=True), config, np.arange(11, dtype=np.int32), mesh)
    state = trainer.start()
    placed = jax.tree.map(lambda x: x[0], trainer._placed(batch, 1))
    summed, gradient = jax.jit(jax.value_and_grad(trainer._loss))(state.trained, {}, placed)
    count = (batch.levels_EST >= 0).sum()
    assert float(summed) / count == pytest.approx(loss.item(), rel=1e-5)
    name, at = (
        ("head.unembedding_DV", np.s_[:, :11])
        if folder.parent.name.startswith("untied")
        else ("embedding_VD", np.s_[:11])
    )
    rows = gradient.pop(READOUT)
    assert not gradient[name][at].any()  # what the rows stand in for
    gradient[name] = gradient[name].at[at].set(rows.T if name.startswith("head") else rows)
    graph, _ = parameters_of(trainer.decoder(state))
    tensors = saving._tensors(decoder_of(graph, gradient), subject.family)
    named = dict(model.named_parameters())
    assert len(tensors) == len(named)
    for source, parts in tensors.items():
        expected = named[source].grad.numpy()
        found = saving._as_source(parts, subject.arch, "float32") / count
        np.testing.assert_allclose(
            found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0, err_msg=source
        )
    _, metrics = trainer.step(state, batch)
    norm = np.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    assert float(metrics.loss) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics.gradient_norm) == pytest.approx(norm, rel=1e-4)


def test_torch_reads_what_was_finetuned(explained, tmp_path):
    """The saved simulator, by torch, predicts what ours does."""
    import yaml

    from jaxplain.finetune import main
    from tests import workspace

    config = workspace.finetuning(explained, tmp_path / "sim", steps=2)
    config["readout"] = {"special_tokens": "remap"}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(tmp_path / "finetune.yaml")])
    model = tmp_path / "sim" / "model"
    readout = ReadoutConfig(**json.loads((model / "simulator.json").read_text())["readout"])
    store = jaxplain.open_store(explained / "run")
    simulator = FinetunedSimulator(str(model), readout, LocalModelConfig(batch_size=8), store)
    subject = open_subject(SubjectConfig(id=str(model)))
    row = store["valid"].sequences(np.array([3]))["token"][0]
    job = Job(layer=0, index=0, sign="max", explanation="cats", sequences=[row[row >= 0]])
    ((_, (found,)),) = simulator.simulate(iter([job]))

    import torch

    ids = subject.tokenizer(PREDECESSOR_TEMPLATE.format(explanation="cats"))["input_ids"]
    ids = torch.tensor([[*ids, *job.sequences[0].tolist()]])
    for original, added in readout.remapped.items():
        old, new = subject.tokenizer.convert_tokens_to_ids([original, added])
        ids[ids == old] = new
    with torch.no_grad():
        logits = torch_model(model).eval()(ids).logits[0, -len(job.sequences[0]) :, :11]
    expected = (torch.softmax(logits.double(), -1) @ torch.arange(11).double()).numpy()
    np.testing.assert_allclose(found.expected, expected, atol=1e-4)

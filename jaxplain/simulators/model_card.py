"""The README of a finetuned simulator: what it is, what it was trained on, how well it does."""

from pathlib import Path

from jaxplain.configs.finetuning import FinetuneConfig
from jaxplain.simulators.pairs import Dataset
from jaxplain.simulators.training import Evaluation
from jaxplain.store.reader import Store

_CARD = """---
base_model: {base}
library_name: jaxplain
tags: [interpretability, neurons, simulator]
---

# A simulator of {subject}'s neurons

Given an explanation of a neuron and a text, this model predicts the neuron's activation at every token, from
0 to 10 in tenths of the neuron's extreme. It reads

```
{template}<the text's own token ids>
```

and at each token of the text, {logits} are those of the levels 0 to 10.

| on neurons and documents that it was not trained on | |
| --- | ---: |
| cross-entropy (nats per token) | {loss:.4f} |
| the same of the best constant prediction | {constant_loss:.4f} |
| correlation of expected with real levels | {correlation:.3f} |

Trained by `jaxplain` from {base}{depth}: {steps} of at most {most} steps of {batch} explanations with up to
{together} sequences each, {parts}, learning rate {rate:g}; the step with the lowest held-out loss was kept.
{train} explanations of {train_neurons} neurons to train on, {held} of {held_neurons} neurons held out;
explanations of {subject} by {providers}.

![Loss and correlation over training](curves.png)
"""

_PARTS = {
    "full": "all weights",
    "last_layers": "the last {layers} layers and the readout's rows",
    "lora": "low-rank updates of rank {rank} and the readout's rows",
}
_LOGITS = {"first": "the first 11 logits", "digits": 'the logits of the tokens "0" to "10"'}


def write_model_card(
    folder: Path,
    config: FinetuneConfig,
    store: Store,
    dataset: Dataset,
    evaluation: Evaluation,
    *,
    step: int,
) -> None:
    """README.md beside the weights."""
    training = config.training
    text = _CARD.format(
        base=config.model.id,
        depth="" if config.depth is None else f"'s first {config.depth} layers",
        subject=store.attributes["subject"]["id"],
        template=config.readout.template.replace("\n", "\\n"),
        logits=_LOGITS[config.readout.logits],
        loss=evaluation.loss,
        constant_loss=evaluation.constant_loss,
        correlation=evaluation.correlation,
        steps=step,
        most=training.steps,
        batch=training.batch_size,
        together=config.pairs.top + config.pairs.random,
        parts=_PARTS[training.parts].format(layers=training.last_layers, rank=training.lora.rank),
        rate=training.learning_rate,
        train=f"{len(dataset.train):,}",
        held=f"{len(dataset.held_out):,}",
        train_neurons=f"{dataset.neurons[0]:,}",
        held_neurons=f"{dataset.neurons[1]:,}",
        providers=", ".join(config.pairs.providers) or "any provider",
    )
    (folder / "README.md").write_text(text)

"""The same extraction as a torch user would write it: forward hooks and a running top-k.

Every layer's MLP activations are caught at the input of the down projection; the best k sequences of
each neuron, highest and lowest, are kept with their activations by concatenating, `topk` and gather.

    python benchmarks/torch_peer.py --model FOLDER

Prints one line of JSON with rates in sequences per second, medians over steps:
  trunk      the forward pass without the language-model head
  one_pass   all layers in one pass
  per_layer  one layer per pass, as tools that loop over layers do; the rate for all layers
Needs torch and transformers.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM


def keep_best(kept, acts_BTF, sign, k):
    """Merge a batch into (scores [<=k, F], activations [<=k, T, F])."""
    scores = (sign * acts_BTF).amax(dim=1)
    if kept is not None:
        scores, acts_BTF = torch.cat([kept[0], scores]), torch.cat([kept[1], acts_BTF])
    scores, rows = scores.topk(min(k, len(scores)), dim=0)
    return scores, acts_BTF.gather(0, rows[:, None].expand(-1, acts_BTF.shape[1], -1))


def sequences_per_second(step, batch, *, warmup, steps):
    times = []
    for number in range(warmup + steps):
        start = time.perf_counter()
        step()
        if number >= warmup:
            times.append(time.perf_counter() - start)
    return round(batch / statistics.median(times), 3)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Llama-like model")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=95)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=4, help="untimed steps, which also fill the top-k")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    trunk, layers = model.model, model.model.layers
    generator = torch.Generator().manual_seed(0)

    def forward():
        shape = (options.batch, options.tokens)
        trunk(torch.randint(model.config.vocab_size, shape, generator=generator), use_cache=False)

    rate = {"trunk": sequences_per_second(forward, options.batch, warmup=1, steps=options.steps)}
    caught = {}
    for number, layer in enumerate(layers):
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs, number=number: caught.__setitem__(number, inputs[0])
        )

    def reduce(numbers, kept):
        forward()
        for number in numbers:
            for sign in (1, -1):
                kept[number, sign] = keep_best(kept.get((number, sign)), caught[number], sign, options.k)

    timing = {"warmup": options.warmup, "steps": options.steps}
    everything, single = {}, {}
    rate["one_pass"] = sequences_per_second(
        lambda: reduce(range(len(layers)), everything), options.batch, **timing
    )
    one_layer = sequences_per_second(lambda: reduce([0], single), options.batch, **timing)
    print(json.dumps(rate | {"per_layer": round(one_layer / len(layers), 3)}))


if __name__ == "__main__":
    main()

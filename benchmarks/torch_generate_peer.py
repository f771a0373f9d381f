"""The same generation as a torch user would write it: a loop over a model with a `DynamicCache`.

A batch of prompts, padded on the left, is read whole; then the likeliest token is appended, again and again.

    python benchmarks/torch_generate_peer.py --model FOLDER < WORKLOADS

Reads {workload: prompts} and prints {workload: {tokens, seconds}}, both as one line of JSON; the seconds of
`decode` are those of decoding alone. `benchmarks/generate.py` says what the workloads are.
Needs torch and transformers.
"""

import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, DynamicCache


@torch.no_grad()
def generate(model, prompts, new):
    """Tokens [B, new], the seconds until the first of them, and those from there on."""
    start = time.perf_counter()
    width = max(map(len, prompts))
    tokens_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache, chosen, read = DynamicCache(config=model.config), [], None
    for _ in range(new):
        logits_BTV = model(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits
        tokens_BT = logits_BTV[:, -1].argmax(-1, keepdim=True)
        chosen.append(tokens_BT)
        mask_BT = torch.cat([mask_BT, torch.ones_like(tokens_BT)], dim=1)
        positions_BT = positions_BT[:, -1:] + 1
        read = read or time.perf_counter() - start
    return torch.cat(chosen, dim=1).tolist(), read, time.perf_counter() - start - read


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Llama-like model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    report = {}
    for name, prompts in json.load(sys.stdin).items():
        generate(model, prompts[: options.batch], 2)
        tokens, seconds = [], 0.0
        for start in range(0, len(prompts), options.batch):
            found, reading, decoding = generate(model, prompts[start : start + options.batch], options.new)
            tokens += found
            # `new` tokens take one step less after the prompts' own.
            seconds += decoding * options.new / (options.new - 1) if name == "decode" else reading + decoding
        report[name] = {"tokens": tokens, "seconds": seconds}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

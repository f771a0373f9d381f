"""The same simulations as a torch user would make them: one explanation with its sequences at a time.

Prompt and sequence are read whole for every sequence; the first 11 logits at the sequence's tokens are kept.
With `--apart` every sequence is a batch of its own.

    python benchmarks/torch_simulate_peer.py --model FOLDER [--apart] < JOBS

Reads [{prompt, sequences}] as token ids, all sequences of one length, and prints {expected, seconds}, both
as one line of JSON. `benchmarks/simulate.py` makes the jobs. Needs torch and transformers.
"""

import argparse
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def simulate(model, jobs, *, apart):
    expected = []
    for job in jobs:
        prompt, sequences = job["prompt"], job["sequences"]
        ids = torch.tensor([prompt + sequence for sequence in sequences])
        logits = torch.cat(
            [
                model(input_ids=batch, use_cache=False).logits[:, len(prompt) :, :11]
                for batch in ids.split(1 if apart else len(ids))
            ]
        )
        expected.append((torch.softmax(logits.float(), -1) @ torch.arange(11.0)).tolist())
    return expected


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder of a Llama-like model")
    parser.add_argument("--apart", action="store_true", help="one sequence at a time")
    options = parser.parse_args()
    jobs = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    simulate(model, jobs[:2], apart=options.apart)
    start = time.perf_counter()
    expected = simulate(model, jobs, apart=options.apart)
    print(json.dumps({"expected": expected, "seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()

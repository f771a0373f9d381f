"""The reference: Hugging Face's torch implementation, hooked at every layer's down projection.

python -m tests.subjects.reference              rewrites tests/golden (needs torch)
python -m tests.subjects.reference VARIANT ...  rewrites the activations of some variants alone
"""

import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests import tiny

GOLDEN = Path(__file__).parent.parent / "golden"
TOKENS_BT = np.random.default_rng(7).integers(0, 384, (2, 40))
SMOLLM2_TEXT = "The river froze early that winter, and by December 1,204 people had walked across it."
SMOLLM2_NEURONS = slice(None, None, 24)
GREEDY_VARIANTS = ("llama-biases", "llama-rope-llama3", "mistral-sliding-window")
GREEDY_PROMPTS = [np.random.default_rng(n).integers(0, 384, n).tolist() for n in (5, 40, 1, 23, 12)]
GREEDY_TOKENS = 24
DOWN_PROJECTION = re.compile(r"\.(mlp\.(down_proj|c_proj|fc_out|dense_4h_to_h)|fc2)$")


def tokens_of(variant):
    """What a variant's golden file was computed from."""
    return TOKENS_BT if variant in tiny.LLAMA_VARIANTS else TOKENS_BT[:1, :32]


def torch_model(folder, *, double=False):
    """The model, with the plain form of attention, which knows of every variant (soft caps, say)."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float64 if double else torch.float32
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def torch_activations(folder, tokens_BT, *, double=False):
    """MLP activations of every layer [L, B, T, F] and logits [B, T, V], computed in float32 or float64.

    Experts' neurons follow one another, and are NaN at tokens that the expert does not read, as is what other
    layers have more of.
    """
    import torch

    from tests.subjects.torch_experts import watch_experts

    model = torch_model(folder, double=double)
    found = []

    def keep(acts):
        found.append(acts.reshape((*tokens_BT.shape, -1)))

    for name, module in model.named_modules():
        if DOWN_PROJECTION.search(name):
            module.register_forward_pre_hook(lambda module, inputs: keep(inputs[0].numpy()))
    watch_experts(model, keep)
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens_BT)).logits.numpy()
    assert len(found) == model.config.num_hidden_layers
    return stacked(found), logits


def stacked(layers):
    """Activations [B, T, F] of layers that may have more or fewer neurons, as one array with NaN for none."""
    widest = max(acts_BTF.shape[2] for acts_BTF in layers)
    gaps = [((0, 0), (0, 0), (0, widest - acts_BTF.shape[2])) for acts_BTF in layers]
    return np.stack([np.pad(x, gap, constant_values=np.nan) for x, gap in zip(layers, gaps, strict=True)])


def torch_greedy(folder, prompts, count):
    """The `count` tokens that `generate` appends to each prompt by itself, whatever they are."""
    import torch
    from transformers import GenerationConfig

    model = torch_model(folder)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    return [model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]


def main():
    from transformers import AutoTokenizer

    from jaxplain.subjects.packaged import packaged_folder

    greedy = {}
    only = sys.argv[1:]
    for name, config in tiny.VARIANTS.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = tiny.write_model(Path(scratch), config)
            acts, logits = torch_activations(folder, tokens_of(name))
            np.savez_compressed(GOLDEN / f"{name}.npz", acts=acts, logits=logits[:, -3:])
            if name in GREEDY_VARIANTS:
                greedy[name] = torch_greedy(folder, GREEDY_PROMPTS, GREEDY_TOKENS)
            print(name, acts.shape, file=sys.stderr)
    if only:
        return
    np.savez_compressed(GOLDEN / "greedy.npz", **greedy)
    folder = packaged_folder("smollm2-135m-instruct")
    tokens_BT = np.array([AutoTokenizer.from_pretrained(folder)(SMOLLM2_TEXT)["input_ids"]])
    acts, _ = torch_activations(folder, tokens_BT)
    np.savez_compressed(
        GOLDEN / "smollm2-135m-instruct.npz",
        tokens=tokens_BT,
        acts=acts[..., SMOLLM2_NEURONS],
        largest=np.abs(acts).max((1, 2, 3)),
    )


if __name__ == "__main__":
    main()

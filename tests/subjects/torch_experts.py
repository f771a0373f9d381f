"""What torch's experts compute: the inputs of their down projections, as they are multiplied."""

from unittest import mock

import numpy as np


def watch_experts(model, keep):
    """Have `keep` given the neurons [tokens, F] of every layer of experts, NaN where none were computed."""
    model.config._experts_implementation = "eager"  # one expert at a time, by plain products
    for block in [module for module in model.modules() if hasattr(module, "experts")]:
        _watch_block(block, keep)


def _watch_block(block, keep):
    found = {}
    block.experts.forward = _recording(block.experts, found)
    if hasattr(block, "shared_expert"):
        block.shared_expert.down_proj.register_forward_pre_hook(
            lambda module, inputs: found.update(shared=inputs[0].numpy())
        )
    original = block.forward

    def forward(*arguments):
        found.clear()
        out = original(*arguments)
        keep(np.concatenate([found[name] for name in ("routed", "shared") if name in found], axis=1))
        return out

    block.forward = forward


def _recording(experts, found):
    import torch

    linear, original = torch.nn.functional.linear, experts.forward

    def forward(hidden, chosen_NK, weights):
        multiplied = []

        def recorded(inputs, matrix, bias=None):
            if matrix.shape == experts.down_proj.shape[1:]:
                multiplied.append((inputs, matrix))
            return linear(inputs, matrix, bias)

        with mock.patch.object(torch.nn.functional, "linear", recorded):
            out = original(hidden, chosen_NK, weights)
        count, _, width = experts.down_proj.shape
        acts_NEI = np.full((len(hidden), count, width), np.nan, str(hidden.dtype).removeprefix("torch."))
        for inputs, matrix in multiplied:
            (expert,) = [e for e in range(count) if torch.equal(experts.down_proj[e], matrix)]
            # Tokens whose first choice the expert is, then those whose second it is, and so on.
            tokens = torch.cat([(chosen_N == expert).nonzero()[:, 0] for chosen_N in chosen_NK.T])
            acts_NEI[tokens, expert] = inputs.numpy()
        assert sum(len(inputs) for inputs, _ in multiplied) == chosen_NK.numel()
        found["routed"] = acts_NEI.reshape(len(hidden), -1)
        return out

    return forward

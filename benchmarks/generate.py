"""How fast generation is, against the same work in torch.

    python benchmarks/generate.py --torch PYTHON [--runs N]

SmolLM2-135M-Instruct, float32, greedy, 64 new tokens for batches of 8 prompts of random tokens.
  decode   tokens per second after prompts of 300 tokens, reading them excluded
  explain  tokens per second, reading included, for 24 prompts like those about neurons: they share
           their first 450 tokens and differ in the last 140 to 160
  apart    the same for prompts as long that share nothing
Each run is a process, jaxplain's and torch's (`benchmarks/torch_generate_peer.py`, with a Python that
has torch and transformers) by turns; every program is compiled, and every loop was run, before it is
timed. Rates are medians over the runs. Prints JSON.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxplain.configs.extraction import MeshConfig, SubjectConfig
from jaxplain.mesh import make_mesh
from jaxplain.subjects.generation import Generator, Sampling, _sample
from jaxplain.subjects.subject import open_subject


def workloads(vocabulary: int, batch: int) -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(0)

    def draw(length: int) -> list[int]:
        return rng.integers(100, vocabulary, length).tolist()

    lengths, shared = rng.integers(140, 161, 3 * batch), draw(450)
    return {
        "decode": [draw(300) for _ in range(batch)],
        "explain": [shared + draw(length) for length in lengths],
        "apart": [draw(450 + length) for length in lengths],
    }


def measure(id: str, *, batch: int, new: int) -> dict[str, Any]:
    """Tokens and seconds of every workload, `reading` None where it was not timed by itself."""
    subject = open_subject(SubjectConfig(id=id))
    mesh = make_mesh(MeshConfig(), batch_size=batch, mlp_width=subject.arch.neurons)
    generator = Generator(subject.load(mesh, with_head=True), mesh, batch_size=batch)
    sampling = Sampling(temperature=0.0, max_tokens=new)
    report = {}
    for name, prompts in workloads(subject.arch.vocabulary, batch).items():
        longest = sorted(prompts, key=len)[-batch:]
        warm = longest[:1] + longest[:1] * 0 + longest[1:]
        seeds = [0] * len(prompts)
        if name == "decode":
            [(_, *state)] = jax.block_until_ready(list(generator._read(prompts, new)))
            for _ in range(2):
                start = time.perf_counter()
                tokens_BN, _ = jax.device_get(
                    _sample(
                        generator._graph,
                        generator._weights,
                        state[1],
                        state[0],
                        state[2],
                        np.zeros(batch, np.uint32),
                        sampling,
                    )
                )
                seconds = time.perf_counter() - start
            tokens = tokens_BN.tolist()
        else:
            list(generator.generate(warm, sampling, seeds[:batch]))
            start = time.perf_counter()
            found = dict(generator.generate(prompts, sampling, seeds))
            seconds = time.perf_counter() - start
            tokens = [found[number].tokens for number in range(len(prompts))]
        report[name] = {"tokens": tokens, "seconds": seconds}
    return report

"""What `python -m jaxplain.explain` is told."""

import dataclasses
import math
from typing import Any, Literal
from urllib.parse import urlsplit

from jaxplain.configs.checks import require
from jaxplain.configs.extraction import MeshConfig, NeuronsConfig

Sign = Literal["max", "min"]
Provider = Literal["token_table", "local", "gemini", "openai"]
Style = Literal[
    "token_activation_pairs",
    "highlighted",
    "highlighted_both_signs",
    "contrastive",
    "token_list",
    "activation_values",
]


_OWN_PARAMETERS = {"model", "messages", "contents", "n", "candidate_count", "stream"}
_OWN_PARAMETERS |= {"max_tokens", "max_completion_tokens", "max_output_tokens"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChosenNeuronsConfig(NeuronsConfig):
    """Which neurons to explain.

    Args:
        layers: A list of layers by number from 0; all; or a range start:stop:step such as 0:30:3.
        indices: Neurons of each layer, or of each of the experts, given in the same ways.
        experts: Of a mixture of experts, the experts of each layer, given in the same ways; where indices are
            given, experts must be.
        file: A .npy of (layer, neuron) pairs, integers [N, 2], in place of the others; for a mixture of
            experts of (layer, expert, neuron), [N, 3].
        by: Take the neurons with the highest value of a statistic, or random ones.
        count: How many of them to take; needs `by`.
        seed: Of the random choice.
    """

    by: Literal["kurtosis", "fraction_active", "random"] | None = None
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.by is None) == (self.count is None),
            "neurons.count",
            self.count,
            "give neurons.by and neurons.count together, or neither",
        )
        require(self.count is None or self.count >= 1, "neurons.count", self.count, "give a positive number")
        require(self.seed >= 0, "neurons.seed", self.seed, "give a number from 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalModelConfig:
    """How a local model is run.

    Args:
        revision: Branch, tag or commit of a hub id.
        dtype: Of weights and arithmetic.
        batch_size: Prompts per batch, over all devices.
        mesh: How devices are arranged.
        added_tokens: Tokens that the model was finetuned with and that its tokenizer files lack, in
            order; they take the ids after the last known one.
        escape: Text to be replaced in prompts, such as {"<|eot_id|>": "<||eot_id||>"}; undone in
            replies. Special tokens of the model in an exemplar are otherwise taken apart into characters.
        stop: Tokens that end a reply, besides those that the model's own files name.
        reply_start: What every reply begins with; the model goes on from there.
    """

    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 8
    mesh: MeshConfig = MeshConfig()
    added_tokens: list[str] = dataclasses.field(default_factory=list)
    escape: dict[str, str] = dataclasses.field(default_factory=dict)
    stop: list[str] = dataclasses.field(default_factory=list)
    reply_start: str = ""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "explainer.local.batch_size", self.batch_size, "give a positive number")
        require(
            all(map(all, self.escape.items())),
            "explainer.local.escape",
            self.escape,
            "neither text nor replacement may be empty",
        )
        require(
            len(set(self.escape.values())) == len(self.escape),
            "explainer.local.escape",
            self.escape,
            "replacements must differ from one another, so that they can be undone",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VertexConfig:
    """Gemini by way of Vertex AI, with the credentials that `gcloud auth application-default` leaves.

    Args:
        project: Google Cloud project.
        location: Region, or global.
    """

    project: str
    location: str = "global"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriceConfig:
    """What a model costs, in US dollars per million tokens.

    Args:
        input: Of the prompt.
        output: Of the reply, thoughts included.
    """

    input: float
    output: float

    def __post_init__(self) -> None:
        for field in ("input", "output"):
            value = getattr(self, field)
            require(
                math.isfinite(value) and value >= 0,
                f"explainer.prices.{field}",
                value,
                "give US dollars per million tokens",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Where to stop; counted over all runs that write these explanations into one database.

    Args:
        max_requests: Requests sent, retries included.
        max_cost_usd: US dollars by explainer.prices. A request is sent only if the most that it can
            cost still fits.
    """

    max_requests: int | None = None
    max_cost_usd: float | None = None

    def __post_init__(self) -> None:
        for field in ("max_requests", "max_cost_usd"):
            value = getattr(self, field)
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"explainer.budget.{field}",
                value,
                "give a positive number, or leave it out",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainerConfig:
    """What writes the explanations.

    Args:
        provider: token_table needs no language model; local runs one here; gemini is Google's;
            openai is any server with OpenAI's chat protocol (vLLM, llama.cpp, Ollama, OpenRouter).
        model: The model's name at the provider; for local a packaged subject, a hub id, or a folder.
        local: How a local model is run.
        base_url: The server's address, if not the provider's own; for openai it ends in /v1.
        key_variable: Environment variable that holds the key (GEMINI_API_KEY or GOOGLE_API_KEY for
            gemini, OPENAI_API_KEY for openai); a server at a base_url of your own may need none.
        vertex: Reach Gemini through Vertex AI.
        mode: online asks one by one; batch hands all to Gemini's batch API, which takes up to a day
            and costs half. A batch that was submitted survives a restart.
        batch_requests: Requests in one batch job.
        parameters: More fields of the provider's request, such as {thinking_config:
            {thinking_budget: 0}} or {reasoning_effort: low}.
        concurrency: Requests under way at once.
        timeout_seconds: For one request.
        retries: Times that a request is tried again after 429, 5xx, a timeout or a lost connection.
        cache: Keep replies on disk, and never pay for the same request twice.
        prices: US dollars per million tokens, by model.
        budget: Where to stop.
    """

    provider: Provider
    model: str | None = None
    local: LocalModelConfig = LocalModelConfig()
    base_url: str | None = None
    key_variable: str | None = None
    vertex: VertexConfig | None = None
    mode: Literal["online", "batch"] = "online"
    batch_requests: int = 1000
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    concurrency: int = 16
    timeout_seconds: float = 120.0
    retries: int = 6
    cache: bool = True
    prices: dict[str, PriceConfig] = dataclasses.field(default_factory=dict)
    budget: BudgetConfig = BudgetConfig()

    def __post_init__(self) -> None:
        token_table = self.provider == "token_table"
        require(
            token_table or bool(self.model),
            "explainer.model",
            self.model,
            f"name the model that provider {self.provider} is to use",
        )
        require(
            not token_table or self.model is None,
            "explainer.model",
            self.model,
            "provider token_table uses no model, so leave it out",
        )
        require(
            self.mode == "online" or (self.provider == "gemini" and self.vertex is None),
            "explainer.mode",
            self.mode,
            "batches are for provider gemini without vertex; use online",
        )
        require(
            self.vertex is None or self.provider == "gemini",
            "explainer.vertex",
            self.vertex,
            "it is for provider gemini",
        )
        require(
            self.local == LocalModelConfig() or self.provider == "local",
            "explainer.local",
            self.local,
            "it is for provider local",
        )
        for field in ("base_url", "key_variable"):
            value = getattr(self, field)
            require(
                value is None or self.provider in ("gemini", "openai"),
                f"explainer.{field}",
                value,
                "it is for providers gemini and openai",
            )
        address = urlsplit("https://" if self.base_url is None else self.base_url)
        require(
            address.scheme in ("http", "https"), "explainer.base_url", self.base_url, "begin it with https://"
        )
        require(
            not address.username and not address.password and not address.query,
            "explainer.base_url",
            f"{address.scheme}://...{address.hostname}",
            "leave user names, passwords and ?parameters out of it and put the key into the environment",
        )
        for field in ("concurrency", "batch_requests", "timeout_seconds"):
            value = getattr(self, field)
            require(math.isfinite(value) and value > 0, f"explainer.{field}", value, "give a positive number")
        for name, value in self.parameters.items():
            require(
                name not in _OWN_PARAMETERS or (value is None and "tokens" in name),
                f"explainer.parameters.{name}",
                value,
                "the budget and the records would not know of it; use sampling.max_tokens, sampling.samples "
                "or explainer.model",
            )
        require(self.retries >= 0, "explainer.retries", self.retries, "give 0 or more")
        require(
            self.budget.max_cost_usd is None or self.model in self.prices,
            "explainer.budget.max_cost_usd",
            self.budget.max_cost_usd,
            f"add explainer.prices for {self.model}, in US dollars per million tokens",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What the explainer is shown.

    Args:
        style: token_activation_pairs lists every token with its activation from 0 to 10 (Bills et
            al., 2023); highlighted puts the activating tokens between delimiters (Choi et al., 2024);
            highlighted_both_signs does so for both signs in one prompt; contrastive adds excerpts on
            which the neuron is silent; token_list and activation_values show only the vocabulary
            tokens with the highest mean activation, the latter with the means.
        exemplars: How many exemplars to show, at most: a number, or [least, most] to draw it for
            every neuron (every sample with resample_exemplars).
        ranks: From which ranks they are taken, as start:stop:step.
        permute: Show them in random order rather than strongest first.
        resample_exemplars: Draw exemplars and order anew for every sample of a neuron.
        context: Tokens to keep on either side of the strongest one; all where left out.
        chain_of_thought: Ask for reasoning before the explanation (the three highlighted styles).
        quantile: Tokens above this quantile of the neuron's activations are highlighted; it is
            loosened until at least 3 tokens show.
        delimiters: What stands around highlighted tokens.
        negative_delimiters: The same for the other sign in highlighted_both_signs.
        counterexamples: Silent excerpts in a contrastive prompt.
        tokens: Tokens in token_list, activation_values and provider token_table.
        few_shot: Where solved examples stand: in the system prompt, as turns of their own, or nowhere.
        few_shot_count: How many solved examples.
        resample_few_shot: Draw the solved examples anew for every prompt.
    """

    style: Style = "highlighted"
    exemplars: int | list[int] = 10
    ranks: str = "0:20"
    permute: bool = False
    resample_exemplars: bool = False
    context: int | None = None
    chain_of_thought: bool = False
    quantile: float = 0.9999
    delimiters: list[str] = dataclasses.field(default_factory=lambda: ["{{", "}}"])
    negative_delimiters: list[str] = dataclasses.field(default_factory=lambda: ["[[", "]]"])
    counterexamples: int = 5
    tokens: int = 10
    few_shot: Literal["system", "turns", "none"] = "turns"
    few_shot_count: int = 3
    resample_few_shot: bool = False

    def __post_init__(self) -> None:
        least, most = self.exemplar_range
        require(
            isinstance(self.exemplars, int) or len(self.exemplars) == 2,
            "prompt.exemplars",
            self.exemplars,
            "give a number, or [least, most]",
        )
        require(1 <= least <= most, "prompt.exemplars", self.exemplars, "give positive numbers, least first")
        require(self.context is None or self.context >= 0, "prompt.context", self.context, "give 0 or more")
        require(0 < self.quantile < 1, "prompt.quantile", self.quantile, "give a number between 0 and 1")
        for field in ("delimiters", "negative_delimiters"):
            pair = getattr(self, field)
            require(
                len(pair) == 2
                and all(pair)
                and not any(c.isalnum() or c in "\\ \t\n" for c in "".join(pair)),
                f"prompt.{field}",
                pair,
                "give two strings of punctuation, without spaces and backslashes",
            )
        require(
            len({*self.delimiters, *self.negative_delimiters}) >= 4 or self.style != "highlighted_both_signs",
            "prompt.negative_delimiters",
            self.negative_delimiters,
            "they must differ from prompt.delimiters",
        )
        for field in ("counterexamples", "tokens"):
            require(getattr(self, field) >= 1, f"prompt.{field}", getattr(self, field), "give 1 or more")
        require(
            self.few_shot_count >= 1,
            "prompt.few_shot_count",
            self.few_shot_count,
            "give 1 or more; prompt.few_shot none leaves the examples out",
        )
        require(
            not self.chain_of_thought
            or self.style in ("highlighted", "highlighted_both_signs", "contrastive"),
            "prompt.chain_of_thought",
            self.chain_of_thought,
            f"style {self.style} has no such variant",
        )

    @property
    def exemplar_range(self) -> tuple[int, int]:
        """Least and most exemplars in a prompt."""
        if isinstance(self.exemplars, int):
            return self.exemplars, self.exemplars
        return self.exemplars[0], self.exemplars[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How replies are drawn.

    Args:
        samples: Explanations of every neuron and sign.
        temperature: 0 takes the likeliest token each time.
        top_p: Choose among the likeliest tokens that together reach this probability.
        max_tokens: Tokens of a reply, at most (thoughts included).
        seed: Of everything that is drawn at random, prompts included.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.samples >= 1, "sampling.samples", self.samples, "give 1 or more")
        require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "sampling.temperature",
            self.temperature,
            "give 0 or more",
        )
        require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "give a number up to 1")
        require(self.max_tokens >= 1, "sampling.max_tokens", self.max_tokens, "give 1 or more")
        require(self.seed >= 0, "sampling.seed", self.seed, "give a number from 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explain neurons in words, from the exemplars in a store.

    Args:
        store: The run's folder, or the store's path or URL.
        explainer: What writes the explanations.
        split: Which split's exemplars to show.
        signs: max explains what drives a neuron up, min what drives it down.
        neurons: Which neurons to explain.
        prompt: What the explainer is shown.
        sampling: How replies are drawn.
        output: Folder for explanations.sqlite, if not the folder that holds the store.
        progress: Show a progress bar.
    """

    store: str
    explainer: ExplainerConfig
    split: str = "train"
    signs: list[Sign] = dataclasses.field(default_factory=lambda: ["max", "min"])
    neurons: ChosenNeuronsConfig = ChosenNeuronsConfig()
    prompt: PromptConfig = PromptConfig()
    sampling: SamplingConfig = SamplingConfig()
    output: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        require(
            bool(self.signs) and len(set(self.signs)) == len(self.signs),
            "signs",
            self.signs,
            "name max, min or both, and none twice",
        )
        require(
            self.prompt.style != "highlighted_both_signs" or len(self.signs) == 2,
            "signs",
            self.signs,
            "prompt.style highlighted_both_signs explains both, so name max and min",
        )

"""From a config to whatever answers: the one place that knows all providers."""

import contextlib

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.explainers.replies import LanguageModel
from jaxplain.store.explanations import ExplanationDatabase
from jaxplain.wheels import cache_folder

REPLY_CACHE_NAME = "replies.sqlite"


def open_model(
    config: ExplainerConfig,
    sampling: SamplingConfig,
    *,
    database: ExplanationDatabase,
    recipe: int,
    stack: contextlib.ExitStack,
    fresh: bool = False,
) -> LanguageModel | None:
    """What answers requests; None for token tables. `stack` closes what it opens.

    With `fresh`, replies from the cache do not serve.

    Raises JaxplainError for a missing key, client library or model.
    """
    match config.provider:
        case "token_table":
            return None
        case "local":
            from jaxplain.explainers.local import LocalModel

            assert config.model is not None
            return LocalModel(config.model, config.local, sampling)
        case "gemini":
            from jaxplain.explainers.gemini import GeminiClient

            client = GeminiClient(config, sampling)
            if config.mode == "batch":
                from jaxplain.explainers.gemini_batches import GeminiBatches

                return GeminiBatches(client, config, sampling, database=database, recipe=recipe)
        case "openai":
            from jaxplain.explainers.openai_server import OpenAIClient

            client = OpenAIClient(config, sampling)
    from jaxplain.explainers.remote import RemoteModel
    from jaxplain.explainers.reply_cache import ReplyCache

    cache = (
        stack.enter_context(ReplyCache(cache_folder() / REPLY_CACHE_NAME, fresh=fresh))
        if config.cache
        else None
    )
    return RemoteModel(client, config, sampling, database=database, recipe=recipe, cache=cache)

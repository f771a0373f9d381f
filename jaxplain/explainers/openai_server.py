"""Any server that speaks OpenAI's chat completions: vLLM, llama.cpp, Ollama, OpenRouter, OpenAI."""

import json
from typing import Any

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.explainers.keys import key_of, quoted
from jaxplain.explainers.remote import NEVER_SENT, RejectedError, TransientError, retry_after
from jaxplain.explainers.replies import Reply, Request

try:
    import openai
except ImportError as missing:
    raise JaxplainError(
        "explainer.provider openai needs the client library; install it with pip install 'jaxplain[openai]'."
    ) from missing

_MOST_TOKENS = {True: "max_completion_tokens", False: "max_tokens"}
_TRANSIENT_STATUS = {408, 409, 425, 429}


class OpenAIClient:
    """Calls `chat.completions`."""

    def __init__(self, config: ExplainerConfig, sampling: SamplingConfig):
        self._config, self._sampling = config, sampling
        self._key = key_of(config, ["OPENAI_API_KEY"], needed=config.base_url is None)
        self._client = openai.AsyncOpenAI(
            base_url=config.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=config.timeout_seconds,
        )

    def parameters(self, request: Request) -> dict[str, Any]:
        """What is sent besides model and messages."""
        sent = {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            # OpenAI's newer models insist on one name, other servers know the older one.
            _MOST_TOKENS[self._config.base_url is None]: self._sampling.max_tokens,
            "seed": request.seed,
        }
        if request.schema is not None:
            form = {"name": "reply", "schema": request.schema, "strict": True}
            sent["response_format"] = {"type": "json_schema", "json_schema": form}
        return sent | self._config.parameters

    async def ask(self, request: Request) -> Reply:
        """One chat completion."""
        assert self._config.model is not None
        # A parameter set to null is left out: some servers and models refuse what others require.
        parameters = {k: v for k, v in self.parameters(request).items() if v is not None}
        try:
            completion = await self._client.chat.completions.create(
                model=self._config.model,
                messages=[{"role": m.role, "content": m.content} for m in request.messages],  # pyright: ignore
                extra_body=parameters,
            )
        except openai.APIStatusError as error:
            raise self._outcome(error) from None  # the server's own words may hold the key
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__ if error.__cause__ else type(error).__name__
            raise TransientError(
                f"the connection failed ({cause})", billed=cause not in NEVER_SENT
            ) from error
        except (json.JSONDecodeError, openai.OpenAIError) as error:
            reason = f"the answer is not of the protocol ({type(error).__name__})"
            raise TransientError(reason, billed=True) from None
        return _reply_of(completion)

    def _outcome(self, error: "openai.APIStatusError") -> Exception:
        body = error.body if isinstance(error.body, dict) else {}
        said = quoted(str(body.get("message") or first_line(error)), self._key)
        reason = f"{error.status_code} from {self._client.base_url.host}: {said}"
        if error.status_code in (401, 403):
            return JaxplainError(f"the server does not accept the key or the account: {reason}.")
        if error.status_code == 404:
            return JaxplainError(f"explainer.model is {self._config.model!r}, which is not there: {reason}.")
        if error.code == "insufficient_quota":
            return JaxplainError(f"the account's quota is used up: {reason}.")
        if error.status_code in _TRANSIENT_STATUS or error.status_code >= 500:
            return TransientError(reason, retry_after(error.response.headers.get("retry-after")))
        return RejectedError(reason)

    async def close(self) -> None:
        """Give up connections."""
        await self._client.close()


def _reply_of(completion: Any) -> Reply:
    choices = getattr(completion, "choices", None)
    if choices is None:
        raise TransientError("the answer is not of the protocol (no choices)", billed=True)
    usage = getattr(completion, "usage", None)
    counted = {
        "model": completion.model,
        "input_tokens": getattr(usage, "prompt_tokens", None) or 0,
        "output_tokens": getattr(usage, "completion_tokens", None) or 0,
    }
    if not choices:
        return Reply(outcome="refused", detail="the answer holds no choices", **counted)
    message, finish = choices[0].message, choices[0].finish_reason
    text = (message.content if message else None) or ""
    refusal = getattr(message, "refusal", None)
    if refusal or finish == "content_filter":
        return Reply(outcome="refused", text=refusal or text, detail=f"finish reason {finish}", **counted)
    cut = "the reply was cut short by sampling.max_tokens" if finish == "length" else None
    return Reply(outcome="answered", text=text, detail=cut, **counted)

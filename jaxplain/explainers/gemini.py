"""Gemini, through google-genai: the Developer API with a key, or Vertex AI."""

import contextlib
import json
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.errors import JaxplainError, first_line
from jaxplain.explainers.keys import key_of, quoted
from jaxplain.explainers.remote import NEVER_SENT, RejectedError, TransientError, retry_after
from jaxplain.explainers.replies import Reply, Request

try:
    import google.auth
    import httpx2
    import pydantic
    from google import genai
    from google.auth.exceptions import GoogleAuthError
    from google.genai import errors, types
except ImportError as missing:
    raise JaxplainError(
        "explainer.provider gemini needs the client library; install it with pip install 'jaxplain[gemini]'."
    ) from missing

_TRANSIENT_STATUS = {408, 429, 499}
_VERTEX_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_KEY_VARIABLES = ["GEMINI_API_KEY", "GOOGLE_API_KEY"]


class GeminiClient:
    """Calls `models.generate_content`."""

    def __init__(self, config: ExplainerConfig, sampling: SamplingConfig):
        self._config, self._sampling = config, sampling
        # A client of our own is ours to close, and to give as many connections as requests.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency)
        self._http = httpx2.AsyncClient(
            transport=_Transport(limits=limits, proxy=_proxy(config)), timeout=config.timeout_seconds
        )
        options = types.HttpOptions(
            base_url=config.base_url,
            timeout=round(config.timeout_seconds * 1000),
            retry_options=types.HttpRetryOptions(attempts=1),
            httpx_async_client=self._http,
        )
        if config.vertex is None:
            needed = config.base_url is None
            self._key = key_of(config, _KEY_VARIABLES, needed=needed)
            # Not left open, for the environment would decide it.
            self.client = genai.Client(enterprise=False, api_key=self._key or "none", http_options=options)
        else:
            self._key = None
            vertex = config.vertex
            try:
                credentials, _ = google.auth.default(scopes=[_VERTEX_SCOPE])
            except GoogleAuthError as error:
                raise JaxplainError(
                    "explainer.vertex: there are no usable credentials; run gcloud auth application-default "
                    f"login ({first_line(error)})."
                ) from error
            self.client = genai.Client(
                enterprise=True,
                project=vertex.project,
                location=vertex.location,
                credentials=credentials,
                http_options=options,
            )
        self._call_config({})  # refuses unknown parameters at once

    def parameters(self, request: Request) -> dict[str, Any]:
        """What is sent besides model and messages."""
        sent = {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_output_tokens": self._sampling.max_tokens,
            "seed": request.seed % 2**31,
        }
        if request.schema is not None:
            sent |= {"response_mime_type": "application/json", "response_json_schema": request.schema}
        return sent | self._config.parameters

    def call(self, request: Request) -> tuple[list[types.ContentUnion], types.GenerateContentConfig]:
        """Contents and config of one call."""
        system = "\n\n".join(m.content for m in request.messages if m.role == "system")
        contents: list[types.ContentUnion] = [
            types.Content(
                role="model" if message.role == "assistant" else "user",
                parts=[types.Part(text=message.content)],
            )
            for message in request.messages
            if message.role != "system"
        ]
        return contents, self._call_config(self.parameters(request) | {"system_instruction": system or None})

    def _call_config(self, parameters: dict[str, Any]) -> types.GenerateContentConfig:
        try:
            return types.GenerateContentConfig(**self._config.parameters | parameters)
        except pydantic.ValidationError as error:
            fields = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
            raise JaxplainError(
                f"explainer.parameters: google-genai has no such field or value: {fields}."
            ) from error

    async def ask(self, request: Request) -> Reply:
        """One call of generate_content."""
        assert self._config.model is not None
        contents, call_config = self.call(request)
        try:
            response = await self.client.aio.models.generate_content(
                model=self._config.model, contents=contents, config=call_config
            )
        except Exception as error:
            raise self.outcome(error) from None  # the server's own words may hold the key
        return reply_of(response)

    def outcome(self, error: Exception) -> Exception:
        """What an exception of the client library means for the request, or for all of them."""
        if isinstance(error, httpx2.TimeoutException):
            return TimeoutError()
        if isinstance(error, httpx2.TransportError):
            cause = type(error).__name__
            return TransientError(f"the connection failed ({cause})", billed=cause not in NEVER_SENT)
        if isinstance(
            error, (json.JSONDecodeError, errors.UnknownApiResponseError, pydantic.ValidationError)
        ):
            return TransientError(f"the answer is not of the protocol ({type(error).__name__})", billed=True)
        if isinstance(error, GoogleAuthError):
            return JaxplainError(f"explainer.vertex: the credentials do not serve ({first_line(error)}).")
        if not isinstance(error, errors.APIError):
            return error
        said = self.quoted(str(error.message or first_line(error)))
        reason = f"{error.code} {self.quoted(error.status or '')} from Gemini: {said}"
        if error.code in (401, 403) or "API key not valid" in said:
            return JaxplainError(f"Gemini does not accept the key or the project: {reason}.")
        if error.code == 404:
            return JaxplainError(f"explainer.model is {self._config.model!r}, which is not there: {reason}.")
        if error.code in _TRANSIENT_STATUS or error.code >= 500:
            return TransientError(reason, _asked_wait(error))
        return RejectedError(reason)

    def quoted(self, text: str) -> str:
        """What the service says, fit to be written down."""
        return quoted(text, self._key)

    async def close(self) -> None:
        """Give up connections."""
        await self.client.aio.aclose()
        await self._http.aclose()


def _proxy(config: ExplainerConfig) -> str | None:
    """The proxy that the environment names; httpx2 looks for none where a transport is given."""
    address = urlsplit(config.base_url or "https://generativelanguage.googleapis.com")
    if proxy_bypass(address.hostname or ""):
        return None
    return getproxies().get(address.scheme)


class _Transport(httpx2.AsyncHTTPTransport):
    """Writes the details of errors in batches as strings.

    google-genai 3.4 declares them so, while the service sends objects, and for one of them refuses to
    read the whole job with all its replies.
    """

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request as ever; change only answers about batches."""
        response = await super().handle_async_request(request)
        if "/batches" not in request.url.path or response.status_code != 200:
            return response
        content = await response.aread()
        await response.aclose()
        with contextlib.suppress(ValueError):
            content = json.dumps(_with_plain_details(json.loads(content))).encode()
        return httpx2.Response(200, headers={"content-type": "application/json"}, content=content)


def _with_plain_details(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_plain_details(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: [item if isinstance(item, str) else json.dumps(item) for item in inner]
        if key == "details" and isinstance(inner, list)
        else _with_plain_details(inner)
        for key, inner in value.items()
    }


def _asked_wait(error: errors.APIError) -> float | None:
    """Seconds to wait, from the header or the RetryInfo in the body."""
    headers = getattr(error.response, "headers", None)
    if headers is not None and (wait := retry_after(headers.get("retry-after"))) is not None:
        return wait
    try:
        body: Any = error.details
        details = body["error"]["details"]
        delays = [d["retryDelay"] for d in details if "retryDelay" in d]
        return float(delays[0].removesuffix("s"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None


def reply_of(response: types.GenerateContentResponse) -> Reply:
    """A response as a reply. Raises TransientError for one that is not of the protocol."""
    usage = response.usage_metadata
    output = ((usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0)) if usage else 0
    counted = {
        "model": response.model_version,
        "input_tokens": (usage.prompt_token_count or 0) if usage else 0,
        "output_tokens": output,
    }
    feedback = response.prompt_feedback
    if feedback is not None and feedback.block_reason is not None:
        return Reply(outcome="refused", detail=f"prompt blocked: {feedback.block_reason.value}", **counted)
    if response.candidates is None and usage is None:
        raise TransientError("the answer is not of the protocol (no candidates)", billed=True)
    if not response.candidates:
        return Reply(outcome="refused", detail="the answer holds no candidates", **counted)
    candidate = response.candidates[0]
    parts = (candidate.content.parts if candidate.content else None) or []
    text = "".join(part.text or "" for part in parts if not part.thought)
    finish = candidate.finish_reason.value if candidate.finish_reason else "STOP"
    if finish == "MAX_TOKENS":
        cut = "the reply was cut short by sampling.max_tokens"
        return Reply(outcome="answered", text=text, detail=cut, **counted)
    if finish not in ("STOP", "FINISH_REASON_UNSPECIFIED"):
        return Reply(outcome="refused", text=text, detail=f"finish reason {finish}", **counted)
    return Reply(outcome="answered", text=text, **counted)

"""What all remote models share: concurrency, rate limits, retries, the cache and the budget.

A provider's own module turns one request into one call and its outcome into a `Reply`, or raises
`TransientError` (worth another try), `RejectedError` (this request will never do) or JaxplainError (no
request will: a wrong key, an unknown model).
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import json
import math
import random
import time
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.replies import Reply, Request
from jaxplain.explainers.reply_cache import ReplyCache, cache_key
from jaxplain.store.explanations import ExplanationDatabase

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_LONGEST_ASKED_WAIT = 900.0  # seconds; a server that asks for more has a quota by the day
_FAILURES_IN_A_ROW = 20
NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
"""What the clients' exceptions are called where no connection came about."""


class TransientError(Exception):
    """A failure that may pass: 429, 5xx, a lost connection.

    `after` is the wait that the server asks for. `billed` says that the server may have answered, and
    merely the answer got lost.
    """

    def __init__(self, reason: str, after: float | None = None, *, billed: bool = False):
        super().__init__(reason)
        self.after, self.billed = after, billed


class RejectedError(Exception):
    """The server will not take this request, whatever the number of tries."""


@runtime_checkable
class Client(Protocol):
    """A provider."""

    async def ask(self, request: Request) -> Reply:
        """One call; see the module for what it raises."""
        ...

    def parameters(self, request: Request) -> dict[str, Any]:
        """All that decides the reply besides provider, model and messages."""
        ...

    async def close(self) -> None:
        """Give up connections."""
        ...


class RemoteModel:
    """Asks a provider, as fast as it allows and as far as the budget goes."""

    def __init__(
        self,
        client: Client,
        config: ExplainerConfig,
        sampling: SamplingConfig,
        *,
        database: ExplanationDatabase,
        recipe: int,
        cache: ReplyCache | None,
    ):
        self._client, self._config, self._sampling = client, config, sampling
        self._purse = Purse(config, database, recipe)
        self._cache = cache
        self._open_at = 0.0  # no request is sent before this time (monotonic)
        self._failures_in_a_row = 0

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Reply]]:
        """Requests with their replies as they come in; at most `concurrency` are under way.

        Raises JaxplainError, after those under way are done, where the budget ends or no request can
        succeed.
        """
        with asyncio.Runner() as runner:
            under_way: dict[asyncio.Task[Reply], Request] = {}
            stopped_by: JaxplainError | None = None
            try:
                while True:
                    while stopped_by is None and len(under_way) < self._config.concurrency:
                        request = next(requests, None)
                        if request is None:
                            break
                        task = runner.get_loop().create_task(self._reply(request))
                        under_way[task] = request
                    if not under_way:
                        break
                    done = runner.run(_first_of(set(under_way)))
                    for task in done:
                        request = under_way.pop(task)
                        try:
                            reply = task.result()
                        except JaxplainError as error:
                            stopped_by = stopped_by or error
                            continue
                        yield request, reply
            finally:
                for task in under_way:
                    task.cancel()
                if under_way:
                    runner.run(_all_of(set(under_way)))
                with contextlib.suppress(Exception):
                    runner.run(self._client.close())
            if stopped_by is not None:
                raise stopped_by

    async def _reply(self, request: Request) -> Reply:
        key = cache_key(
            {
                "provider": self._config.provider,
                "base_url": self._config.base_url,
                "model": self._config.model,
                "parameters": self._client.parameters(request),
                "messages": [dataclasses.astuple(message) for message in request.messages],
            }
        )
        if self._cache is not None and (kept := self._cache.get(key)) is not None:
            return kept
        try:
            reply = await self._reply_after_retries(request)
        except RejectedError as error:
            reply = Reply(outcome="failed", detail=str(error))
        if reply.outcome == "failed":
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= _FAILURES_IN_A_ROW:
                raise JaxplainError(
                    f"{_FAILURES_IN_A_ROW} requests in a row failed, the last one with: {reply.detail}; "
                    "what is done is kept, and the next run goes on from there."
                )
            return reply
        self._failures_in_a_row = 0
        if self._cache is not None:
            self._cache.put(key, reply)
        return reply

    async def _reply_after_retries(self, request: Request) -> Reply:
        reason = ""
        for attempt in range(self._config.retries + 1):
            await self._until_open()
            reserved = await self._purse.reserve(request, self._sampling)
            cost = 0.0
            try:
                await self._until_open()  # it may have closed while the budget was waited for
                cost = reserved  # what is not known to be free may have been answered, and billed
                async with asyncio.timeout(self._config.timeout_seconds):
                    reply = await self._client.ask(request)
                if reply.input_tokens:  # some servers do not say what they used
                    cost = self._purse.cost(reply.input_tokens, reply.output_tokens)
                return dataclasses.replace(reply, cost_usd=cost)
            except TimeoutError:
                reason = f"no answer within {self._config.timeout_seconds:g} seconds"
                wait = _wait_before(attempt)
            except TransientError as error:
                reason, wait = str(error), _wait_before(attempt)
                cost = reserved if error.billed else 0.0
                if error.after is not None:
                    if error.after > _LONGEST_ASKED_WAIT:
                        raise JaxplainError(
                            f"the server asks to wait {error.after / 60:,.0f} minutes ({reason}); what is "
                            "done is kept, so run the same command again then."
                        ) from None
                    # The limit is the account's, so every request waits.
                    self._open_at = max(self._open_at, time.monotonic() + error.after)
                    wait = random.uniform(0, 0.1 * error.after)
            except (RejectedError, JaxplainError):
                cost = 0.0
                raise
            finally:
                self._purse.settle(reserved, cost)
            if attempt < self._config.retries:
                await asyncio.sleep(wait)
        return Reply(outcome="failed", detail=f"{reason} ({self._config.retries + 1} tries)")

    async def _until_open(self) -> None:
        while (wait := self._open_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)


class Purse:
    """The budget, kept in the database so that it holds over restarts and processes."""

    def __init__(self, config: ExplainerConfig, database: ExplanationDatabase, recipe: int):
        self._config, self._database, self._recipe = config, database, recipe
        self._price = config.prices.get(config.model or "")
        self._in_flight = 0
        self._settled = asyncio.Event()

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """US dollars; 0 without a price."""
        if self._price is None:
            return 0.0
        return (input_tokens * self._price.input + output_tokens * self._price.output) / 1e6

    def most(self, request: Request, sampling: SamplingConfig) -> float:
        """The most that a request can cost, in US dollars."""
        # A token is at least a byte, and a message has a few of its own.
        most_input = sum(len(message.content.encode()) + 16 for message in request.messages)
        if request.schema is not None:
            most_input += len(json.dumps(request.schema))  # providers may write it into the prompt
        return self.cost(most_input, sampling.max_tokens)

    async def reserve(self, request: Request, sampling: SamplingConfig) -> float:
        """Book a request; waits for those under way to be settled if it does not fit beside them.

        Raises JaxplainError where it does not fit at all.
        """
        most = self.most(request, sampling)
        while True:
            self._settled.clear()
            if self.book(most):
                self._in_flight += 1
                return most
            if self._in_flight == 0:
                raise self.reached(most)
            await self._settled.wait()

    def settle(self, reserved: float, cost: float) -> None:
        """Put the true cost in place of what was reserved."""
        self._in_flight -= 1
        self.correct(reserved, cost)
        self._settled.set()

    def book(self, most: float) -> bool:
        """Book a request that costs at most so much; False where it does not fit."""
        budget = self._config.budget
        return self._database.reserve(
            self._recipe, most, max_requests=budget.max_requests, max_cost_usd=budget.max_cost_usd
        )

    def correct(self, booked: float, cost: float, *, unsent: int = 0) -> None:
        """Put the true cost in place of what was booked; `unsent` requests were never sent."""
        self._database.settle(self._recipe, booked, cost, unsent=unsent)

    def reached(self, most: float) -> JaxplainError:
        """What to raise where the budget ends."""
        budget = self._config.budget
        requests, spent = self._database.spent(self._recipe)
        if budget.max_requests is not None and requests >= budget.max_requests:
            limit, reason = f"max_requests {budget.max_requests}", ""
        else:
            limit, reason = f"max_cost_usd {budget.max_cost_usd}", f", and the next one may cost ${most:.4f}"
        return JaxplainError(
            f"the budget ({limit}) is reached: {requests} requests and at most ${spent:.4f} so far{reason}; "
            "raise it and run again"
        )


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms; None where there is none."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _wait_before(attempt: int) -> float:
    """Exponential waiting with full jitter."""
    return random.uniform(0.5, 1.5) * min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)


async def _first_of(tasks: set[asyncio.Task[Reply]]) -> set[asyncio.Task[Reply]]:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return done


async def _all_of(tasks: set[asyncio.Task[Reply]]) -> None:
    await asyncio.wait(tasks)

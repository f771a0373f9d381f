"""Gemini's batch API: all requests in a few jobs, which survive a restart of this process.

A job is noted in the database under a label of our own *before* it is submitted, so that a process that
dies at any moment finds it again: by its name, or by the label among the account's jobs.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping

from google.genai import types

from jaxplain.configs.explanation import ExplainerConfig, SamplingConfig
from jaxplain.errors import JaxplainError
from jaxplain.explainers.gemini import GeminiClient, reply_of
from jaxplain.explainers.remote import Purse, RejectedError, TransientError
from jaxplain.explainers.replies import Reply, Request
from jaxplain.store.explanations import ExplanationDatabase
from jaxplain.store.neuron_id import NeuronId, neuron_of

_FIRST_POLL, _LONGEST_POLL = 1.0, 60.0
_MOST_JOB_BYTES = 15_000_000  # the API takes 20 MB of inlined requests
_DISCOUNT = 2.0  # a batch costs half of what the same requests cost one by one
_FAILED_STATES = {"JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED"}


@dataclasses.dataclass(kw_only=True)
class _Job:
    """A job under way: the keys of all its requests, in order, and those requests that are wanted here."""

    label: str
    name: str
    keys: list[str]
    requests: dict[str, Request]


class GeminiBatches:
    """Answers by batch jobs."""

    def __init__(
        self,
        client: GeminiClient,
        config: ExplainerConfig,
        sampling: SamplingConfig,
        *,
        database: ExplanationDatabase,
        recipe: int,
    ):
        self._client, self._config, self._sampling = client, config, sampling
        self._database, self._recipe = database, recipe
        self._purse = Purse(config, database, recipe)

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Reply]]:
        """Submit everything, then wait job by job; jobs of an earlier process first."""
        with asyncio.Runner() as runner:
            try:
                everything = {_key(request): request for request in requests}
                jobs = runner.run(self._jobs_of_before(everything))
                sent = {key for job in jobs for key in job.requests}
                left = [request for key, request in everything.items() if key not in sent]
                stopped_by: JaxplainError | None = None
                for part in self._parts(left):
                    affordable, reserved = self._affordable(part)
                    if affordable:
                        jobs.append(runner.run(self._submit(affordable, reserved)))
                    if len(affordable) < len(part):
                        stopped_by = self._purse.reached(self._most(part[len(affordable)]))
                        break
                unanswered = Counter(_neuron(key) for key in everything)
                for number, job in enumerate(jobs, 1):
                    for request, reply in runner.run(self._results(job)):
                        yield request, reply
                        unanswered[neuron_of(request)] -= 1
                    self._forget(jobs[:number], unanswered)
                if stopped_by is not None:
                    raise stopped_by
            finally:
                with contextlib.suppress(Exception):
                    runner.run(self._client.close())

    def _parts(self, requests: list[Request]) -> Iterator[list[Request]]:
        """Requests in jobs that are neither too many nor too large."""
        part: list[Request] = []
        size = 0
        for request in requests:
            length = 500 + sum(len(message.content.encode()) for message in request.messages)
            if part and (len(part) == self._config.batch_requests or size + length > _MOST_JOB_BYTES):
                yield part
                part, size = [], 0
            part.append(request)
            size += length
        if part:
            yield part

    def _forget(self, jobs: list[_Job], unanswered: Mapping[NeuronId, int]) -> None:
        """Forget what was read of jobs, as far as it is written.

        A neuron is written when the last of its replies is in. Until then, and while other neurons are
        another process's or not chosen, the job must be found again.
        """
        done = self._database.done(self._recipe)
        for job in jobs:
            neurons = {_neuron(key) for key in job.keys}
            open_ = {n for n in neurons if (unanswered[n] > 0 if n in unanswered else n not in done)}
            self._database.keep_in_batch(job.label, [key for key in job.keys if _neuron(key) in open_])

    async def _jobs_of_before(self, everything: dict[str, Request]) -> list[_Job]:
        jobs = []
        noted = self._database.batches(self._recipe)
        names = await self._names_by_label() if any(name is None for _, name, _, _ in noted) else {}
        for label, name, keys, reserved in noted:
            name = name or names.get(label)
            requests = {key: everything[key] for key in keys if key in everything}
            if not requests:
                continue  # another process's, or about neurons that are not chosen now
            if name is None:
                self._withdraw(label, len(keys), reserved)
                continue
            self._database.name_batch(label, name)
            jobs.append(_Job(label=label, name=name, keys=keys, requests=requests))
        return jobs

    def _withdraw(self, label: str, requests: int, reserved: float) -> None:
        """Forget a job that never arrived."""
        self._database.keep_in_batch(label, [])
        self._purse.correct(reserved, 0.0, unsent=requests)

    async def _names_by_label(self) -> dict[str, str]:
        try:
            pager = await self._client.client.aio.batches.list(config={"page_size": 100})
            return {job.display_name: job.name async for job in pager if job.display_name and job.name}
        except Exception as error:
            raise _sentence(self._client.outcome(error)) from None

    def _most(self, request: Request) -> float:
        return self._purse.most(request, self._sampling) / _DISCOUNT

    def _affordable(self, part: list[Request]) -> tuple[list[Request], float]:
        """As many of the requests as the budget allows, and what is booked for them."""
        reserved = 0.0
        for place, request in enumerate(part):
            most = self._most(request)
            if not self._purse.book(most):
                return part[:place], reserved
            reserved += most
        return part, reserved

    async def _submit(self, part: list[Request], reserved: float) -> _Job:
        assert self._config.model is not None
        label = f"jaxplain-{uuid.uuid4()}"
        keyed = {_key(request): request for request in part}
        inlined = []
        for key, request in keyed.items():
            contents, config = self._client.call(request)
            inlined.append(types.InlinedRequest(contents=contents, config=config, metadata={"key": key}))
        self._database.add_batch(self._recipe, label, list(keyed), reserved)
        name, attempt = None, 0
        while name is None:
            try:
                job = await self._client.client.aio.batches.create(
                    model=self._config.model, src=inlined, config={"display_name": label}
                )
                name = job.name
                outcome: Exception = TransientError("the answer to a new job holds no name")
            except Exception as error:
                outcome = self._client.outcome(error)
            passing = isinstance(outcome, (TransientError, TimeoutError))
            if name is None and passing:
                # What got lost on the way back may have arrived all the same.
                name = (await self._names_by_label()).get(label)
            if name is None:
                if attempt == self._config.retries or not passing:
                    self._withdraw(label, len(part), reserved)
                    raise _sentence(outcome)
                await asyncio.sleep(getattr(outcome, "after", None) or _FIRST_POLL * 2**attempt)
                attempt += 1
        self._database.name_batch(label, name)
        return _Job(label=label, name=name, keys=list(keyed), requests=keyed)

    async def _results(self, job: _Job) -> list[tuple[Request, Reply]]:
        finished = await self._wait_for(job)
        state = finished.state.value if finished.state else "JOB_STATE_UNSPECIFIED"
        found: dict[str, Reply] = {}
        responses = (finished.dest.inlined_responses if finished.dest else None) or []
        for place, response in enumerate(responses):
            # The order is not to be relied on; without metadata there is nothing better.
            key = (response.metadata or {}).get("key")
            if key is None and len(responses) == len(job.keys):
                key = job.keys[place]
            if key is not None:
                found[key] = self._reply(response)
        cost = sum((reply.cost_usd for reply in found.values()), 0.0)
        self._database.settle_batch(job.label, cost)
        missing = (
            f"the batch job ended as {state}" if state in _FAILED_STATES else "the batch job left it out"
        )
        return [
            (request, found.get(key) or Reply(outcome="failed", detail=missing))
            for key, request in job.requests.items()
        ]

    async def _wait_for(self, job: _Job) -> types.BatchJob:
        wait, failures = _FIRST_POLL, 0
        while True:
            try:
                found = await self._client.client.aio.batches.get(name=job.name)
                failures = 0
                if found.done:
                    return found
            except Exception as error:
                outcome = self._client.outcome(error)
                failures += 1
                if failures > self._config.retries or not isinstance(outcome, (TransientError, TimeoutError)):
                    raise _sentence(outcome) from None
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, _LONGEST_POLL)

    def _reply(self, response: types.InlinedResponse) -> Reply:
        if response.error is not None or response.response is None:
            code = response.error.code if response.error else None
            message = response.error.message if response.error else "no response"
            return Reply(outcome="failed", detail=f"{self._client.quoted(message or '')} (code {code})")
        try:
            reply = reply_of(response.response)
        except TransientError as error:
            return Reply(outcome="failed", detail=str(error))
        cost = self._purse.cost(reply.input_tokens, reply.output_tokens) / _DISCOUNT
        return dataclasses.replace(reply, cost_usd=cost)


def _key(request: Request) -> str:
    key = ":".join(map(str, (*neuron_of(request), request.sign, request.sample)))
    if request.schema is None:
        return key
    # Whoever asks by schema asks about explanations, of which a neuron may have several.
    said = "\n".join(message.content for message in request.messages)
    return f"{key}:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _neuron(key: str) -> NeuronId:
    numbers = itertools.takewhile(str.isdecimal, key.split(":"))
    return NeuronId(map(int, numbers))  # up to the sign


def _sentence(outcome: Exception) -> Exception:
    """Errors of a whole job end the run; the job is found again by the next one."""
    if isinstance(outcome, (TransientError, TimeoutError, RejectedError)):
        reason = str(outcome) or "no answer in time"
        return JaxplainError(
            f"Gemini's batch API failed: {reason}; jobs that were submitted are found again by the next run."
        )
    return outcome

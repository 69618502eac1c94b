"""Asks a language model behind any endpoint that speaks OpenAI's chat protocol: vLLM, Ollama, llama.cpp, hosted ones.

Requests pass limits of how many are on their way and how many, and how many tokens, go out a minute. What may work
later is tried again, after exponential back-off or when the endpoint says; what cannot is an answer with an error.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import re
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from absl import logging

from pyvdl.data import encodable

try:
    import openai
    from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter
except ImportError as error:
    raise ImportError(f"asking a language model needs more packages: pip install '.[llm]' ({error})") from error

_LONGEST_WAIT_SECONDS = 600.0  # an endpoint that asks for more is come back to by hand
_LONGEST_BACKOFF_SECONDS = 60.0
_LONGEST_ERROR = 300  # characters
_CHARACTERS_A_TOKEN = 4  # a guess, until the endpoint tells


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Where a model answers, and how it may be asked; nothing here changes what is asked."""

    base_url: str | None = None  # None: OPENAI_BASE_URL, or OpenAI's own
    concurrency: int = 16  # requests on their way at a time
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_seconds: float = 120.0  # of one try, from sending to the last byte
    retries: int = 6
    backoff_seconds: float = 1.0  # before the first retry; twice as long before each further one

    def __post_init__(self) -> None:
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url {self.base_url!r}: expected an address as http://localhost:8000/v1")
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute", "timeout_seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}={value}: expected a number above 0")


class EndpointError(RuntimeError):
    """The endpoint would refuse every request, or has gone: asking on makes no sense."""


@dataclass(kw_only=True)
class Answer:
    """What came of one request and its retries: text, or an error."""

    text: str | None = None
    error: str | None = None
    is_refused: bool = False  # the error is this request's own: others may fare better
    model: str | None = None  # as the endpoint names it
    is_cut: bool = False  # ran into max_tokens
    requests: int = 0
    prompt_tokens: int = 0  # of all tries, as far as the endpoint counts them
    completion_tokens: int = 0
    unmetered: int = 0  # replies that do not say how many tokens they took


class _Again(Exception):
    """Worth another try."""


class _Useless(Exception):
    """Not worth another try; other requests may fare better."""


@dataclass
class Endpoint:
    """A model to ask, as an async context manager."""

    model: str
    max_tokens: int
    temperature: float | None  # None: the endpoint's own
    connection: Connection = field(default_factory=Connection)
    has_answered: bool = False  # a request, now or in an earlier run: the account and the model are good

    async def __aenter__(self) -> Self:
        its = self.connection
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not (its.base_url or os.environ.get("OPENAI_BASE_URL")):
            raise ValueError("OPENAI_API_KEY is not set: OpenAI needs it; another endpoint is named by its base_url")
        self._client = openai.AsyncOpenAI(
            base_url=its.base_url,
            api_key=key or "none",  # local servers take any
            timeout=its.timeout_seconds,
            max_retries=0,  # tries are counted and limited here
        )
        # OpenAI's newer models want max_completion_tokens in its place, which other servers do not know.
        self._takes_max_tokens = True
        self._takes_seed = True
        self._free_at = 0.0  # by time.monotonic: when the next request may go out
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    @property
    def url(self) -> str:
        return str(self._client.base_url)

    async def ask(self, prompt: str, seed: int) -> Answer:
        """One answer; EndpointError where no request would get one."""
        answer = Answer()
        first = self.connection.backoff_seconds
        tries = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(1 + self.connection.retries),
            wait=wait_exponential_jitter(multiplier=first, max=_LONGEST_BACKOFF_SECONDS, jitter=first),
            reraise=True,
        )
        try:
            await tries(self._try, answer, prompt, seed)
            self.has_answered = True
        except (_Again, _Useless) as error:
            answer.error = _line(error)
            answer.is_refused = isinstance(error, _Useless)
        return answer

    async def _try(self, answer: Answer, prompt: str, seed: int) -> None:
        while (wait := self._free_at - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        answer.requests += 1
        expected = len(prompt) // _CHARACTERS_A_TOKEN
        self._hold_back(self._seconds(tokens=expected, requests=1))
        takes_max_tokens, takes_seed = self._takes_max_tokens, self._takes_seed
        try:
            async with asyncio.timeout(self.connection.timeout_seconds):  # a byte now and then is no answer
                found: Any = await self._client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    seed=seed if takes_seed else openai.omit,
                    max_tokens=self.max_tokens if takes_max_tokens else openai.omit,
                    max_completion_tokens=openai.omit if takes_max_tokens else self.max_tokens,
                    temperature=openai.omit if self.temperature is None else self.temperature,
                )
        except (TimeoutError, openai.APITimeoutError):
            raise _Again(f"no answer within {self.connection.timeout_seconds:g} s") from None
        except openai.APIStatusError as error:
            if self._gives_in(error, takes_max_tokens, takes_seed):
                return await self._try(answer, prompt, seed)
            raise self._judge(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise _Again(f"connection: {type(cause).__name__}: {cause}") from None
        except (openai.APIError, ValueError) as error:
            raise _Again(f"no chat completion: {type(error).__name__}: {error}") from None
        if used := _count(answer, found):
            self._hold_back(self._seconds(tokens=max(0, used - expected)))
        _read(answer, found)

    def _seconds(self, *, tokens: int, requests: int = 0) -> float:
        """How long the limits have the next request wait for these."""
        its = self.connection
        for_requests = 60 * requests / its.requests_per_minute if its.requests_per_minute else 0.0
        return max(for_requests, 60 * tokens / its.tokens_per_minute if its.tokens_per_minute else 0.0)

    def _hold_back(self, seconds: float) -> None:
        """Moves the time when the next request may go out."""
        self._free_at = max(self._free_at, time.monotonic()) + seconds

    def _gives_in(self, error: Any, sent_max_tokens: bool, sent_seed: bool) -> bool:
        """Whether an endpoint that refuses a field is asked without it from now on."""
        if error.status_code not in (400, 422):
            return False
        if sent_max_tokens and "max_completion_tokens" in error.message:
            self._takes_max_tokens = False
            return True
        if sent_seed and re.search(r"\bseed\b", error.message):
            logging.log_every_n_seconds(logging.WARNING, "%s takes no seed: asked without", 3600, self.url)
            self._takes_seed = False
            return True
        return False

    def _judge(self, error: Any) -> Exception:
        """What an HTTP status means: try again, give up on this request, or on all."""
        status, told = error.status_code, f"HTTP {error.status_code}: {_line(error.message)}"
        # Some endpoints refuse a single prompt with 403, others an account: then none has been answered.
        if status in (401, 404) or (status == 403 and not self.has_answered) or error.code == "insufficient_quota":
            remedy = {401: "check OPENAI_API_KEY", 404: f"check the address and the model's name, {self.model!r}"}
            return EndpointError(f"{self.url} refuses: {told}; {remedy.get(status, 'check the account')}")
        if status not in (408, 409, 429) and status < 500:
            return _Useless(told)
        wait = _retry_after_seconds(error.response.headers)
        if wait > _LONGEST_WAIT_SECONDS:
            return EndpointError(f"{self.url} asks to wait {wait:.0f} s ({told}); the same command goes on then")
        if wait > 0:
            logging.log_every_n_seconds(logging.WARNING, "%s asks to wait %.0f s", 30, self.url, wait)
            self._free_at = max(self._free_at, time.monotonic() + wait)
        return _Again(told)


def _count(answer: Answer, found: Any) -> int:
    """Adds the tokens that a reply says it took; returns them."""
    usage = getattr(found, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) else 0 for count in counts)
    answer.unmetered += not (prompt or completion)
    answer.prompt_tokens += prompt
    answer.completion_tokens += completion
    return prompt + completion


def _read(answer: Answer, found: Any) -> None:
    """Takes the text of a reply; the client does not look whether it has the shape it should have."""
    choices = getattr(found, "choices", None)
    if not isinstance(choices, list):
        raise _Again(f"no chat completion: {str(found)[:80]!r}")
    if not choices:
        raise _Again("a reply without a choice")
    text = getattr(getattr(choices[0], "message", None), "content", None)
    reason = getattr(choices[0], "finish_reason", None)
    if reason == "content_filter":
        raise _Useless("the endpoint's content filter")
    if not isinstance(text, str) or not text.strip():
        if reason == "length":
            raise _Useless("all tokens went into thoughts: raise max_tokens")
        raise _Again("a reply without text")
    model = getattr(found, "model", None)
    answer.text, answer.is_cut = encodable(text), reason == "length"
    answer.model = encodable(model) if isinstance(model, str) else None


def _line(told: object) -> str:
    """One line that is not too long; servers answer with whole pages."""
    return encodable(" ".join(str(told).split())[:_LONGEST_ERROR])


def _retry_after_seconds(headers: Any) -> float:
    """What a Retry-After header asks for, in seconds or as a date; 0 without one."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if math.isfinite(seconds) else 0.0

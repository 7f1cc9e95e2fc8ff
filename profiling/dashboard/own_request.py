"""A visitor's or a program's own request on its way through the batch that everybody shares."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Hashable, Iterator

from flora.engine import Completion, Engine, FailEvent, FinishEvent, Request, TokenEvent
from flora.engine.request import Event

UPDATE_S = 0.25  # how often whoever asked is told what has come
DEADLINE_S = 60.0  # a request that is not done by then fails by name
SAMPLE_S = 0.03  # how often it is looked how many others run
MAX_AT_ONCE = 32  # requests of visitors' own; and as many of programs


class OwnRequest:
    """A request in line for the engine's batch or in it: `text` so far, and once it is done its `completion`.

    It is submitted when this is made, which raises the FloraError that says why it cannot be served. session: whose it is.
    """

    def __init__(self, engine: Engine, request: Request, method: str, session: Hashable) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._others: list[int] = []
        self._sampled_s = 0.0
        self.text, self.num_new_tokens = "", 0
        self.completion: Completion | None = None
        self._ticket = engine.submit(request, method, session=session, deadline_s=DEADLINE_S, listener=self._events.put)

    @property
    def others(self) -> tuple[float, int] | None:
        """How many other requests ran in the engine while this one did: on average, and at most. None before its first token."""
        return (sum(self._others) / len(self._others), max(self._others)) if self._others else None

    def updates(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[OwnRequest]:
        """Yield itself a few times a second, the last time with its completion; raise the FloraError it failed by.

        should_stop: asked at every update; the request then ends as "cancelled", with the tokens it has. To leave before the end
        cancels it, too.
        """
        try:
            while self.completion is None:
                if should_stop():
                    self._ticket.cancel()
                self._take(UPDATE_S)
                yield self
        finally:
            if self.completion is None:
                self._ticket.cancel()

    def _take(self, seconds: float) -> None:
        """What happens in the next seconds; returns earlier when it is done."""
        newest: TokenEvent | None = None
        until = time.monotonic() + seconds
        while self.completion is None:
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if isinstance(event, FailEvent):
                raise event.error
            if isinstance(event, FinishEvent):
                self.completion = event.completion
                self.text, self.num_new_tokens = self.completion.text, len(self.completion.token_ids)
                return
            newest = event
            self._sample()
        if newest is not None:  # decoded once, however many tokens came
            self.text, self.num_new_tokens = newest.text, newest.num_new_tokens

    def _sample(self) -> None:
        now = time.monotonic()
        if self._others and now - self._sampled_s < SAMPLE_S:
            return
        running = self._engine.snapshot().running
        if self._ticket.state == "running":
            self._others.append(max(0, running - 1))
            self._sampled_s = now
        elif not self._others:  # it was done before it could be looked: those that still run ran beside it
            self._others.append(running)

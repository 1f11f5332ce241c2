"""`Worker`: the one thread that owns the engine. Requests come in and tokens go out through queues; nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

from ..batch.row import Emitted
from ..compat import free_threads
from ..costmodel import Prices
from ..engine.steady import SteadyEngine
from ..errors import GlideCapeError, InputError, first_line
from .errors import ApiError
from .job import Job, Update
from .metrics import Metrics
from .shadow import Shadow

LOG = logging.getLogger("glidecape.serve")
NAP = 0.5  # seconds after which an idle worker looks at its deadlines


class Worker(threading.Thread):
    """Runs the engine for all requests.

    Args:
        engine: nobody else may touch it after `start`.
        room: answers that may be waiting or running together.
        shadow: what is decoded again when there is nothing else to do.

    Attributes:
        prices: what rounds cost, greedily and sampled; none where the server does not know.
    """

    def __init__(self, engine: SteadyEngine, room: int, metrics: Metrics, shadow: Shadow) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine, self.room, self.metrics, self.shadow = engine, room, metrics, shadow
        self.prices: Sequence[Prices] = getattr(engine.drafter, "prices", ())
        self.inbox: queue.SimpleQueue[tuple[str, Sequence[Job]]] = queue.SimpleQueue()
        self.jobs: dict[int, Job] = {}  # by the number of their row
        self._open, self._lock = 0, threading.Lock()
        self._stopping = False
        self._paces: list[float] = []  # seconds of the last answers, for Retry-After
        self._counted = [0, 0]  # draft failures and out of memory that the metrics know

    def start(self) -> None:
        free_threads()
        super().start()

    # --- called by requests, on any thread

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of a request's jobs, or none.

        Raises:
            ApiError: there is no room, or the server is ending.
        """
        with self._lock:
            self._check_room(len(jobs))
            self._open += len(jobs)
        self.inbox.put(("submit", jobs))

    def check_count(self, count: int) -> None:
        """Refuse more answers than there is ever room for.

        Raises:
            ApiError: they are.
        """
        if count > self.room:
            raise ApiError(400, f"{count} answers were asked for, and this server holds {self.room} at most", "n")

    def _check_room(self, count: int) -> None:
        if self._stopping or not self.is_alive():
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        self.check_count(count)
        if self._open + count > self.room:
            wait = self._retry_after()
            raise ApiError(
                429,
                f"{self._open} answers are being made or waiting, and this server holds {self.room}: try again in "
                f"{wait} seconds",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )

    def abort(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: their rows are free before the next round."""
        self.inbox.put(("abort", jobs))

    def stop(self) -> None:
        """End after the jobs that there are."""
        self._stopping = True
        self.inbox.put(("stop", ()))

    def _retry_after(self) -> int:
        """Seconds after which a place will be free, by the last answers."""
        usual = sum(self._paces) / len(self._paces) if self._paces else 1.0
        return max(1, min(60, round(usual * self._open / max(1, self.engine.slots) / 2)))

    # --- the engine thread

    def run(self) -> None:
        while not (self._stopping and not self.jobs):
            self._take()
            try:
                self._expire()
                self._feed_shadow()
                self.engine.pace.last = None
                self._deliver(self.engine.step() if not self.engine.idle else [])
            except Exception as error:
                LOG.exception("the engine failed")
                self._fail_all(error)

    def _take(self) -> None:
        """Take what came in; wait for something where there is nothing to do."""
        idle = self.engine.idle and not self.shadow.wants_to_run
        try:
            item = self.inbox.get(timeout=NAP) if idle else self.inbox.get_nowait()
            while True:
                self._do(*item)
                item = self.inbox.get_nowait()
        except queue.Empty:
            pass

    def _do(self, what: str, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if what == "submit":
                self._stop_shadow()
                self.jobs[job.row.index] = job
                try:
                    self.engine.submit(job.row)
                except GlideCapeError as error:
                    self._close(job, ApiError(400, str(error)))
            elif job.row.index in self.jobs:
                self.engine.abort(job.row)
                self._close(job)

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [one for one in self.jobs.values() if one.deadline <= now]:
            self.engine.abort(job.row)
            waited = now - job.arrived
            self._close(job, ApiError(408, f"the request was given up after {waited:.1f} seconds", code="timeout"))

    def _deliver(self, events: list[Emitted]) -> None:
        now = time.monotonic()
        self._count_time(events)
        updates: list[Update] = []
        for event in events:
            job = self.jobs.get(event.row)
            if job is None:
                self._check_shadow(event)
                continue
            self._count(job, event, now)
            updates.append((job, event))
            if event.finish is not None:
                self._close(job)
        for row, error in self.engine.failed:
            if row.index in self.jobs:
                self._close(self.jobs[row.index], self._told(error))
            else:
                self.shadow.drop()
        self.engine.failed.clear()
        self._send(updates)
        self._show_state()

    def _count(self, job: Job, event: Emitted, now: float) -> None:
        stats, metrics = event.stats, self.metrics
        metrics.count_round(stats)
        job.drafted, job.accepted = job.drafted + stats.drafted, job.accepted + stats.accepted
        job.rounds += 1
        if event.tokens:
            if job.first is None:
                job.first = now
                metrics.first_token.observe(now - job.arrived)
            else:
                metrics.between.observe((now - job.last) / len(event.tokens))
            job.last = now

    def _count_time(self, events: list[Emitted]) -> None:
        """Count what drafts won or lost in a round in which all rows could have some, and no prompt was read."""
        jobs = [self.jobs.get(event.row) for event in events]
        known = [job.row for job in jobs if job is not None and job.row.drafts]
        seconds, emitted = self.engine.pace.last, sum(len(event.tokens) for event in events)
        if not self.prices or seconds is None or len(known) < len(jobs) or not any(one.stats.drafted for one in events):
            return
        prices = self.prices[0 if all(row.params.greedy for row in known) else 1]
        # Plain rounds that emit as many tokens, all rows together, less what this one took.
        won = prices.plain(len(known), max(len(row.tokens) for row in known)) * emitted / len(known) - seconds
        (self.metrics.time_won if won > 0 else self.metrics.time_lost).inc(abs(won))
        for job in jobs:
            if job is not None:
                job.won += won / len(known)

    def _told(self, error: Exception) -> ApiError:
        """What a client hears of an error: ours in full, of others nothing but the kind."""
        if isinstance(error, GlideCapeError):
            return ApiError(400 if isinstance(error, InputError) else 500, str(error))
        if "memory" in first_line(error):
            return ApiError(503, "the device has not enough memory for this request", code="out_of_memory")
        LOG.error("an answer failed", exc_info=error)
        return ApiError(500, f"decoding failed ({type(error).__name__})", code="decoding_failed")

    def _close(self, job: Job, error: ApiError | None = None) -> None:
        """A job has ended: with its last tokens, an error, or because its client went."""
        del self.jobs[job.row.index]
        with self._lock:
            self._open -= 1
        if error is not None:
            job.row.finish = "error"
            self._send([(job, error)])
        metrics = self.metrics
        metrics.ended(job.row.finish).inc()
        metrics.prompt_tokens.inc(job.row.prompt_length)
        if job.row.salt is not None and job.rounds:
            metrics.prefix_queries.inc(job.row.prompt_length)
            metrics.prefix_hits.inc(job.row.reused)
        if job.row.finish in ("stop", "length"):
            metrics.whole.observe(time.monotonic() - job.arrived)
            metrics.prompt_length.observe(job.row.prompt_length)
            metrics.answer_length.observe(job.row.emitted)
            self._paces = [*self._paces[-15:], time.monotonic() - job.arrived]
            self.shadow.consider(job)
        LOG.info("answer ended", extra={"facts": job.facts() | ({"error": error.message} if error else {})})

    def _send(self, updates: list[Update]) -> None:
        """Put updates into their requests' queues, on the event loop's own thread."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Update]] = defaultdict(list)
        for update in updates:
            by_loop[update[0].loop].append(update)
        for loop, own in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everybody who listened
                loop.call_soon_threadsafe(_hand_out, own)

    def _show_state(self) -> None:
        engine, metrics = self.engine, self.metrics
        slots = engine.batch.slots
        metrics.running.set(len(slots))
        metrics.waiting.set(len(engine.waiting))
        metrics.cache_usage.set(sum(len(row.tokens) for row in slots) / (engine.slots * engine.tokens))
        metrics.width.set(engine.width)
        for k, (metric, value) in enumerate(
            ((metrics.draft_failures, engine.draft_failures), (metrics.out_of_memory, engine.out_of_memory))
        ):
            metric.inc(value - self._counted[k])
            self._counted[k] = value

    def _fail_all(self, error: Exception) -> None:
        """An error that is no row's: all answers end with it, and the engine begins anew."""
        self.engine.restart()
        self.shadow.drop()
        for job in list(self.jobs.values()):
            self._close(job, self._told(error))

    # --- the shadow check

    def _feed_shadow(self) -> None:
        if self.engine.idle and not self.jobs and (row := self.shadow.next_row()) is not None:
            self.engine.submit(row)

    def _check_shadow(self, event: Emitted) -> None:
        try:
            self.shadow.push(event)
        except Exception:
            LOG.exception("the shadow check failed")
            self.shadow.drop()

    def _stop_shadow(self) -> None:
        """A request has come: what is decoded again has time."""
        if (row := self.shadow.postpone()) is not None:
            self.engine.abort(row)


def _hand_out(updates: list[Update]) -> None:
    for job, item in updates:
        job.updates.put_nowait((job, item))

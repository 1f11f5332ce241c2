"""The server's metrics for Prometheus: vLLM's names, so that its dashboards fit, under the prefix `glidecape:`."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..core.stats import RoundStats

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
LABEL = "model_name"


class Metrics:
    """All metrics of one server, in a registry of their own; any thread may count."""

    def __init__(self, model: str) -> None:
        self.registry, self._model = CollectorRegistry(), model
        self.running = self._one(Gauge, "num_requests_running", "Answers that are being decoded.")
        self.waiting = self._one(Gauge, "num_requests_waiting", "Answers that wait for a free slot.")
        self.cache_usage = self._one(
            Gauge, "kv_cache_usage_perc", "Share of the row slots' tokens in use, from 0 to 1."
        )
        self.width = self._one(
            Gauge, "rows_per_forward_limit", "Rows that may share a forward; fewer after out of memory."
        )
        self.prompt_tokens = self._one(Counter, "prompt_tokens", "Tokens of the prompts of ended requests.")
        self.prefix_queries = self._one(
            Counter, "prefix_cache_queries", "Tokens of the prompts for which a prefix was looked up."
        )
        self.prefix_hits = self._one(Counter, "prefix_cache_hits", "Tokens that were found, and not read again.")
        self.generation_tokens = self._one(Counter, "generation_tokens", "Tokens emitted.")
        self.ended = self._many(Counter, "request_success", "Answers that ended, by how.", "finished_reason")
        self.rejected = self._many(Counter, "requests_rejected", "Requests that were not taken, by status.", "status")
        self.first_token = self._one(Histogram, "time_to_first_token_seconds", "From arrival to first token.", LONG)
        self.between = self._one(Histogram, "inter_token_latency_seconds", "A round's time over its tokens.", SHORT)
        self.whole = self._one(Histogram, "e2e_request_latency_seconds", "From arrival to last token.", LONG)
        self.prompt_length = self._one(Histogram, "request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.answer_length = self._one(Histogram, "request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.drafts = self._one(Counter, "spec_decode_num_drafts", "Proposals verified.")
        self.drafted = self._one(Counter, "spec_decode_num_draft_tokens", "Tokens drafted.")
        self.accepted = self._one(Counter, "spec_decode_num_accepted_tokens", "Drafted tokens accepted.")
        self.accepted_at = self._many(
            Counter, "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by depth.", "position"
        )
        self.skipped = self._one(Counter, "spec_decode_num_skipped_drafts", "Rounds of a row without a proposal.")
        self.time_won = self._one(Counter, "draft_time_won_seconds", "Seconds that drafts won against plain decoding.")
        self.time_lost = self._one(Counter, "draft_time_lost_seconds", "Seconds that drafts lost against it.")
        self.draft_failures = self._one(Counter, "draft_failures", "Answers that go on without drafts after an error.")
        self.out_of_memory = self._one(Counter, "out_of_memory", "Forwards for which the device had not enough memory.")
        self.shadow = self._many(
            Counter, "shadow_requests", "Answers decoded again without drafts, by what came of it.", "result"
        )

    def _one(self, kind: Any, name: str, text: str, buckets: tuple[float, ...] | None = None) -> Any:
        options = {} if buckets is None else {"buckets": buckets}
        return kind(f"glidecape:{name}", text, [LABEL], registry=self.registry, **options).labels(self._model)

    def _many(self, kind: Any, name: str, text: str, label: str) -> Any:
        """A function from the label's value to the metric."""
        made = kind(f"glidecape:{name}", text, [LABEL, label], registry=self.registry)
        return lambda value: made.labels(self._model, str(value))

    def count_round(self, stats: RoundStats) -> None:
        """What one row got from a round."""
        self.generation_tokens.inc(stats.emitted)
        if stats.drafted:
            self.drafts.inc()
            self.drafted.inc(stats.drafted)
            self.accepted.inc(stats.accepted)
            for position in range(stats.accepted):
                self.accepted_at(position).inc()
        else:
            self.skipped.inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)

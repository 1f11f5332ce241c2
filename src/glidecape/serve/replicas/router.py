"""`PrefixRouter`: which replica a request goes to, as Ray Serve asks it. This module needs Ray."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter


class PrefixRouter(ConsistentHashRouter):
    """Sends a request to the replica that its key leads to, or to another one that has whole batches less to do.

    Ray's router, which this one extends, takes another replica only when the first one accepts no more requests. Here a replica
    whose rows are taken is passed over while another one has a free row, because waiting takes longer than reading a prompt.

    Attributes:
        rows: requests that a replica decodes together.
        open: requests that a replica has, by its id. Ray's own count lags behind, and is forgotten after ten seconds.
    """

    rows = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.open: Counter[Any] = Counter()

    def initialize_state(self, **kwargs: Any) -> None:
        """`rows`, and what Ray's router takes."""
        self.rows = kwargs.pop("rows")
        super().initialize_state(**kwargs)

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """Ranks of replicas, the first choice first."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        return sorted(ranks, key=lambda rank: min(self.open[one.replica_id] // self.rows for one in rank))

    def on_send_request(self, replica_id: Any) -> None:
        super().on_send_request(replica_id)
        self.open[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self.open[replica_id] -= 1
        if not self.open[replica_id]:
            del self.open[replica_id]  # it may never come back

"""The metrics of all replicas as one page for Prometheus, with a label that says whose each value is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Gathered(Collector):
    """Metrics that were read from pages."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {}

    def add(self, replica: str, page: str) -> None:
        for family in text_string_to_metric_families(page):
            own = self.families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own.samples.append(sample._replace(labels=sample.labels | {"replica": replica}))

    def collect(self) -> Iterable[Metric]:
        return self.families.values()


def gathered(pages: Mapping[str, str]) -> bytes:
    """One page in Prometheus' format.

    Args:
        pages: what each replica says, by its name.
    """
    collector = _Gathered()
    for replica, page in sorted(pages.items()):
        collector.add(replica, page)
    return generate_latest(collector)

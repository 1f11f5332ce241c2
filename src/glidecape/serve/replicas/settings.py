"""`ReplicaSettings`: how many replicas, and on which Ray cluster; and how many cores each of them gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError
from ...options import option


@dataclass(frozen=True)
class ReplicaSettings:
    """Where replicas run.

    Raises:
        InputError: an option that needs `ray` without it.
    """

    ray: bool = option(False, "Serve by Ray Serve, with as many copies of the model as --replicas says.")
    replicas: int = option(1, "With --ray: copies of the model.")
    ray_address: str | None = option(
        None, "With --ray: the Ray cluster to join, auto: the one that runs on this machine; default: start Ray here."
    )

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise InputError(f"--replicas must be at least 1, not {self.replicas}")
        for given, name in ((self.replicas > 1, "--replicas"), (self.ray_address is not None, "--ray-address")):
            if given and not self.ray:
                raise InputError(f"{name} has no effect without --ray: add --ray, or leave {name} out")


def threads_each(cores: Sequence[float], replicas: int, asked: int = 0) -> int:
    """CPU threads of a replica.

    Args:
        cores: of each machine.
        asked: threads that the user wants; 0: as many as fit.

    Raises:
        InputError: the replicas do not fit.

    >>> threads_each([8, 8], 2), threads_each([8, 8], 3), threads_each([2], 2)
    (8, 4, 1)
    """
    most = asked or max(1, int(max(cores, default=0)))
    for threads in range(most, (asked or 1) - 1, -1):
        if sum(int(one // threads) for one in cores) >= replicas:
            return threads
    there = ", ".join(f"{one:g}" for one in cores)
    raise InputError(
        f"{replicas} replicas of {asked or 1} threads do not fit on machines of {there} cores: lower --replicas or --threads"
    )


def check_gpus(there: float, replicas: int) -> None:
    """Each replica takes a GPU for itself.

    Raises:
        InputError: there are too few.
    """
    if there < replicas:
        raise InputError(f"{replicas} replicas need a GPU each, and Ray sees {there:g}: lower --replicas")

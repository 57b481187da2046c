"""The watchdogs of several nodes, through the job's rendezvous store: reports to node 0, its verdict to the others.

Every call to the store is made in a thread of its own: a store that cannot be reached answers late or not at all, and
the watchdog has to go on watching its own node meanwhile.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from megatron_smartmoe.runtime.progress import GroupProgress, Pass, Phase, RankProgress
from megatron_smartmoe.runtime.watchdog.verdict import RankReport

_PERIOD_S = 1.0
_TIMEOUT_S = 5.0  # of one call to the store


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the job's rendezvous store listens."""

    host: str
    port: int


class Nodes:
    """What this node and the others know of each other.

    Args:
        address: of the store.
        node: number of this node.
        num_nodes: of the job.
    """

    def __init__(self, address: Address, *, node: int, num_nodes: int) -> None:
        self.node, self.num_nodes = node, num_nodes
        self._address = address
        self._own: list[RankReport] = []
        self._received: dict[int, tuple[int, float, list[RankReport]]] = {}  # node -> (number, when, reports)
        self._named: tuple[int, int] | None = None  # (episode, rank) in node 0's verdict
        self._last_contact = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="smartmoe-watchdog-nodes", daemon=True)

    def start(self) -> None:
        """Begin to send and to receive."""
        self._thread.start()

    def stop(self) -> None:
        """End it; a call that the store never answers is left to the end of the process."""
        self._end.set()
        self._thread.join(timeout=_TIMEOUT_S + _PERIOD_S)

    def publish(self, reports: Sequence[RankReport]) -> None:
        """Have these reports of the own ranks sent."""
        self._own = list(reports)

    def name(self, episode: int, rank: int) -> None:
        """On node 0: tell the node of this rank to write the rank's stacks."""
        self._named = (episode, rank)

    @property
    def named(self) -> tuple[int, int] | None:
        """(number, rank) of the last verdict of node 0."""
        return self._named

    @property
    def is_cut_off(self) -> bool:
        """Whether the store has not answered for so long that this node should speak for itself."""
        return self.without_contact_s > 2 * _TIMEOUT_S

    @property
    def without_contact_s(self) -> float:
        """Time since the store has answered."""
        return time.monotonic() - self._last_contact

    @property
    def num_unheard(self) -> int:
        """On node 0: other nodes that have never sent a report."""
        return self.num_nodes - 1 - len(self._received)

    def others(self) -> list[RankReport]:
        """On node 0: the reports of the other nodes, as old as they are."""
        now = time.monotonic()
        return [
            aged(report, now - received) for _, received, reports in list(self._received.values()) for report in reports
        ]

    def _exchange(self) -> None:
        store: Any = None
        for number in range(1, 2**62):
            try:
                store = store or self._connect()
                self._send(store, number)
                self._receive(store)
                self._last_contact = time.monotonic()
            except (RuntimeError, OSError, ValueError):  # not reachable, or what it holds is not ours: tried again
                store = None
            if self._end.wait(_PERIOD_S):
                return

    def _connect(self) -> Any:
        import torch.distributed as dist

        return dist.TCPStore(
            self._address.host,
            self._address.port,
            is_master=False,
            timeout=timedelta(seconds=_TIMEOUT_S),
            wait_for_workers=False,
        )

    def _send(self, store: Any, number: int) -> None:
        if self.node == 0:
            store.set(_key("named"), json.dumps(self._named))
        else:
            store.set(_key(self.node), json.dumps([number, [report_to_json(report) for report in self._own]]))

    def _receive(self, store: Any) -> None:
        if self.node:
            if store.check([_key("named")]):
                named = json.loads(store.get(_key("named")))
                self._named = (int(named[0]), int(named[1])) if named is not None else None
            return
        for node in range(1, self.num_nodes):
            if not store.check([_key(node)]):
                continue
            number, reports = json.loads(store.get(_key(node)))
            if self._received.get(node, (0,))[0] != number:
                self._received[node] = (number, time.monotonic(), [report_from_json(item) for item in reports])


def _key(name: object) -> str:
    return f"smartmoe/watchdog/{name}"


def aged(report: RankReport, seconds: float) -> RankReport:
    """A report as it would be now if nothing had happened since it was sent."""
    progress = replace(
        report.progress, phase_s=report.progress.phase_s + seconds, still_s=report.progress.still_s + seconds
    )
    return replace(report, progress=progress, silent_s=seconds)


def report_to_json(report: RankReport) -> dict[str, Any]:
    """As plain data."""
    content = asdict(report)
    content["progress"]["groups"] = list(content["progress"]["groups"].values())
    return content


def report_from_json(content: dict[str, Any]) -> RankReport:
    """From plain data.

    Raises:
        ValueError: it is no report.
    """
    try:
        fields = dict(content["progress"])
        groups = [GroupProgress(**group) for group in fields.pop("groups")]
        fields |= {"phase": Phase(fields["phase"]), "direction": Pass(fields["direction"])}
        progress = RankProgress(**fields, groups={group.key: group for group in groups})
        return RankReport(**{**content, "progress": progress})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a report of a watchdog: {error}") from None

"""A plain simulator of misses on a host and from storage: lists and dictionaries, written for the reader.

It knows nothing of the compiled one, and has no predictions. What it does without them is in `docs/guide/offload.md`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

Pair = tuple[int, int]


@dataclass(frozen=True)
class Times:
    """Seconds: a copy, an expert on the GPU, the rest of a layer, an expert on the host, its latency, a read from storage."""

    copy: float
    expert: float
    layer: float
    host: float
    latency: float
    read: float


@dataclass
class PlainMachine:
    """A GPU with a cache, a host, and storage.

    rule: `lru`, `lfu`, `fifo` or `popularity`. miss: `copy`, `host` or `cheapest`. ram: how many experts host memory holds;
    None: all. popularity: most popular highest.
    """

    rule: str
    capacity: int
    is_global: bool
    miss: str
    ram: int | None
    times: Times
    popularity: dict[Pair, int]
    now: float = 0.0
    link: float = 0.0
    disk: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        order = sorted(self.popularity, key=lambda pair: -self.popularity[pair])
        self.held: dict[int, list[Pair]] = {}
        for pair in order:
            pool = self.held.setdefault(self.pool(pair), [])
            if len(pool) < self.capacity:
                pool.append(pair)
        ranks = {pair: rank for pool in self.held.values() for rank, pair in enumerate(pool)}
        # (request, place in it, negated); before the first request, the most popular were used last.
        self.used: dict[Pair, tuple[float, float]] = {pair: (-1.0, -float(rank)) for pair, rank in ranks.items()}
        self.loaded = dict(self.used)
        self.uses: Counter[Pair] = Counter()
        self.arrives: dict[Pair, float] = {}
        self.fills: list[tuple[Pair, float, int]] = []
        on_gpu = set(ranks)
        colder = [pair for pair in order if pair not in on_gpu] + [pair for pair in order if pair in on_gpu]
        # Least recently used first.
        self.memory = list(reversed(colder[: self.ram])) if self.ram is not None else []
        self.read_at: dict[Pair, float] = {}

    def pool(self, pair: Pair) -> int:
        return 0 if self.is_global else pair[0]

    def on_gpu(self, pair: Pair) -> bool:
        return pair in self.held.get(self.pool(pair), [])

    def worth(self, pair: Pair) -> tuple[float, ...]:
        last = self.used.get(pair, (-2.0, 0.0))
        return {
            "lru": last,
            "lfu": (float(self.uses[pair]), *last),
            "fifo": (*self.loaded.get(pair, (-2.0, 0.0)), *last),
            "popularity": (float(self.popularity[pair]),),
        }[self.rule]

    def victim(self, pair: Pair, needed: list[Pair]) -> Pair | None:
        possible = [other for other in self.held[self.pool(pair)] if other not in needed]
        return min(possible, key=self.worth, default=None)

    def room_for(self, pair: Pair, needed: list[Pair]) -> bool:
        """Make room on the GPU for an expert that must come."""
        pool = self.held.setdefault(self.pool(pair), [])
        if len(pool) >= self.capacity:
            out = self.victim(pair, needed) if pool else None
            if out is None:
                return False
            pool.remove(out)
        pool.append(pair)
        return True

    def run(self, steps: list[list[list[int]]]) -> Counter[str]:
        layers = len(steps[0])
        request, computed = 0, 0.0
        for step in steps:
            for layer, chosen in enumerate(step):
                pairs = [(layer, expert) for expert in chosen]
                self.now += self.times.layer
                self.fill(request, computed, [], request)
                ends = self.serve(pairs, request, layers)
                self.now = computed = ends
                self.fill(request, 0.0, pairs, request + 1)
                request += 1
        self.counts["requested"] = sum(len(chosen) for step in steps for chosen in step)
        return self.counts

    def serve(self, pairs: list[Pair], request: int, layers: int) -> float:
        """Compute the experts of a layer; return when all are done."""
        now, times = self.now, self.times
        late = [pair for pair in pairs if self.on_gpu(pair) and self.arrives.get(pair, 0.0) > now]
        missed = [pair for pair in pairs if not self.on_gpu(pair)]
        self.counts["late"] += len(late)
        self.counts["miss"] += len(missed)
        self.fills = [fill for fill in self.fills if fill[0] not in missed]
        host_free, gpu_ready = now + times.latency, now
        on_host: list[Pair] = []
        # Those last that need a read, which takes longest.
        in_memory = [pair for pair in missed if self.in_memory(pair)]
        for pair in late + in_memory + [pair for pair in missed if pair not in in_memory]:
            if pair in late:
                ready, there = now, self.arrives[pair]
            else:
                ready = self.fetch(pair)
                there = max(ready, self.link) + times.copy
            on_host_at = max(host_free, ready) + times.host
            is_faster = on_host_at <= there + times.expert
            if self.miss != "copy" and (is_faster or (self.miss == "host" and pair in missed)):
                host_free = on_host_at
                on_host.append(pair)
            else:
                gpu_ready = max(gpu_ready, there)
                if pair in missed:
                    self.link = there
                    self.counts["loads"] += 1
                    if self.room_for(pair, pairs):
                        self.loaded[pair] = (float(request), -float(pairs.index(pair)))
                        self.arrives[pair] = there
                    else:
                        self.counts["streamed"] += 1
        self.counts["host"] += len(on_host)
        for place, pair in enumerate(pairs):
            self.used[pair] = (float(request), -float(place))
            self.uses[pair] += 1
        known = {pair: max(now, self.read_at.get(pair, 0.0)) for pair in missed}
        self.fills += [(pair, known[pair], request + layers) for pair in pairs if pair in on_host and pair in missed]
        on_gpu = len(pairs) - len(on_host)
        return max(gpu_ready + on_gpu * times.expert, host_free if on_host else now)

    def in_memory(self, pair: Pair) -> bool:
        return self.ram is None or pair in self.memory

    def fetch(self, pair: Pair) -> float:
        """When host memory has an expert."""
        if self.ram is None:
            return self.now
        if pair in self.memory:
            self.memory.remove(pair)
            self.memory.append(pair)
            return max(self.now, self.read_at.get(pair, 0.0))
        self.counts["read"] += 1
        self.disk = max(self.disk, self.now) + self.times.read
        self.read_at[pair] = self.disk
        if self.ram:
            self.memory.pop(0)
            self.memory.append(pair)
        return self.disk

    def fill(self, request: int, since: float, needed: list[Pair], soon: int) -> None:
        """Copy experts that the host computed in the background, as far as the interconnect is free until now."""
        while self.fills and self.link <= self.now:
            pair, known, until = self.fills[0]
            begin = max(self.link, known, since)
            if begin > self.now:
                return
            is_full = len(self.held.setdefault(self.pool(pair), [])) >= self.capacity
            out = self.victim(pair, needed) if is_full else None
            if until >= soon and is_full and out is None and needed:
                # It waits for the experts in use.
                return
            self.fills.pop(0)
            # What is loaded last is worth most to `fifo`.
            is_worse = out is not None and self.rule != "fifo" and self.worth(pair) <= self.worth(out)
            if until < soon or not self.in_memory(pair) or (is_full and out is None) or is_worse:
                continue
            if out is not None:
                self.held[self.pool(pair)].remove(out)
            if self.ram is not None:
                self.memory.remove(pair)
                self.memory.append(pair)
            self.held[self.pool(pair)].append(pair)
            self.link = begin + self.times.copy
            self.arrives[pair] = self.link
            self.loaded[pair] = (soon - 0.5, 0.0)
            self.counts["loads"] += 1
            self.counts["filled"] += 1

"""The rows of the table: what each of them runs, and what it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ACCELERATE, PLAIN, RESIDENT, ON_DEMAND = "accelerate", "plain transformers", "everything cached", "on demand"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. kind: `ACCELERATE`, `PLAIN`, or our runtime with the other fields. tokens: new tokens per prompt."""

    name: str
    kind: str = "runtime"
    fraction: float = 0.0
    policy: str = "lru"
    predictor: str | None = None
    threshold: float = 0.0
    prefetch: int | None = None
    device: str = "cpu"
    direct: bool = True
    tokens: int
    trace: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a row measured. seconds: of generated tokens."""

    tokens: int
    seconds: float
    hit_rate: float | None
    megabytes_per_token: float | None
    stall: float | None
    memory_gb: float
    copy_seconds: float
    expert_seconds: float
    layer_seconds: float
    output: list[list[int]]
    notes: list[str]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def cases(tokens: int, prefetcher: Path | None, reuse: Path | None, trace: str) -> list[Case]:
    """All rows, the fastest last; those of trained predictors only if there are any."""
    rows = [
        Case(name=ON_DEMAND, tokens=tokens, trace=trace),
    ]
    for fraction in (0.25, 0.5):
        rows.append(Case(name=f"{fraction:.0%} {ACCELERATE}", kind=ACCELERATE, fraction=fraction, tokens=max(2, tokens // 4)))
        kinds: list[tuple[str, str, str | None]] = [
            ("lru", "lru", None),
            ("lru + next-gate", "lru", "next-gate"),
            ("ewma", "ewma", None),
        ]
        if prefetcher is not None and reuse is not None:
            kinds += [
                ("lru + predictor", "lru", str(prefetcher)),
                ("ewma + predictor", "ewma", str(prefetcher)),
                ("learned", str(reuse), None),
                ("learned + predictor", str(reuse), str(prefetcher)),
            ]
        rows += [
            Case(name=f"{fraction:.0%} {name}", fraction=fraction, policy=policy, predictor=predictor, tokens=tokens)
            for name, policy, predictor in kinds
        ]
        rows.append(Case(name=f"{fraction:.0%} lru, page cache", fraction=fraction, direct=False, tokens=tokens))
    rows.append(Case(name=PLAIN, kind=PLAIN, tokens=tokens))
    rows.append(Case(name=RESIDENT, fraction=1.0, tokens=tokens))
    return rows

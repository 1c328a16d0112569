"""The documents of `specmoe analyze`: `statistics.json` of one trace, and of the comparison of several traces.

Shapes are written as in the rest of the project: L MoE layers, E experts, K experts per token. A number that is undefined, such
as the entropy of a layer without tokens, is None.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from analysis.documents.reading import read_document
from profiler.trace.schema import ModelMetadata

STATISTICS_FILE = "statistics.json"

Number = float | None
Values = list[Number]
"""Mostly one number per layer, `[L]`."""
Table = list[Values]
"""Mostly one row per layer, such as `[L][E]`."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LoadRecord(_Record):
    """Expert load of a dataset and phase, or of `all`. share_LE, mass_share_LE `[L][E]`; the rest `[L]`."""

    dataset: str
    phase: str
    tokens: int
    share_LE: Table
    mass_share_LE: Table | None
    entropy_bits: Values
    entropy_share: Values
    max_over_mean: Values
    gini: Values
    cv: Values
    coverage: Values


class TransitionRecord(_Record):
    """Prediction of the experts at layer n+hop from those at layer n, with its controls; each `[L - hop]`."""

    hop: int
    information_bits: Values
    information_shuffled_bits: Values
    conditional_top1: Values
    held_out_top1: Values
    shuffled_top1: Values
    marginal_top1: Values
    conditional_topk: Values
    held_out_topk: Values
    shuffled_topk: Values
    marginal_topk: Values
    same_strongest: Values
    independent_strongest: Values
    same_selected: Values
    independent_selected: Values


class FlowRecord(_Record):
    """The strongest transitions from the MoE layer with index `layer` to the next, each `[N]`; excess: of all of them."""

    layer: int
    earlier: list[int]
    later: list[int]
    share: Values
    lift: Values
    excess: Number
    excess_shuffled: Number


class RepetitionRecord(_Record):
    """Experts that a token has in common with an earlier one: by distance and layer, and for shuffled tokens `[L]`."""

    dataset: str
    compared: int
    first: Table
    first_or_second: Table
    shared: Table
    first_shuffled: Values
    first_or_second_shuffled: Values
    shared_shuffled: Values


class RepetitionRecords(_Record):
    """One result for all datasets, then one for each. distances: of the rows of each table, in tokens."""

    distances: list[int]
    results: list[RepetitionRecord]


class Table5Record(_Record):
    """A cell of Table 5 of the Mixtral paper, next to the paper's range."""

    dataset: str
    layer: int
    first: Number
    first_range: tuple[float, float]
    first_or_second: Number
    first_or_second_range: tuple[float, float]
    within: bool


class ReuseRecord(_Record):
    """Tokens between two uses of an expert. gap_share, gap_shuffled: by layer and bin of `gap_edges`; between_share: by layer
    and number of other experts.
    """

    gap_edges: list[int]
    gap_share: Table
    gap_shuffled: Table
    median_gap: Values
    cold_share: Values
    cold_shuffled: Values
    between_share: Table
    segments: int
    working_set: Values
    working_set_shuffled: Values
    adjacent: Values
    adjacent_shuffled: Values


class CacheSizesRecord(_Record):
    """Share of the selected experts that a layer's cache lacks, by layer and number of slots in `sizes`."""

    sizes: list[int]
    lru_low: Table
    lru_high: Table
    popular: Table


class WorkingSetRecord(_Record):
    """Distinct experts in the last tokens of the longest problem: by number of tokens in `windows` and by token; for tokens in
    random order, by window. decode_from: position of the first generated token, if there is one.
    """

    windows: list[int]
    problem: int
    tokens: int
    positions: list[int]
    decode_from: int | None
    distinct: Table
    shuffled: Values


class PairRecord(_Record):
    """Experts that are used together. top_pair: of each layer, the pair with the largest lift."""

    unique_sets: Values
    possible_sets: int
    even_sets: Number
    top_pair: list[list[int]]
    top_lift: Values
    shuffled_top_lift: Values


class DomainRecord(_Record):
    """Distance between the loads of two datasets, and of its control (mean, and 97.5 % quantile), each `[L]`."""

    first: str
    second: str
    distance: Values
    shuffled: Values
    shuffled_high: Values


class SpecialistRecord(_Record):
    """An expert that a dataset prefers: how many times as often as others use it, with a 95 % interval."""

    dataset: str
    layer: int
    expert: int
    ratio: Number
    low: Number
    high: Number
    share: Number


class SpecializationRecord(_Record):
    """The experts that a dataset prefers. shuffled: how many are found with dataset labels shuffled over problems."""

    dataset: str
    problems: int
    found: int
    shuffled: int
    specialists: list[SpecialistRecord]


class ClusterRecord(_Record):
    """Clusters of a layer's experts. labels: the cluster of each expert `[E]`."""

    feature: str
    method: str
    layer: int
    clusters: int
    silhouette: Number
    shuffled: Number
    labels: list[int]


class WeightRecord(_Record):
    """Routing weights by layer and rank. quantiles `[L][K]`, at the fractions `at`; even: 1/K."""

    at: list[float]
    quantiles: list[Table]
    mean: Table
    even: Number


class MarginRecord(_Record):
    """The K-th largest router logit minus the next. quantiles: by layer, at the fractions `at`."""

    at: list[float]
    quantiles: Table
    close: Values


class ContextRecord(_Record):
    """How well a context predicts the experts; `_L`: per layer."""

    context: str
    tokens: int
    coverage: Number
    set_bits_plug_in: Number
    set_bits_held_out: Number
    first_bits_plug_in: Number
    first_bits_held_out: Number
    top1_plug_in: Number
    top1_held_out: Number
    recall_plug_in: Number
    recall_held_out: Number
    recall_plug_in_L: Values
    recall_held_out_L: Values


class PredictabilityRecord(_Record):
    """All contexts, and which of them a predictor of each task knows."""

    contexts: list[ContextRecord]
    tasks: dict[str, list[str]]


class RepetitionChance(_Record):
    """What two tokens with random experts have in common."""

    first: Number
    first_or_second: Number
    shared: Number


class Chance(_Record):
    """The values for random experts."""

    top1: float
    topk: float
    repetition: RepetitionChance


class StatisticsDocument(_Record):
    """The statistics of one trace; None or empty where the trace has no data for one. `definitions` says what each means."""

    version: int = 1
    trace: str
    model: ModelMetadata
    problems: int
    tokens: int
    datasets: list[str]
    caveats: list[str]
    definitions: dict[str, str]
    chance: Chance
    load: list[LoadRecord]
    transitions: list[TransitionRecord]
    flow: list[FlowRecord] = []
    repetition: RepetitionRecords
    mixtral_table_5: list[Table5Record]
    reuse: ReuseRecord
    cache_sizes: CacheSizesRecord | None = None
    working_set: WorkingSetRecord | None = None
    pairs: PairRecord | None
    domains: list[DomainRecord]
    specialisation: list[SpecializationRecord]
    clusters: list[ClusterRecord]
    weights: WeightRecord | None
    margins: MarginRecord | None
    predictability: PredictabilityRecord

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


class AgreementRecord(_Record):
    """How often two traces route the same prompt tokens to the same experts; `[L]`. See `analysis.Agreement`."""

    problems: int
    tokens: int
    shared: Values
    same_set: Values
    same_first: Values
    shared_shuffled: Values


class DatasetDifferenceRecord(_Record):
    """How two traces differ on one dataset, or on all: see `LoadDifferenceRecord`; entropy: of the load, over its maximum."""

    dataset: str
    problems: tuple[int, int]
    moved: Number
    moved_halves: Number
    entropy: Number
    entropy_low: Number
    entropy_high: Number


class LoadDifferenceRecord(_Record):
    """Expert load of the first trace minus that of the second, with 95 % intervals over problems.

    share, low, high `[L][E]`: in units of an even share. found: experts whose interval does not contain 0; found_halves: of two
    halves of the first trace, and of the second. moved, moved_halves `[L]`: share of selections that would have to move.
    """

    first: str
    second: str
    is_paired: bool
    share: Table
    low: Table
    high: Table
    found: int
    found_halves: tuple[Number, Number]
    moved: Values
    moved_halves: Values
    datasets: list[DatasetDifferenceRecord]


class ComparisonDocument(_Record):
    """Several traces side by side. traces: path by name. figures: value by figure and name. agreement: by pair of names.
    differences: of each pair of traces of the same shape.
    """

    version: int = 1
    traces: dict[str, str]
    figures: dict[str, dict[str, Number]]
    agreement: dict[str, AgreementRecord]
    differences: list[LoadDifferenceRecord] = []

    def to_json(self) -> str:
        """The file's content."""
        return self.model_dump_json(indent=1) + "\n"


def read_statistics(path: Path) -> StatisticsDocument:
    """Read the statistics of a trace from `statistics.json`, or from the folder that holds it.

    Args:
        path: `statistics.json`, or the folder that `specmoe analyze --out` wrote.

    Raises:
        TraceError: The file does not exist, or is something else.

    Example:
        >>> document = read_statistics(Path("reports/math"))  # doctest: +SKIP
        >>> document.load[0].entropy_share  # evenness of each layer's load, 1 is even  # doctest: +SKIP
    """
    return read_document(path, StatisticsDocument, STATISTICS_FILE, "specmoe analyze TRACE --out DIR")

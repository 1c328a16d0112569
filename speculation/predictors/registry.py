"""All expert predictors by name, as `specmoe predictors` lists them."""

from __future__ import annotations

from profiler.errors import UsageError
from speculation.predictors.base import Predictor


def predictor_classes() -> dict[str, type[Predictor]]:
    """All predictor classes by name, baselines first.

    They are imported when this is called, so that importing this module does not import torch.
    """
    from speculation.predictors.counting.backoff_counts import BackoffCounts
    from speculation.predictors.counting.boosted_trees import BoostedTrees
    from speculation.predictors.counting.conditional_counts import ConditionalCounts
    from speculation.predictors.counting.ewma_repeats import EwmaRepeats
    from speculation.predictors.counting.popularity import Popularity
    from speculation.predictors.counting.previous_token import PreviousToken
    from speculation.predictors.counting.product_of_experts import ProductOfExperts
    from speculation.predictors.counting.token_identity import TokenIdentity
    from speculation.predictors.counting.uniform import Uniform
    from speculation.predictors.neural.attention_graph import AttentionGraph
    from speculation.predictors.neural.ensemble import Ensemble
    from speculation.predictors.neural.hierarchical import Hierarchical
    from speculation.predictors.neural.hybrid import Hybrid
    from speculation.predictors.neural.interlayer_lstm import InterlayerLstm
    from speculation.predictors.neural.mlp import MlpPredictor
    from speculation.predictors.neural.next_gate import NextGate
    from speculation.predictors.neural.pre_attention import PreAttention
    from speculation.predictors.neural.recommended import Recommended
    from speculation.predictors.neural.recommended_small import RecommendedSmall
    from speculation.predictors.neural.reuse import Reuse
    from speculation.predictors.neural.reuse_small import ReuseSmall
    from speculation.predictors.neural.statistics_aware import StatisticsAware
    from speculation.predictors.neural.transformer import Transformer

    classes: tuple[type[Predictor], ...] = (
        Uniform,
        Popularity,
        PreviousToken,
        TokenIdentity,
        ConditionalCounts,
        BackoffCounts,
        ProductOfExperts,
        BoostedTrees,
        MlpPredictor,
        InterlayerLstm,
        StatisticsAware,
        Ensemble,
        Hierarchical,
        AttentionGraph,
        Hybrid,
        Transformer,
        NextGate,
        PreAttention,
        Recommended,
        RecommendedSmall,
        EwmaRepeats,
        Reuse,
        ReuseSmall,
    )
    return {cls.name: cls for cls in classes}


def find_predictor(name: str) -> type[Predictor]:
    """The predictor class called `name`.

    Raises:
        SpecmoeError: The name is unknown; the message lists the known ones.

    Example:
        >>> from speculation import find_predictor
        >>> find_predictor("mlp").defaults.batch_tokens
        256
    """
    classes = predictor_classes()
    if name not in classes:
        raise UsageError(f"unknown predictor {name!r}: expected one of {', '.join(classes)}")
    return classes[name]

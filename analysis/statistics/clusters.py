"""Clusters of experts: by the tokens that they share, and by the experts of adjacent layers; with shuffled controls."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import ClusterWarning, cut_tree, ward
from scipy.spatial.distance import pdist, squareform
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from analysis.counts.accumulator import Counts, Floats
from analysis.statistics.pairs import drawn_pairs, expected_pairs
from analysis.statistics.transitions import shuffled_table

CO_ACTIVATION, TRANSITIONS = "co-activation", "transitions"
K_MEANS, AGGLOMERATIVE = "k-means", "agglomerative"
CLUSTERS = (2, 3, 4, 6, 8)
CONTROLS = 3
MAX_EXPERTS = 256


@dataclass(frozen=True)
class Clustering:
    """Clusters of one layer's experts. layer: index among the MoE layers; labels `[E]`, 0 for the cluster of expert 0.

    silhouette: mean over experts of (b - a) / max(a, b), where a is the mean distance to the expert's own cluster and b to the
    nearest other one (Rousseeuw, 1987). The number of clusters is the one in CLUSTERS with the largest silhouette. shuffled:
    the largest silhouette of CONTROLS shuffled tables, whose number of clusters is chosen the same way. Clusters are evidence
    of structure only where silhouette exceeds shuffled.
    """

    feature: str
    method: str
    layer: int
    clusters: int
    silhouette: float
    shuffled: float
    labels: npt.NDArray[np.int32]


def co_activation_profile(together_EE: Counts) -> Floats:
    """Rows to cluster `[E, E]`: the experts that each expert is used with more, or less, often than independence predicts."""
    return _directions(together_EE, expected_pairs(together_EE.sum(1)))


def transition_profile(before_EE: Counts | None, after_EE: Counts | None) -> Floats:
    """Rows to cluster `[E, E or 2E]`: the experts of the next and of the previous layer that go with each expert.

    before_EE: pair counts of the previous layer (rows) and this one (columns); after_EE: of this layer and the next.
    """
    sides = [after_EE] if after_EE is not None else []
    sides += [before_EE.T] if before_EE is not None else []
    return np.concatenate(
        [_directions(side, np.outer(side.sum(1), side.sum(0)) / max(side.sum(), 1)) for side in sides], axis=1
    )


def _directions(counts_EE: Counts, expected_EE: Floats) -> Floats:
    """Pearson's residuals, (counted - expected) / sqrt(expected), with each row scaled to length 1.

    Relative frequencies would not work: those of rarely used experts are noisier, which alone separates these experts from the
    others, and k-means then finds a well-separated "cluster" of them in tables without any structure.
    """
    residuals = (counts_EE - expected_EE) / np.sqrt(np.where(expected_EE > 0, expected_EE, np.inf))
    length = np.linalg.norm(residuals, axis=1, keepdims=True)
    return np.asarray(np.divide(residuals, length, out=np.zeros_like(residuals), where=length > 0))


def cluster_experts(
    together_LEE: Counts | None, transitions_NEE: Counts | None, layers: int, seed: int = 0
) -> list[Clustering]:
    """Cluster the experts of every layer by both features and with both methods.

    Layers with fewer than 4 experts, or whose experts are all alike, have no clusters. More than MAX_EXPERTS experts are not
    clustered: it would take minutes.

    together_LEE: co-activation counts, None for K = 1; transitions_NEE: pair counts of adjacent layers `[L - 1, E, E]`.
    """
    tables = [table for table in (together_LEE, transitions_NEE) if table is not None and len(table)]
    if not tables or not 4 <= tables[0].shape[1] <= MAX_EXPERTS:
        return []
    random = np.random.default_rng(seed)
    found: list[Clustering] = []
    for layer in range(layers):
        if together_LEE is not None:
            controls = [
                co_activation_profile(drawn_pairs(expected_pairs(together_LEE[layer].sum(1)), random)) for _ in range(CONTROLS)
            ]
            found += _cluster(CO_ACTIVATION, layer, co_activation_profile(together_LEE[layer]), controls, seed)
        if transitions_NEE is not None and layers > 1:
            before = transitions_NEE[layer - 1] if layer > 0 else None
            after = transitions_NEE[layer] if layer < layers - 1 else None
            controls = [
                transition_profile(*(None if side is None else shuffled_table(side, random) for side in (before, after)))
                for _ in range(CONTROLS)
            ]
            found += _cluster(TRANSITIONS, layer, transition_profile(before, after), controls, seed)
    return found


def _cluster(feature: str, layer: int, profile: Floats, controls: list[Floats], seed: int) -> list[Clustering]:
    found: list[Clustering] = []
    if len(np.unique(profile.round(9), axis=0)) < 2 * CLUSTERS[0]:
        return found
    best = _best(profile, seed)
    shuffled = [_best(control, seed) for control in controls]
    for method, (score, labels) in best.items():
        by_chance = max(control[method][0] for control in shuffled)
        found.append(Clustering(feature, method, layer, len(np.unique(labels)), score, by_chance, _in_order(labels)))
    return found


Labels = npt.NDArray[np.int32]


def _best(profile: Floats, seed: int) -> dict[str, tuple[float, Labels]]:
    """The largest silhouette of each method, and the labels of its clustering."""
    distances = squareform(pdist(profile))
    sizes = [clusters for clusters in CLUSTERS if clusters < len(profile)]
    best = {}
    for method, labelings in (
        (K_MEANS, [_k_means(profile, clusters, seed) for clusters in sizes]),
        (AGGLOMERATIVE, _agglomerative(profile, sizes)),
    ):
        best[method] = max(
            ((silhouette(distances, labels), labels) for labels in labelings),
            key=lambda pair: pair[0],
            default=(-1.0, np.zeros(len(profile), dtype=np.int32)),
        )
    return best


def _k_means(profile: Floats, clusters: int, seed: int) -> Labels:
    with warnings.catch_warnings():
        # Raised by controls whose table has few distinct rows.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return np.asarray(KMeans(clusters, n_init=2, random_state=seed).fit_predict(profile), dtype=np.int32)


def _agglomerative(profile: Floats, sizes: list[int]) -> list[Labels]:
    """Ward's clustering cut into each number of clusters; the tree is the same for all of them."""
    with warnings.catch_warnings():
        # Co-activation is symmetric with an empty diagonal, so SciPy takes it for a distance matrix, which it is not.
        warnings.simplefilter("ignore", ClusterWarning)
        return list(cut_tree(ward(profile), sizes).T.astype(np.int32))


def silhouette(distances_EE: Floats, labels_E: Labels) -> float:
    """Mean silhouette (`Clustering.silhouette`) from the distances between all members; -1 if all are in one cluster.

    The only member of a cluster has a silhouette of 0, and so has one whose distances are all 0.
    """
    _, of_E, sizes_C = np.unique(labels_E, return_inverse=True, return_counts=True)
    if len(sizes_C) < 2:
        return -1.0
    everyone = np.arange(len(of_E))
    sums_EC = distances_EE @ (of_E[:, None] == np.arange(len(sizes_C))).astype(np.float64)
    own_E = sums_EC[everyone, of_E] / np.maximum(sizes_C[of_E] - 1, 1)
    others_EC = sums_EC / sizes_C
    others_EC[everyone, of_E] = np.inf
    nearest_E = others_EC.min(1)
    larger_E = np.maximum(own_E, nearest_E)
    is_defined_E = (sizes_C[of_E] > 1) & (larger_E > 0)
    return float(np.divide(nearest_E - own_E, larger_E, out=np.zeros_like(own_E), where=is_defined_E).mean())


def _in_order(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Renumber the clusters in the order of their first expert."""
    _, first, of = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[of].astype(np.int32)

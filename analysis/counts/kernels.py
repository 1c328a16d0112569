"""The counting loops, compiled by numba: each passes over a chunk once and adds to tables in place.

Ids `[T, L, K]` are sorted by weight, strongest first; the id E is an empty slot, and only empty slots follow it. No loop checks
bounds: the reader has checked the ids, and callers pass tables of matching shapes. All loops release the GIL.

numba compiles a loop again, for up to a second, for arguments of other types, of another layout, or that may not be written. So
callers pass what a loop only reads through `as_input`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# The values of float16 by their bits, since numba has no float16 on CPUs.
HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)

compiled = numba.njit(nogil=True, cache=True, boundscheck=False)


def as_input(array: Array) -> Array:
    """The array as a contiguous read-only view; a copy if it is not contiguous."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


@compiled
def count_load(ids: Array, weight_bits: Array, halves: Array, run: Array, counts: Array, mass: Array) -> None:
    """Add selections and routing weights of each expert to counts and mass `[R, L, E]`; run: table row of each token `[T]`.

    weight_bits: float16 weights as uint16 `[T, L, K]`, or an array without tokens if the trace has no weights.
    """
    tokens, layers, top_k = ids.shape
    experts = counts.shape[2]
    weighted = weight_bits.shape[0] > 0
    for t in range(tokens):
        r = run[t]
        for layer in range(layers):
            for k in range(top_k):
                expert = ids[t, layer, k]
                if expert >= experts:
                    break
                counts[r, layer, expert] += 1
                if weighted:
                    mass[r, layer, expert] += halves[weight_bits[t, layer, k]]


@compiled
def count_transitions(ids: Array, fold: Array, pairs: Array, strongest: Array) -> None:
    """Count all K x K pairs, and pairs of strongest experts, of layers n and n+k in `[F, H, L, E + 1, E + 1]`; fold: `[T]`.

    The last row and column take the empty slots: testing for them would take several times as long as counting them.
    """
    layers, top_k = ids.shape[1:]
    ends = run_ends(fold)
    for hop in range(pairs.shape[1]):
        for layer in range(layers - hop - 1):
            later = layer + hop + 1
            begin = 0
            for end in ends:
                table, first = pairs[fold[begin], hop, layer], strongest[fold[begin], hop, layer]
                if top_k == 2:
                    for t in range(begin, end):
                        a, b, c, d = ids[t, layer, 0], ids[t, layer, 1], ids[t, later, 0], ids[t, later, 1]
                        first[a, c] += 1
                        table[a, c] += 1
                        table[a, d] += 1
                        table[b, c] += 1
                        table[b, d] += 1
                else:
                    for t in range(begin, end):
                        first[ids[t, layer, 0], ids[t, later, 0]] += 1
                        for i in range(top_k):
                            for j in range(top_k):
                                table[ids[t, layer, i], ids[t, later, j]] += 1
                begin = end


@compiled
def run_ends(values: Array) -> Array:
    """End indices of the runs of equal values in `[T]`."""
    count = 1
    for t in range(1, len(values)):
        count += values[t] != values[t - 1]
    ends = np.full(count, len(values))
    count = 0
    for t in range(1, len(values)):
        if values[t] != values[t - 1]:
            ends[count] = t
            count += 1
    return ends


@compiled
def count_pairs(ids: Array, dataset: Array, together: Array, leading: Array) -> None:
    """Count pairs of experts of a token in together `[L, E + 1, E + 1]`, the two strongest in leading `[Q, L, E + 1, E + 1]`.

    Each pair is counted once, in the order of its weights; the last row and column take the empty slots.
    """
    layers, top_k = ids.shape[1:]
    ends = run_ends(dataset)
    for layer in range(layers):
        table = together[layer]
        begin = 0
        for end in ends:
            first_two = leading[dataset[begin], layer]
            for t in range(begin, end):
                first_two[ids[t, layer, 0], ids[t, layer, 1]] += 1
                for i in range(1, top_k):
                    for j in range(i):
                        table[ids[t, layer, j], ids[t, layer, i]] += 1
            begin = end


@compiled
def hash_sets(ids: Array, experts: int) -> Array:
    """A 64-bit hash of each set of experts `[T, L]`, independent of the order of its members."""
    tokens, layers, top_k = ids.shape
    hashes = np.empty((tokens, layers), dtype=np.uint64)
    for t in range(tokens):
        for layer in range(layers):
            total = np.uint64(0)
            for k in range(top_k):
                if ids[t, layer, k] >= experts:
                    break
                total += _mix(np.uint64(ids[t, layer, k]) + np.uint64(1))
            hashes[t, layer] = _mix(total)
    return hashes


@compiled
def _mix(value: Any) -> Any:
    """One step of splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(0xFFFFFFFFFFFFFFFF)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def as_bits(ids: Array, first: int, experts: int) -> Array:
    """The `first` strongest experts of each token and layer as bits of uint64 words `[T, L, W]`."""
    tokens, layers, top_k = ids.shape
    words = np.zeros((tokens, layers, (experts + 63) // 64), dtype=np.uint64)
    for t in range(tokens):
        for layer in range(layers):
            for k in range(min(first, top_k)):
                expert = ids[t, layer, k]
                if expert >= experts:
                    break
                words[t, layer, expert >> 6] |= np.uint64(1) << np.uint64(expert & 63)
    return words


@compiled
def _count_bits(word: Any) -> Any:
    """Number of set bits of a 64-bit word (Hacker's Delight, 5-1)."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@compiled
def count_repetition(
    ids: Array,
    all_bits: Array,
    leading_bits: Array,
    problem: Array,
    position: Array,
    dataset: Array,
    skip: int,
    distances: Array,
    experts: int,
    same: Array,
    seen: Array,
) -> None:
    """Compare each token from index `skip` on with the tokens `distances` earlier in its problem, if these were recorded.

    all_bits, leading_bits: `as_bits` of all experts, and of the first two. same `[Q, N, L, 3]`: equal first choices; first or
    second choices with an expert in common; number of experts in common. seen `[Q, N, L]`: number of comparisons.
    """
    tokens, layers, _ = ids.shape
    for n in range(len(distances)):
        distance = distances[n]
        for t in range(max(skip, distance), tokens):
            before = t - distance
            if problem[before] != problem[t] or position[t] - position[before] != distance:
                continue
            q = dataset[t]
            for layer in range(layers):
                if ids[t, layer, 0] >= experts or ids[before, layer, 0] >= experts:
                    continue
                meets, common = np.uint64(0), np.uint64(0)
                for word in range(all_bits.shape[2]):
                    meets |= leading_bits[t, layer, word] & leading_bits[before, layer, word]
                    common += _count_bits(all_bits[t, layer, word] & all_bits[before, layer, word])
                seen[q, n, layer] += 1
                same[q, n, layer, 0] += ids[t, layer, 0] == ids[before, layer, 0]
                same[q, n, layer, 1] += meets != 0
                same[q, n, layer, 2] += np.int64(common)


@compiled
def count_reuse(
    ids: Array,
    problem: Array,
    position: Array,
    state: Array,
    last: Array,
    current: Array,
    previous: Array,
    gaps: Array,
    between: Array,
    cold: Array,
    lengths: Array,
    segments: Array,
) -> None:
    """Count reuse within a problem; chunks must come in order, with `state`, `last`, `current` and `previous` carried over.

    state `[8]`: positions per segment; the problem or -1; its first and last position; the segment's number and tokens; whether
    `previous` is a whole segment; the problem's tokens. last `[L, E]`: position of each expert's last use, or -1. current,
    previous `[L, E]`: selections in the current and previous segment. gaps `[L, 32]`: reuses by floor(log2) of the tokens since
    the last use. between `[L, E]`: reuses by the number of other experts used in between. cold `[L]`: first uses in a problem.
    lengths `[T]`: number of tokens of each problem that ends within the chunk, else 0. segments `[L, 5]`: see `end_segment`.
    """
    tokens, layers, top_k = ids.shape
    experts = last.shape[1]
    for t in range(tokens):
        if problem[t] != state[1]:
            if state[1] >= 0:
                lengths[t] = state[7]
                end_segment(state, current, previous, segments)
            state[1], state[2], state[4], state[5], state[6], state[7] = problem[t], position[t], 0, 0, 0, 0
            last[:] = -1
            current[:] = 0
        number = (position[t] - state[2]) // state[0]
        if number != state[4]:
            end_segment(state, current, previous, segments)
            if number != state[4] + 1:
                state[6] = 0
            state[4], state[5] = number, 0
        state[3] = position[t]
        state[5] += 1
        state[7] += 1
        for layer in range(layers):
            used = last[layer]
            for k in range(top_k):
                expert = ids[t, layer, k]
                if expert >= experts:
                    break
                current[layer, expert] += 1
                since = used[expert]
                if since < 0:
                    cold[layer] += 1
                    continue
                gap = position[t] - since
                bucket = 0
                while gap > 1:
                    gap >>= 1
                    bucket += 1
                gaps[layer, bucket] += 1
                later = 0
                for e in range(experts):
                    later += used[e] > since
                between[layer, later] += 1
            for k in range(top_k):
                expert = ids[t, layer, k]
                if expert >= experts:
                    break
                used[expert] = position[t]


@compiled
def end_segment(state: Array, current: Array, previous: Array, segments: Array) -> None:
    """Count the current segment of `count_reuse` if it is whole, and begin a new one.

    segments `[L, 5]`: whole segments; their distinct experts; pairs of adjacent whole segments; pairs of selections, one from
    each of two adjacent segments, of the same expert; all pairs of selections from two adjacent segments.
    """
    whole = state[5] == state[0]
    for layer in range(current.shape[0]):
        if whole:
            segments[layer, 0] += 1
            segments[layer, 2] += state[6]
            segments[layer, 4] += state[6] * current[layer].sum() * previous[layer].sum()
        for e in range(current.shape[1]):
            if whole:
                segments[layer, 1] += current[layer, e] > 0
                segments[layer, 3] += state[6] * current[layer, e] * previous[layer, e]
            previous[layer, e] = current[layer, e]
            current[layer, e] = 0
    state[6] = whole


@compiled
def count_weights(weight_bits: Array, halves: Array, shift: int, histogram: Array, sums: Array) -> None:
    """Count weights in histogram `[L, K, bins]` by their leading float16 bits, and add them to sums `[L, K]`; skip NaN."""
    tokens, layers, top_k = weight_bits.shape
    for t in range(tokens):
        for layer in range(layers):
            for k in range(top_k):
                bits = weight_bits[t, layer, k]
                if bits <= 0x7C00:
                    histogram[layer, k, bits >> shift] += 1
                    sums[layer, k] += halves[bits]


@compiled
def count_in_context(ids: Array, fold: Array, context: Array, selected: Array, strongest: Array) -> None:
    """Count experts by context in selected and strongest `[F, L, C, E + 1]`; context `[T, L]`, negative where unknown.

    The last column takes the empty slots.
    """
    layers, top_k = ids.shape[1:]
    ends = run_ends(fold)
    for layer in range(layers):
        begin = 0
        for end in ends:
            table, first = selected[fold[begin], layer], strongest[fold[begin], layer]
            for t in range(begin, end):
                c = context[t, layer]
                if c >= 0:
                    first[c, ids[t, layer, 0]] += 1
                    for k in range(top_k):
                        table[c, ids[t, layer, k]] += 1
            begin = end

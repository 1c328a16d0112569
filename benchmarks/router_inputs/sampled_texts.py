"""Texts sampled from the embedded demo model, with router inputs: freed of near duplicates, split by prompt.

`sample_prompts` collects them. All texts that continue a prompt are one problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import numpy.typing as npt

from profiler.errors import SpecmoeError
from profiler.trace.reader import Trace
from profiler.trace.splits import PARTS, digest
from speculation.data.router_inputs import RouterInputs
from speculation.data.routes import Routes, load_routes

# Shares of the prompts of each domain. The prompts are too few for the shares of hash space that split a trace: 4 of 40 prompts
# would be left to test code with.
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
# A window is a run of so many tokens. A text that shares more than these shares of its distinct windows with texts that are
# kept already, of another part or of its own, is left out.
WINDOW = 8
MOST_SHARED, MOST_REPEATED = 0.2, 0.5


@dataclass(frozen=True)
class Texts:
    """Texts of P prompts, whole, in order of the prompts.

    routes: T tokens, with router inputs. `problem_ids_T` is the prompt; a stretch is a text.
    domain_P: the domain of each prompt. part_P: the part of the split that it belongs to.
    dropped: the number of near duplicates that were left out.
    """

    routes: Routes
    domain_P: npt.NDArray[np.str_]
    part_P: npt.NDArray[np.str_]
    dropped: int = 0

    def of(self, part: str, domain: str | None = None) -> Routes:
        """The routes of one part, of one domain or of all. Raises `SpecmoeError` if there are none."""
        is_chosen_P = (self.part_P == part) & ((self.domain_P == domain) | (domain is None))
        is_chosen_T = is_chosen_P[self.routes.problem_ids_T]
        if not is_chosen_T.any():
            raise SpecmoeError(f"no text of {domain or 'any domain'} is in the {part} part: collect more prompts")
        return self.routes.of_problems(is_chosen_T)

    @property
    def domains(self) -> list[str]:
        """The names of the domains."""
        return sorted(set(self.domain_P.tolist()))


def load_texts(traces: Sequence[Trace]) -> Texts:
    """The texts of traces of the same prompts, without near duplicates.

    Near duplicates are found among the prompts first, then among what was generated: see `without_near_duplicates`.

    Raises:
        SpecmoeError: The traces are of different prompts, or lack router inputs.
    """
    tables = [trace.problems.select(["dataset", "prompt"]).to_pydict() for trace in traces]
    if any(table != tables[0] for table in tables):
        raise SpecmoeError(f"{traces[0].path.parent}: its traces are of different prompts: collect all of them again")
    domain_P = np.array(tables[0]["dataset"])
    part_P = split_prompts(tables[0]["prompt"], tables[0]["dataset"])
    routes = together([load_routes(trace, "all", router_inputs=True) for trace in traces])
    texts, text_T = np.unique(routes.first_T, return_inverse=True)
    problem_X = routes.problem_ids_T[texts]
    keeps_P = np.zeros(len(part_P), dtype=np.bool_)
    found, first_of = np.unique(problem_X, return_index=True)
    # All texts of a prompt begin with the same tokens.
    prompt_keys = [routes.token_keys_T[(text_T == text) & ~routes.is_decode_T] for text in first_of]
    keeps_P[found] = without_near_duplicates(prompt_keys, part_P[found], most_repeated=1.0)
    new_keys = [routes.token_keys_T[(text_T == text) & routes.is_decode_T] for text in range(len(texts))]
    keeps_X = without_near_duplicates(new_keys, part_P[problem_X], among=keeps_P[problem_X])
    return Texts(routes.of_problems(keeps_X[text_T]), domain_P, part_P, int((~keeps_X).sum()))


def split_prompts(prompts: Sequence[str], domains: Sequence[str]) -> npt.NDArray[np.str_]:
    """The part of each prompt: in each domain, the prompts with the lowest hashes are for training, the highest for the test.

    Copies of a prompt have the same hash, and are in the same part: that of the first of them.
    """
    part_P = np.empty(len(prompts), dtype="<U10")
    parts: dict[int, str] = {}
    for domain in sorted(set(domains)):
        own = sorted({digest(prompt) for prompt, of in zip(prompts, domains, strict=True) if of == domain} - parts.keys())
        ends = [ceil(round(len(own) * share, 6)) for share in np.cumsum([SHARES[part] for part in PARTS])]
        for begin, end, part in zip([0, *ends], ends, PARTS, strict=False):
            parts |= dict.fromkeys(own[begin:end], part)
    part_P[:] = [parts[digest(prompt)] for prompt in prompts]
    return part_P


def without_near_duplicates(
    keys: Sequence[npt.NDArray[np.int64]],
    part_X: npt.NDArray[np.str_],
    *,
    among: npt.NDArray[np.bool_] | None = None,
    most_shared: float = MOST_SHARED,
    most_repeated: float = MOST_REPEATED,
) -> npt.NDArray[np.bool_]:
    """Which of X texts are kept so that no two are nearly the same, bool `[X]`.

    The training texts are looked at first, then the validation texts, then the test texts. Texts shorter than a window have
    nothing in common with others.

    Args:
        keys: The tokens of each text.
        part_X: The part of each text.
        among: Texts that may be kept at all; None for all.
        most_shared: Leave out a text if more than this share of its distinct windows occurs in kept texts of another part.
        most_repeated: Leave out a text if more than this share of its distinct windows occurs in kept texts of its own part.
    """
    windows = [np.lib.stride_tricks.sliding_window_view(each, WINDOW) for each in keys if len(each) >= WINDOW]
    keeps_X = np.ones(len(keys), dtype=np.bool_) if among is None else among.copy()
    if not windows:
        return keeps_X
    distinct, number_W = np.unique(np.concatenate(windows), axis=0, return_inverse=True)
    ends = np.cumsum([max(0, len(each) - WINDOW + 1) for each in keys])
    of_text = np.split(number_W.reshape(-1), ends[:-1])
    is_seen = {part: np.zeros(len(distinct), dtype=np.bool_) for part in PARTS}
    order = np.argsort([PARTS.index(part) for part in part_X], kind="stable")
    for text in order[keeps_X[order]].tolist():
        own = np.unique(of_text[text])
        if not len(own):
            continue
        part = str(part_X[text])
        others = np.any([is_seen[other][own] for other in PARTS if other != part], axis=0)
        keeps_X[text] = others.mean() <= most_shared and is_seen[part][own].mean() <= most_repeated
        if keeps_X[text]:
            is_seen[part][own] = True
    return keeps_X


def together(sources: Sequence[Routes]) -> Routes:
    """The texts of several traces of the same problems, with the texts of a problem one after the other.

    Every source must have router inputs of the same gates.
    """
    source_T = np.repeat(np.arange(len(sources)), [len(each) for each in sources])
    names = [name for name in Routes.__dataclass_fields__ if name not in {"router", "first_T"}]
    arrays = {name: np.concatenate([getattr(each, name) for each in sources]) for name in names}
    begins = np.cumsum([0, *(len(each) for each in sources[:-1])])
    first_T = np.concatenate([each.first_T + begin for each, begin in zip(sources, begins, strict=True)])
    order_T = np.lexsort((arrays["token_ids_T"], source_T, arrays["problem_ids_T"]))
    place_T = np.empty_like(order_T)
    place_T[order_T] = np.arange(len(order_T))
    routers = [each.router for each in sources if each.router is not None]
    if len(routers) < len(sources):
        raise SpecmoeError("router inputs are missing: collect the traces with capture_hidden for all MoE layers")
    hidden_TLD = np.concatenate([router.hidden_TLD for router in routers])[order_T]
    router = RouterInputs(hidden_TLD, routers[0].weight_LED, routers[0].bias_LE, routers[0].correction_LE)
    taken = {name: array[order_T] for name, array in arrays.items()}
    return replace(Routes(**taken, first_T=place_T[first_T[order_T]]), router=router)

"""Continues prompts with a `transformers` model: batches of them, in parts that bound the memory of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from profiler.errors import ModelError, SpecmoeError

# A prompt is computed in parts of this many tokens, as in the simulation: it bounds the memory of activations.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Generation:
    """What was generated for one prompt.

    Attributes:
        prompt_ids: The prompt's tokens.
        token_ids: The generated tokens, with the end token if it came.
        text: The same as text.
        finish_reason: `stop` if the end token came, else `length`.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else tokens are drawn.
        top_p: Tokens are drawn from the likeliest ones whose probabilities add up to this.
        ignore_eos: Whether to continue after the end token.
    """

    temperature: float
    top_p: float
    ignore_eos: bool


class Generator:
    """Continues batches of prompts.

    Attributes:
        finished_B: Sequences of the batch in progress that have ended; None between batches.
        prompt_tokens: Of the batch in progress: the length of its longest prompt; 1 between batches.
    """

    def __init__(self, model: Any, tokenizer: Any | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self.finished_B: npt.NDArray[np.bool_] | None = None
        self.prompt_tokens = 1

    def check_prompt(self, number: int, tokens: list[int], max_new_tokens: int) -> None:
        """Check that a prompt can be continued.

        Args:
            number: Its place among the prompts, for messages.
            tokens: Its tokens.
            max_new_tokens: The most tokens to generate.

        Raises:
            SpecmoeError: It is empty, has tokens that the model does not know, or is longer than the model allows.
        """
        vocabulary = self._model.get_input_embeddings().num_embeddings
        limit = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not tokens:
            raise SpecmoeError(f"prompt {number} is empty: expected at least one token")
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            raise SpecmoeError(f"prompt {number} has token {wrong}: the model knows tokens from 0 to {vocabulary - 1}")
        if limit is not None and len(tokens) + max_new_tokens > limit:
            raise SpecmoeError(
                f"prompt {number} has {len(tokens)} tokens: with {max_new_tokens} new ones that is more than the {limit} that "
                "the model allows"
            )

    def generate_batch(
        self,
        ids: list[list[int]],
        max_new_tokens: int,
        sampling: TokenChoice,
        on_token: Callable[[], None] | None,
    ) -> list[Generation]:
        """Continue prompts that are computed at the same time.

        Args:
            ids: The tokens of each prompt.
            max_new_tokens: The most tokens to generate for each.
            sampling: How tokens are chosen.
            on_token: Called after every step.
        """
        from transformers import GenerationConfig, StoppingCriteriaList

        ends = set() if sampling.ignore_eos else self._end_tokens
        longest, pad = max(map(len, ids)), min(self._end_tokens, default=0)
        tokens_BT, mask_BT = torch.full((len(ids), longest), pad), torch.zeros((len(ids), longest), dtype=torch.long)
        for row, tokens in enumerate(ids):
            tokens_BT[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask_BT[row, longest - len(tokens) :] = 1
        choice: dict[str, Any] = {"do_sample": False, "eos_token_id": sorted(ends) or None}
        if sampling.temperature > 0:
            choice |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        self.finished_B = np.zeros(len(ids), dtype=np.bool_)

        def note_token(tokens_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            """Note which sequences have finished: their experts are not computed any more. It stops nothing itself."""
            if ends and self.finished_B is not None:
                self.finished_B |= np.isin(tokens_BT[:, -1].cpu().numpy(), list(ends))
            if on_token is not None:
                on_token()
            return torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)

        device, own = self._model.device, self._model.generation_config
        # Nothing but what the caller requested: a checkpoint's own settings may penalize, filter, or search.
        plain = GenerationConfig(**choice, max_new_tokens=max_new_tokens, pad_token_id=pad, disable_compile=True)
        # Models with a recurrent state do not all carry it from one part of a prompt to the next.
        if longest > PREFILL_TOKENS and not getattr(self._model, "_is_stateful", False):
            plain.prefill_chunk_size = PREFILL_TOKENS
        self.prompt_tokens = longest
        self._model.generation_config = plain
        try:
            output_BT = self._model.generate(
                tokens_BT.to(device),
                attention_mask=mask_BT.to(device),
                stopping_criteria=StoppingCriteriaList([note_token]),
            )
        finally:
            self._model.generation_config = own
            self.finished_B, self.prompt_tokens = None, 1
        return [self._generation(tokens, row, ends) for tokens, row in zip(ids, output_BT[:, longest:].tolist(), strict=True)]

    def _generation(self, prompt: list[int], output: list[int], ends: set[int]) -> Generation:
        end = next((place for place, token in enumerate(output) if token in ends), None)
        kept = output if end is None else output[: end + 1]
        text = "" if self._tokenizer is None else self._tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(prompt, kept, text, "length" if end is None else "stop")

    @property
    def _end_tokens(self) -> set[int]:
        end = self._model.generation_config.eos_token_id
        found = [end] if isinstance(end, int) else list(end or [])
        if not all(isinstance(token, int) for token in found):
            raise ModelError(f"the generation config names the end tokens {found}: expected numbers")
        return set(found)

"""Train the embedded demo model: a small Mixtral on arithmetic, film reviews and Python source.

Maintainers ran it once to create `profiler/demo/model/`; users never need it. It is seeded, and resumes after a kill:

    python profiler/demo/train_model.py --gsm8k train.parquet --imdb train.parquet --work DIR --steps 4000
    python profiler/demo/train_model.py ... --export profiler/demo/model      (same flags, after training)

The Parquet files are the `train` splits of `openai/gsm8k` (main) and `stanfordnlp/imdb`; Python source is the standard
library of the interpreter that runs this script. A tenth of each domain's documents, chosen by a hash, is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

DOMAINS = ("math", "reviews", "code")
SEQUENCE_LENGTH = 512
VOCABULARY = 3072
TOKENIZER_CHARACTERS_PER_DOMAIN = 2_500_000
# Folders of the standard library to skip: tests (repetitive tables), and code that is not the library's own.
STDLIB_EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "encodings", "pydoc_data"}

CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    documents = read_documents(arguments.gsm8k, arguments.imdb)
    tokenizer = train_tokenizer(documents["train"], arguments.work / "tokenizer.json")
    train_tokens = encode(tokenizer, documents["train"], arguments.work / "train.npz")
    held_out_tokens = encode(tokenizer, documents["held_out"], arguments.work / "held_out.npz")
    model, history = train_demo(train_tokens, held_out_tokens, arguments)
    if arguments.export:
        export_checkpoint(model, tokenizer, train_tokens, held_out_tokens, history, arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="Parquet file of openai/gsm8k, train")
    parser.add_argument("--imdb", type=Path, required=True, help="Parquet file of stanfordnlp/imdb, train")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and checkpoints")
    parser.add_argument("--export", type=Path, help="write the bfloat16 model and tokenizer to this folder")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=8, help=f"sequences of {SEQUENCE_LENGTH} tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--z-loss", type=float, default=1e-3, help="weight of the router z-loss")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


# ---------------------------------------------------------------- text


def read_documents(gsm8k: Path, imdb: Path) -> dict[str, dict[str, list[str]]]:
    """Read the documents: split -> domain -> texts, in the same form in which `specmoe collect` prompts the model."""
    math_rows = pq.read_table(gsm8k).to_pylist()
    review_rows = pq.read_table(imdb).to_pylist()
    math_texts = [
        f"Question: {row['question'].strip()}\nAnswer: {re.sub(r'<<.*?>>', '', row['answer']).strip()}" for row in math_rows
    ]
    review_texts = [
        f"Review: {re.sub(r'(<br />)+', chr(10), row['text']).strip()}\nSentiment: {'positive' if row['label'] else 'negative'}"
        for row in review_rows
    ]
    code_texts, code_keys = [], []
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_EXCLUDED.isdisjoint(relative.parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 200 < len(text) < 200_000:
                code_texts.append(text)
                code_keys.append(relative.as_posix())
    by_domain = {
        "math": (math_texts, math_texts),
        "reviews": (review_texts, review_texts),
        "code": (code_texts, code_keys),
    }
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "held_out": {}}
    for domain, (texts, keys) in by_domain.items():
        held_out = [hashlib.sha256(key.encode()).digest()[0] < 26 for key in keys]
        splits["train"][domain] = [t for t, out in zip(texts, held_out, strict=True) if not out]
        splits["held_out"][domain] = [t for t, out in zip(texts, held_out, strict=True) if out]
    return splits


def train_tokenizer(documents: dict[str, list[str]], path: Path) -> Tokenizer:
    """Train a byte-level BPE on the same number of characters from each domain, or load the one at `path`."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sample: list[str] = []
    for domain in DOMAINS:
        shuffled = list(documents[domain])
        random.Random(0).shuffle(shuffled)
        characters = 0
        for text in shuffled:
            if characters >= TOKENIZER_CHARACTERS_PER_DOMAIN:
                break
            sample.append(text)
            characters += len(text)
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: dict[str, list[str]], path: Path) -> dict[str, np.ndarray]:
    """One uint16 array of tokens per domain: `<s> document </s> <s> document </s> ...`."""
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return {domain: stored[domain] for domain in DOMAINS}
    tokens = {}
    for domain in DOMAINS:
        shuffled = list(documents[domain])
        random.Random(0).shuffle(shuffled)
        encoded = tokenizer.encode_batch(shuffled)
        tokens[domain] = np.concatenate([np.array([*e.ids, 1], dtype=np.uint16) for e in encoded])
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, allow_pickle=False, **tokens)
    temporary.rename(path)
    return tokens


# ---------------------------------------------------------------- training


def train_demo(
    train_tokens: dict[str, np.ndarray], held_out_tokens: dict[str, np.ndarray], arguments: argparse.Namespace
) -> tuple[MixtralForCausalLM, list[dict[str, Any]]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    model = MixtralForCausalLM(MixtralConfig(**CONFIG)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    history: list[dict[str, Any]] = []
    step = 0
    checkpoint = arguments.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, history = state["step"], state["history"]
        print(f"resumed at step {step}", flush=True)
    sizes = {domain: len(tokens) for domain, tokens in train_tokens.items()}
    print(f"{model.num_parameters():,} parameters; training tokens {sizes}", flush=True)
    began, began_step = time.monotonic(), step
    while step < arguments.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments)
        tokens_BT = sample_batch(train_tokens, arguments.batch, arguments.seed, step).to(device)
        output = model(input_ids=tokens_BT[:, :-1], output_router_logits=True, use_cache=False)
        cross_entropy = functional.cross_entropy(output.logits.float().flatten(0, 1), tokens_BT[:, 1:].flatten())
        balance, z_loss = router_losses(output.router_logits, model.config.num_experts_per_tok)
        loss = cross_entropy + arguments.balance * balance + arguments.z_loss * z_loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0 or step == arguments.steps:
            per_second = (step - began_step) * arguments.batch * SEQUENCE_LENGTH / (time.monotonic() - began)
            print(
                f"step {step} loss {cross_entropy.item():.3f} balance {balance.item():.3f} {per_second:,.0f} tokens/s",
                flush=True,
            )
        if step % arguments.checkpoint_every == 0 or step == arguments.steps:
            held_out = held_out_loss(model, held_out_tokens, windows=8)
            rounded = {domain: round(loss, 4) for domain, loss in held_out.items()}
            history.append({"step": step, "held_out_loss": rounded})
            print(f"step {step} held out", {d: round(v, 3) for d, v in held_out.items()}, flush=True)
            temporary = checkpoint.with_suffix(".part")
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "history": history}, temporary
            )
            temporary.rename(checkpoint)
    return model, history


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Warm-up over 100 steps, then constant, then linear to zero over the last 40 %.

    Unlike a cosine schedule, the constant part does not depend on the number of steps, so a resumed run can be made shorter or
    longer.
    """
    warm_up = min(1.0, (step + 1) / 100)
    decay = min(1.0, (arguments.steps - step) / (0.4 * arguments.steps))
    return float(arguments.learning_rate * warm_up * decay)


def sample_batch(tokens: dict[str, np.ndarray], batch: int, seed: int, step: int) -> torch.Tensor:
    """Windows `[B, SEQUENCE_LENGTH + 1]`, with every domain equally likely. Depends only on the seed and the step."""
    generator = np.random.default_rng((seed, step))
    # A random offset into a fixed rotation of the domains keeps each batch mixed.
    rotation = generator.integers(len(DOMAINS))
    windows = []
    for row in range(batch):
        stream = tokens[DOMAINS[(row + rotation) % len(DOMAINS)]]
        start = generator.integers(len(stream) - SEQUENCE_LENGTH - 1)
        windows.append(stream[start : start + SEQUENCE_LENGTH + 1].astype(np.int64))
    return torch.from_numpy(np.stack(windows))


def router_losses(router_logits: tuple[torch.Tensor, ...], top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over layers of the load-balancing loss (Switch Transformer, eq. 4) and the z-loss (ST-MoE, eq. 5).

    Each layer is balanced separately: balancing the sum over layers, as `MixtralForCausalLM` does, lets a layer collapse.
    """
    balance, z_loss = [], []
    for logits_TE in router_logits:
        probabilities_TE = logits_TE.float().softmax(-1)
        experts = logits_TE.shape[-1]
        chosen_TK = probabilities_TE.topk(top_k).indices
        share_E = functional.one_hot(chosen_TK, experts).float().mean((0, 1))
        balance.append(experts * (share_E * probabilities_TE.mean(0)).sum())
        z_loss.append(logits_TE.float().logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z_loss).mean()


@torch.no_grad()
def held_out_loss(model: MixtralForCausalLM, tokens: dict[str, np.ndarray], windows: int) -> dict[str, float]:
    """Mean cross-entropy (nats per token) per domain over evenly spaced windows of held-out documents."""
    model.eval()
    losses = {}
    for domain, stream in tokens.items():
        starts = np.linspace(0, len(stream) - SEQUENCE_LENGTH - 1, windows).astype(int)
        total = 0.0
        for start in starts:
            window = stream[start : start + SEQUENCE_LENGTH + 1].astype(np.int64)
            tokens_BT = torch.from_numpy(window)[None].to(model.device)
            logits = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits.float()
            total += functional.cross_entropy(logits[0], tokens_BT[0, 1:]).item()
        losses[domain] = total / windows
    model.train()
    return losses


# ---------------------------------------------------------------- export


def export_checkpoint(
    model: MixtralForCausalLM,
    tokenizer: Tokenizer,
    train_tokens: dict[str, np.ndarray],
    held_out_tokens: dict[str, np.ndarray],
    history: list[dict[str, Any]],
    arguments: argparse.Namespace,
) -> None:
    """Write the bfloat16 checkpoint, the tokenizer, and `training.json`, which the model card quotes."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(arguments.export)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(arguments.export)
    # Losses of the rounded weights, computed in float32: those of the published checkpoint.
    losses = held_out_loss(model.float(), held_out_tokens, windows=64)
    record = {
        "parameters": model.num_parameters(),
        "steps": arguments.steps,
        "batch": arguments.batch,
        "sequence_length": SEQUENCE_LENGTH,
        "tokens_seen": arguments.steps * arguments.batch * SEQUENCE_LENGTH,
        "corpus_tokens": {domain: len(tokens) for domain, tokens in train_tokens.items()},
        "held_out_tokens": {domain: len(tokens) for domain, tokens in held_out_tokens.items()},
        "held_out_loss": {domain: round(loss, 4) for domain, loss in losses.items()},
        "unigram_loss": unigram_loss(train_tokens, held_out_tokens),
        "learning_rate": arguments.learning_rate,
        "balance": arguments.balance,
        "z_loss": arguments.z_loss,
        "seed": arguments.seed,
        "torch": torch.__version__,
        "history": history,
    }
    (arguments.export / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {arguments.export}: held-out loss {record['held_out_loss']}")


def unigram_loss(train: dict[str, np.ndarray], held_out: dict[str, np.ndarray]) -> dict[str, float]:
    """Cross-entropy of held-out tokens under the domain's token frequencies: the loss of a model without context."""
    losses = {}
    for domain in DOMAINS:
        counts = np.bincount(train[domain], minlength=VOCABULARY) + 1.0
        losses[domain] = round(float(-np.log(counts / counts.sum())[held_out[domain]].mean()), 4)
    return losses


if __name__ == "__main__":
    main()

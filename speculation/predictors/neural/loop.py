"""The training loop of neural predictors: AdamW, cosine schedule, averaged weights, early stopping, checkpoints, exact resume.

Accelerate does devices, precision and several GPUs; batches are built from whole routes by the predictor. Checkpoints are
safetensors and JSON: a folder may come from somebody else, so nothing in it is ever unpickled.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from profiler.errors import SpecmoeError, first_line
from profiler.trace.writer import write_text
from speculation.data.routes import Routes, RouteSource, each_group
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# In a run's folder, while it is trained.
CHECKPOINTS = "checkpoints"
LOG, BOARD, STATE_FILE = "training.csv", "tensorboard", "state.json"
# Batches for judging a network need no gradients: they may be larger than those for training.
JUDGED_TOKENS = 2048


class Trainable(Protocol):
    """What a predictor gives to `fit_network`: its network, and the loss of some tokens."""

    network: nn.Module

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """Mean loss of the predictions made at these tokens."""
        ...


@dataclass
class _State:
    """Where training is: the step is within the epoch."""

    epoch: int = 0
    step: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    total: float = 0.0
    seconds: float = 0.0
    history: Epochs | None = None


def fit_network(
    model: Trainable,
    train: RouteSource,
    validation: RouteSource | None,
    options: TrainingOptions,
    on_progress: Progress,
    folder: Path | None = None,
) -> Epochs:
    """Train `model.network` in place; it ends with the averaged weights of the best epoch. Returns an entry per epoch.

    folder: for checkpoints and logs; a training that was cut off there goes on where its last checkpoint was, and ends with the
    very weights that it would have had. Raises `SpecmoeError` if the loss is no number.
    """
    from accelerate import Accelerator

    torch.manual_seed(options.seed)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=options.precision or best_precision(),
        gradient_accumulation_steps=options.accumulate,
    )
    tokens_G = _tokens_of_epoch(train, options.epoch_tokens)
    steps = sum(math.ceil(tokens / (options.batch_tokens * accelerator.num_processes)) for tokens in tokens_G)
    if steps * options.epochs < options.accumulate:
        raise SpecmoeError(f"--accumulate {options.accumulate}: the training has only {steps * options.epochs} steps")
    optimizer = torch.optim.AdamW(
        _decay_groups(model.network, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.98)
    )
    updates = math.ceil(steps / options.accumulate) * options.epochs
    averaged = AveragedModel(model.network, accelerator.device, multi_avg_fn=_following(options.average))
    average = averaged.module.requires_grad_(False)
    network, optimizer = accelerator.prepare(model.network, optimizer)
    best = copy.deepcopy(average)
    kept = {"network": accelerator.unwrap_model(network), "average": average, "best": best}
    what = _lasting(options) | {"data": _identity(model, train)}
    state = _resume(accelerator, folder, kept, optimizer, what)
    averaged.n_averaged.fill_((state.epoch * steps + state.step) // options.accumulate)
    schedule = _schedule(optimizer, options, updates, done=int(averaged.n_averaged))
    history = state.history or []
    began = time.monotonic() - state.seconds
    saved = time.monotonic()
    board: Any = None
    while state.epoch < options.epochs:
        network.train()
        # Stays on the device: asking for it would wait for every step.
        total = torch.tensor(state.total, device=accelerator.device)
        for routes, tokens_T in _batches(train, tokens_G, options, state, accelerator):
            with accelerator.accumulate(network), accelerator.autocast():
                loss = model.loss(network, routes, tokens_T)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), options.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            state.step += 1
            if accelerator.sync_gradients:
                averaged.update_parameters(accelerator.unwrap_model(network))
                schedule.step()
            is_due = time.monotonic() - saved > options.checkpoint_seconds
            # Between updates there are gradients that no checkpoint holds.
            if folder is not None and is_due and accelerator.sync_gradients:
                state.total, state.seconds, state.history = float(total), time.monotonic() - began, history
                _save(accelerator, folder, state, kept, optimizer, what)
                saved = time.monotonic()
        entry = {"epoch": state.epoch + 1, "train_loss": float(total) / steps, "seconds": round(time.monotonic() - began, 1)}
        if validation is not None:
            at_once = min(JUDGED_TOKENS, 2 * options.batch_tokens)
            entry["validation_loss"] = mean_loss(model, average, validation, accelerator, at_once)
        if not all(map(math.isfinite, entry.values())):
            raise SpecmoeError(f"training diverged in epoch {state.epoch + 1}: choose a smaller --learning-rate")
        if validation is None or entry["validation_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = entry.get("validation_loss", math.inf), state.epoch
            best.load_state_dict(average.state_dict())
        history.append(entry)
        if folder is not None and accelerator.is_main_process:
            _write_log(folder, history)
            board = board or _open_board(folder, state.epoch + 1)
            _add_to_board(board, entry)
        on_progress(state.epoch + 1, options.epochs, entry)
        out_of_time = options.max_seconds is not None and time.monotonic() - began > options.max_seconds
        if out_of_time or state.epoch - state.best_epoch >= options.patience:
            break
        state.epoch, state.step, state.total = state.epoch + 1, 0, 0.0
    if board is not None:
        board.close()
    # Accelerate wraps the network's `forward` in mixed precision.
    model.network = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    model.network.load_state_dict(best.state_dict())
    return history


@torch.inference_mode()
def mean_loss(
    model: Trainable, network: nn.Module, source: RouteSource, accelerator: Any, at_once: int = JUDGED_TOKENS
) -> float:
    """Mean loss over all tokens of `source`, in the precision of training."""
    network.eval()
    total = 0.0
    for routes in each_group(source):
        for start in range(0, len(routes), at_once):
            tokens_T = np.arange(start, min(start + at_once, len(routes)))
            with accelerator.autocast():
                total += float(model.loss(network, routes, tokens_T)) * len(tokens_T)
    return total / len(source)


def best_precision() -> str:
    """bf16 where the device computes in it, else no mixed precision."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if has_bf16() else "no"


def _tokens_of_epoch(train: RouteSource, epoch_tokens: int | None) -> list[int]:
    """Tokens that an epoch takes of each group: all, or its share of `epoch_tokens`."""
    share = min(1.0, (epoch_tokens or len(train)) / len(train))
    return [max(1, round(tokens * share)) for tokens in train.group_tokens]


def _batches(
    train: RouteSource, tokens_G: list[int], options: TrainingOptions, state: _State, accelerator: Any
) -> Iterator[tuple[Routes, npt.NDArray[np.int64]]]:
    """The routes and tokens of each step from `state.step` on: groups in random order, and so the tokens of each."""
    random = np.random.default_rng([options.seed, state.epoch])
    done, size = state.step, options.batch_tokens * accelerator.num_processes
    for group in random.permutation(len(tokens_G)) if len(tokens_G) > 1 else [0]:
        order_T = random.permutation(train.group_tokens[group])[: tokens_G[group]]
        steps = math.ceil(tokens_G[group] / size)
        for step in range(done, steps):
            yield train.group(group), _share(order_T, step, options.batch_tokens, accelerator)
        done = max(0, done - steps)


def _share(order_T: npt.NDArray[np.int64], step: int, batch: int, accelerator: Any) -> npt.NDArray[np.int64]:
    """The tokens of this step and process; the last step of several processes repeats some from the start."""
    processes = accelerator.num_processes
    start = (step * processes + accelerator.process_index) * batch
    chosen = order_T[start : start + batch]
    return chosen if len(chosen) else order_T[:batch]


def _decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and the scales of norms do not."""
    decaying = [parameter for parameter in network.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in network.parameters() if parameter.ndim < 2]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _cosine(update: int, updates: int, warm_up: float) -> float:
    """The share of the learning rate at this update: it rises from 0 to 1 first, and falls to 0 then."""
    rising = max(1, int(warm_up * updates))
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rising) / max(1, updates - rising))))


def _schedule(optimizer: Any, options: TrainingOptions, updates: int, done: int) -> LambdaLR:
    """The learning rate by update, after `done` of them. On the plain optimizer: Accelerate's would step once per process."""
    plain = getattr(optimizer, "optimizer", optimizer)
    for group in plain.param_groups:
        group["initial_lr"] = options.learning_rate
    return LambdaLR(plain, lambda update: _cosine(update, updates, options.warm_up), last_epoch=done - 1)


def _following(most: float) -> Callable[[Any, Any, Any], None]:
    """How averaged weights follow the network: by 1 / `most` of the way, at first by more.

    At first over the last tenth of what there is: the first weights are of no use.
    """

    @torch.no_grad()
    def follow(average: Any, network: Any, updates: Any) -> None:
        torch._foreach_lerp_(list(average), list(network), max(1 / most, 10 / (10 + int(updates))))

    return follow


def _resume(accelerator: Any, folder: Path | None, kept: dict[str, nn.Module], optimizer: Any, what: dict[str, Any]) -> _State:
    if folder is None or not (folder / CHECKPOINTS / STATE_FILE).is_file():
        return _State()
    try:
        document = json.loads((folder / CHECKPOINTS / STATE_FILE).read_text(encoding="utf-8"))
        if document["of"] != what:
            raise SpecmoeError(
                f"{folder / CHECKPOINTS} is of a training with other options or data: resume with those, or remove it"
            )
        state = _State(**{**document["state"], "best_loss": float(document["state"]["best_loss"])})
        checkpoint = folder / CHECKPOINTS / Path(document["folder"]).name
        device = str(accelerator.device)
        for name, network in kept.items():
            network.load_state_dict(load_file(checkpoint / f"{name}.safetensors", device=device))
        _load_optimizer(optimizer, load_file(checkpoint / "optimizer.safetensors", device=device))
        _load_random(load_file(checkpoint / f"random-{accelerator.process_index}.safetensors"))
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(document["scaler"])
    except SpecmoeError:
        raise
    except Exception as error:  # whatever a broken checkpoint causes
        raise SpecmoeError(
            f"{folder / CHECKPOINTS} cannot be resumed: {first_line(error)}; remove it to start again"
        ) from error
    return state


def _lasting(options: TrainingOptions) -> dict[str, Any]:
    """What must be the same when a training goes on: all but when it stops or saves."""
    return {name: value for name, value in asdict(options).items() if name not in {"max_seconds", "checkpoint_seconds"}}


def _identity(model: Trainable, train: RouteSource) -> str:
    """A digest of the predictor, its task and the routes that it is trained on."""
    digest = hashlib.sha256(repr((type(model).__name__, getattr(model, "shape", None))).encode())
    for routes in each_group(train):
        for array in (routes.expert_ids_TLK, routes.token_keys_T, routes.first_T):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _save(
    accelerator: Any, folder: Path, state: _State, kept: dict[str, nn.Module], optimizer: Any, what: dict[str, Any]
) -> None:
    """Write a checkpoint next to the last, then name it: a kill in between leaves the last one."""
    checkpoint = folder / CHECKPOINTS / f"step-{state.epoch}-{state.step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file(_random_state(), checkpoint / f"random-{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    for name, network in kept.items():
        save_file(network.state_dict(), checkpoint / f"{name}.safetensors")
    save_file(_optimizer_state(optimizer), checkpoint / "optimizer.safetensors")
    progress = {**vars(state), "best_loss": str(state.best_loss)}
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    document = {"folder": checkpoint.name, "state": progress, "scaler": scaler, "of": what}
    write_text(folder / CHECKPOINTS / STATE_FILE, json.dumps(document) + "\n")
    for old in (folder / CHECKPOINTS).glob("step-*"):
        if old != checkpoint:
            shutil.rmtree(old)


def _optimizer_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """AdamW's tensors by the parameter's number: `3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, tensors in state.items() for name, tensor in tensors.items()}


def _load_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        # Where PyTorch counts the updates: on the host, whatever the device.
        state.setdefault(int(number), {})[name] = tensor.cpu() if name == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state() -> dict[str, torch.Tensor]:
    """State of PyTorch's generators; NumPy's are made anew from the seed in every epoch."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _load_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_log(folder: Path, history: Epochs) -> None:
    """All epochs as CSV."""
    with (folder / LOG).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)


def _open_board(folder: Path, epoch: int) -> Any:
    """TensorBoard's log from `epoch` on. What a cut-off training logged beyond its last checkpoint is replaced."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / BOARD), purge_step=epoch, filename_suffix=f".{epoch:05d}")


def _add_to_board(board: Any, entry: dict[str, float]) -> None:
    for name, value in entry.items():
        if name != "epoch":
            board.add_scalar(name, value, int(entry["epoch"]))
    board.flush()

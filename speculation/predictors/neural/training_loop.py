"""The training loop of neural predictors: AdamW, cosine schedule, averaged weights, early stopping, checkpoints, exact resume.

Accelerate handles devices, mixed precision and several GPUs; the predictor builds batches from routes. Checkpoints are
safetensors and JSON: a checkpoint folder may be untrusted, so nothing in it is ever unpickled.
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

from profiler.errors import SpecmoeError, counted, first_line
from profiler.trace.writer import write_text
from speculation.data.routes import Routes, RouteSource, each_group
from speculation.predictors.options import Epochs, Progress, TrainingOptions

# The folder of checkpoints in a run directory; it exists only during training.
CHECKPOINTS = "checkpoints"
LOG, BOARD, STATE_FILE = "training.csv", "tensorboard", "state.json"
# Evaluation needs no gradients, so its batches can be larger than those of training.
EVALUATION_TOKENS = 2048
# What the names of parameters contain that weight decay must leave alone.
UNDECAYED = ("bias", "scale")
# If the number of epochs follows from the amount of data.
MIN_EPOCHS, MAX_EPOCHS = 2, 30


class Trainable(Protocol):
    """What `fit_network` needs of a predictor: its network, and a loss."""

    network: nn.Module

    def loss(self, network: nn.Module, routes: Routes, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """The mean loss of the predictions made at these tokens."""
        ...


@dataclass
class _TrainingState:
    """The progress of a training, as a checkpoint stores it.

    epoch: the current epoch, from 0. step: the number of steps done in it. best_loss, best_epoch: of the best validation so
    far. total: the sum of the losses of this epoch's steps. seconds: training time so far. history: entries of the finished
    epochs.
    """

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
    """Train `model.network` in place and return one entry per epoch. It ends with the averaged weights of the best epoch.

    folder: a folder for checkpoints and logs. An interrupted training continues from the last checkpoint in it, and ends with
    exactly the weights that it would have had without the interruption. Raises `SpecmoeError` if the loss is not finite.
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
    epochs = _epochs(options, sum(tokens_G))
    if steps * epochs < options.accumulate:
        raise SpecmoeError(f"accumulate {options.accumulate}: the training has only {counted(steps * epochs, 'step')}")
    optimizer = torch.optim.AdamW(
        _decay_groups(model.network, options.weight_decay), lr=options.learning_rate, betas=(0.9, 0.98)
    )
    updates = math.ceil(steps / options.accumulate) * epochs
    averaged = AveragedModel(model.network, accelerator.device, multi_avg_fn=_moving_average(options.average))
    average = averaged.module.requires_grad_(False)
    network, optimizer = accelerator.prepare(model.network, optimizer)
    best = copy.deepcopy(average)
    kept = {"network": accelerator.unwrap_model(network), "average": average, "best": best}
    fingerprint = fixed_options(asdict(options)) | {"data": _identity(model, train, validation)}
    state = _resume(accelerator, folder, kept, optimizer, fingerprint)
    averaged.n_averaged.fill_((state.epoch * steps + state.step) // options.accumulate)
    schedule = _schedule(optimizer, options, updates, done=int(averaged.n_averaged))
    history = state.history or []
    began = time.monotonic() - state.seconds
    saved = time.monotonic()
    board: Any = None
    while state.epoch < epochs:
        network.train()
        # Summed on the device: reading the loss in every step would wait for the device.
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
            # Checkpoints do not store accumulated gradients, so save only right after an update.
            if folder is not None and is_due and accelerator.sync_gradients:
                state.total, state.seconds, state.history = float(total), time.monotonic() - began, history
                _save(accelerator, folder, state, kept, optimizer, fingerprint)
                saved = time.monotonic()
        entry = {"epoch": state.epoch + 1, "train_loss": float(total) / steps, "seconds": round(time.monotonic() - began, 1)}
        if validation is not None:
            batch_tokens = min(EVALUATION_TOKENS, 2 * options.batch_tokens)
            entry["validation_loss"] = mean_loss(model, average, validation, accelerator, batch_tokens)
        if not all(map(math.isfinite, entry.values())):
            raise SpecmoeError(f"training diverged in epoch {state.epoch + 1}: choose a smaller learning_rate")
        if validation is None or entry["validation_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = entry.get("validation_loss", math.inf), state.epoch
            best.load_state_dict(average.state_dict())
        history.append(entry)
        if folder is not None and accelerator.is_main_process:
            _write_log(folder, history)
            board = board or _open_board(folder, state.epoch + 1)
            _add_to_board(board, entry)
        on_progress(state.epoch + 1, epochs, entry)
        out_of_time = options.max_seconds is not None and time.monotonic() - began > options.max_seconds
        if out_of_time or state.epoch - state.best_epoch >= options.patience:
            break
        state.epoch, state.step, state.total = state.epoch + 1, 0, 0.0
    if board is not None:
        board.close()
    # Accelerate wrapped the network's `forward` for mixed precision; return it unwrapped.
    model.network = accelerator.unwrap_model(network, keep_fp32_wrapper=False)
    model.network.load_state_dict(best.state_dict())
    return history


@torch.inference_mode()
def mean_loss(
    model: Trainable, network: nn.Module, source: RouteSource, accelerator: Any, batch_tokens: int = EVALUATION_TOKENS
) -> float:
    """The mean loss over all tokens of `source`, in the precision of training."""
    network.eval()
    total = 0.0
    for routes in each_group(source):
        for start in range(0, len(routes), batch_tokens):
            tokens_T = np.arange(start, min(start + batch_tokens, len(routes)))
            with accelerator.autocast():
                total += float(model.loss(network, routes, tokens_T)) * len(tokens_T)
    return total / len(source)


def best_precision() -> str:
    """The mixed precision that suits the device: "bf16" if it supports it natively, else "fp16" on a GPU, "no" on a CPU."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if has_bf16() else "no"


def _tokens_of_epoch(train: RouteSource, epoch_tokens: int | None) -> list[int]:
    """The number of tokens that an epoch takes from each group: all of them, or the group's share of `epoch_tokens`."""
    share = min(1.0, (epoch_tokens or len(train)) / len(train))
    return [max(1, round(tokens * share)) for tokens in train.group_tokens]


def _epochs(options: TrainingOptions, epoch_tokens: int) -> int:
    """The number of epochs, of so many tokens each."""
    if options.epochs is not None:
        return options.epochs
    return min(MAX_EPOCHS, max(MIN_EPOCHS, round(options.seen_tokens / epoch_tokens)))


def _batches(
    train: RouteSource, tokens_G: list[int], options: TrainingOptions, state: _TrainingState, accelerator: Any
) -> Iterator[tuple[Routes, npt.NDArray[np.int64]]]:
    """The routes and tokens of each step from `state.step` on. Groups, and the tokens in each group, are in random order."""
    random = np.random.default_rng([options.seed, state.epoch])
    done, size = state.step, options.batch_tokens * accelerator.num_processes
    for group in random.permutation(len(tokens_G)) if len(tokens_G) > 1 else [0]:
        order_T = random.permutation(train.group_tokens[group])[: tokens_G[group]]
        steps = math.ceil(tokens_G[group] / size)
        for step in range(done, steps):
            yield train.group(group), _share(order_T, step, options.batch_tokens, accelerator)
        done = max(0, done - steps)


def _share(order_T: npt.NDArray[np.int64], step: int, batch: int, accelerator: Any) -> npt.NDArray[np.int64]:
    """The tokens of this step and process.

    In the last step, a process without tokens of its own repeats the first batch, because all processes must take the step.
    """
    processes = accelerator.num_processes
    start = (step * processes + accelerator.process_index) * batch
    chosen = order_T[start : start + batch]
    return chosen if len(chosen) else order_T[:batch]


def _decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: weight decay applies to matrices, not to biases and scales.

    Those of all layers or horizons together have several dimensions, too (`bias_LHE`, `norm_scale`): their names tell.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        own_name = name.rpartition(".")[2]
        groups[parameter.ndim >= 2 and not any(role in own_name for role in UNDECAYED)].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def _cosine(update: int, updates: int, warm_up: float) -> float:
    """The factor of the learning rate at this update: a linear warm-up to 1, then a cosine decay to 0."""
    rising = max(1, int(warm_up * updates))
    if update < rising:
        return (update + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (update - rising) / max(1, updates - rising))))


def _schedule(optimizer: Any, options: TrainingOptions, updates: int, done: int) -> LambdaLR:
    """The schedule of the learning rate, after `done` updates.

    It is attached to PyTorch's optimizer, because Accelerate's scheduler would step once per process.
    """
    plain = getattr(optimizer, "optimizer", optimizer)
    for group in plain.param_groups:
        group["initial_lr"] = options.learning_rate
    return LambdaLR(plain, lambda update: _cosine(update, updates, options.warm_up), last_epoch=done - 1)


def _moving_average(window: float) -> Callable[[Any, Any, Any], None]:
    """An exponential moving average of the weights over about `window` updates, for `AveragedModel`.

    Early in training it covers about the last tenth of the updates so far, because the first weights are of no use.
    """

    @torch.no_grad()
    def update(average: Any, network: Any, updates: Any) -> None:
        torch._foreach_lerp_(list(average), list(network), max(1 / window, 10 / (10 + int(updates))))

    return update


def _resume(
    accelerator: Any, folder: Path | None, kept: dict[str, nn.Module], optimizer: Any, fingerprint: dict[str, Any]
) -> _TrainingState:
    """Load the last checkpoint in `folder`, if there is one. Raises `SpecmoeError` if it belongs to another training."""
    if folder is None or not (folder / CHECKPOINTS / STATE_FILE).is_file():
        return _TrainingState()
    try:
        document = json.loads((folder / CHECKPOINTS / STATE_FILE).read_text(encoding="utf-8"))
        if document["of"] != fingerprint:
            raise SpecmoeError(
                f"{folder / CHECKPOINTS} is from a training with other options or data: resume with those, or remove it"
            )
        state = _TrainingState(**{**document["state"], "best_loss": float(document["state"]["best_loss"])})
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
    except Exception as error:  # a broken checkpoint can raise anything
        raise SpecmoeError(
            f"{folder / CHECKPOINTS} cannot be resumed: {first_line(error)}; remove it to start again"
        ) from error
    return state


def fixed_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that must be the same when a training is resumed: all but those on when it stops or saves."""
    return {name: value for name, value in options.items() if name not in {"max_seconds", "checkpoint_seconds"}}


def _identity(model: Trainable, train: RouteSource, validation: RouteSource | None) -> str:
    """A digest of the predictor, its task, and all that it sees of the tokens that it is trained on and validated with."""
    digest = hashlib.sha256(repr((type(model).__name__, getattr(model, "shape", None))).encode())
    for source in (train, validation):
        digest.update(b"none" if source is None else str(source.group_tokens).encode())
        for routes in () if source is None else each_group(source):
            arrays: list[npt.NDArray[Any]] = [routes.expert_ids_TLK, routes.weights_TLK]
            arrays += [routes.token_ids_T, routes.token_keys_T, routes.first_T]
            if routes.router is not None:
                arrays += [routes.router.hidden_TLD, routes.router.weight_LED]
            for array in arrays:
                digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _save(
    accelerator: Any,
    folder: Path,
    state: _TrainingState,
    kept: dict[str, nn.Module],
    optimizer: Any,
    fingerprint: dict[str, Any],
) -> None:
    """Write a checkpoint next to the previous one, then point the state file to it.

    If the process is killed in between, the previous checkpoint is still valid.
    """
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
    document = {"folder": checkpoint.name, "state": progress, "scaler": scaler, "of": fingerprint}
    write_text(folder / CHECKPOINTS / STATE_FILE, json.dumps(document) + "\n")
    for old in (folder / CHECKPOINTS).glob("step-*"):
        if old != checkpoint:
            shutil.rmtree(old)


def _optimizer_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """AdamW's tensors, named by the index of their parameter: `3.exp_avg`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, tensors in state.items() for name, tensor in tensors.items()}


def _load_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        # PyTorch keeps the count of updates on the host, regardless of the device.
        state.setdefault(int(number), {})[name] = tensor.cpu() if name == "step" else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _random_state() -> dict[str, torch.Tensor]:
    """The state of PyTorch's random generators. NumPy's need none: each epoch creates its own from the seed."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _load_random(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _write_log(folder: Path, history: Epochs) -> None:
    """Write the entries of all epochs as CSV."""
    with (folder / LOG).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)


def _open_board(folder: Path, epoch: int) -> Any:
    """TensorBoard's log from `epoch` on. It replaces what an interrupted training logged after its last checkpoint."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder / BOARD), purge_step=epoch, filename_suffix=f".{epoch:05d}")


def _add_to_board(board: Any, entry: dict[str, float]) -> None:
    for name, value in entry.items():
        if name != "epoch":
            board.add_scalar(name, value, int(entry["epoch"]))
    board.flush()

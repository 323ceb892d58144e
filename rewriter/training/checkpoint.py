"""Checkpoints: the tuned tensors, the optimiser's state by name, the schedules' state and what else a run goes on from.

Tensors are safetensors, all else is JSON; no pickle.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters.store import check_origins, origins
from ..errors import SubspanError, reason
from ..files import aside, digest, load_into, load_tensors, read_json, remove, save_tensors
from ..tuned import TunedModel, tuned_parameters
from .parallel import each, processes
from .schedules import NOW, Budget, Sizes

TUNED, OPTIMISER, BUDGET, STATE = ("tuned.safetensors", "optimizer.safetensors", "budget.safetensors", "state.json")
PREDICTIONS = "predictions.safetensors"
EARLIER = "trainer_state.json"  # Where versions up to 0.1 kept the step and the log.


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        history: the log so far, an entry a line.
        losses: sums since the last entry: of the steps' losses, of the penalties, each by name.
        since: steps in these sums.
        seconds: that the run took until it last started.
        random: the states of the generators, by device, to go on with; None for those of now.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    since: int = 0
    seconds: float = 0.0
    random: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Tuning:
    """What a checkpoint is taken from, and what it is put back into; of which spec, and what else it is tied to."""

    model: TunedModel
    optimiser: torch.optim.Optimizer
    schedule: Any
    scaler: torch.amp.GradScaler
    budget: Budget
    spec: dict[str, Any]
    tied: Mapping[str, str]


def save_predictions(found: np.ndarray, folder: Path) -> None:
    """Write what the metric was measured by, (n, k) float64 in the order of the rows, into a run's folder.

    Raises:
        OSError: no space, no permission.
    """
    with aside(folder / PREDICTIONS) as (place,):
        save_tensors({"predictions": torch.from_numpy(found)}, place)


def load_predictions(folder: Path) -> np.ndarray | None:
    """What `save_predictions` wrote; None for runs that kept none.

    Raises:
        SubspanError: the file is not whole.
    """
    file = folder / PREDICTIONS
    if not file.exists():
        return None
    found = load_tensors(file).get("predictions")
    if found is None or found.ndim != 2:
        raise SubspanError(f"{file}: not the predictions of a run")
    return found.numpy()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"checkpoint-{step}"


def save(tuning: Tuning, progress: Progress, folder: Path, keep: int, best: int | None = None) -> None:
    """Write a checkpoint, whole or not at all, and remove all but the newest `keep` and the one of the step `best`.

    All processes call it, the main one writes.
    """
    random = {device: each(value.to(processes().device)).cpu() for device, value in _random().items()}
    if processes().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": progress.step,
            "history": progress.history,
            "losses": progress.losses,
            "since": progress.since,
            "seconds": progress.seconds,
            "random": {device: bytes(values[0].tolist()).hex() for device, values in random.items()},
            "others": [
                {d: bytes(v[i].tolist()).hex() for d, v in random.items()} for i in range(1, len(random["cpu"]))
            ],
            "schedule": tuning.schedule.state_dict(),
            "scaler": tuning.scaler.state_dict(),
            "given": tuning.model.plan.given,
            "transforms": origins(tuning.model.plan),
            "spec": _digest(tuning.spec),
            "tied": dict(tuning.tied),
        }
        flat = _by_name(tuning.model, tuning.optimiser)
        tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        state["optimiser"] = {n: v for n, v in flat.items() if n.startswith("state.") and n not in tensors}
        with aside(place_of(folder, progress.step)) as (place,):
            place.mkdir()
            save_tensors(tuned_parameters(tuning.model), place / TUNED)
            save_tensors(tensors, place / OPTIMISER)
            save_tensors(tuning.budget.state(), place / BUDGET)
            state["files"] = {name: digest(place / name) for name in (TUNED, OPTIMISER, BUDGET)}
            (place / STATE).write_text(json.dumps(state | {"digest": _digest(state)}))
        for old in checkpoints(folder)[:-keep]:
            if best is None or old != place_of(folder, best):
                remove(old)
    processes().wait_for_everyone()


def load(tuning: Tuning, place: Path) -> Progress:
    """Go on from a checkpoint; the generators' states are in the result, to be set when the data is ready.

    Raises:
        SubspanError: it is of another model, or not whole.
    """
    try:
        return _load(tuning, place, _state(place))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = f"{place}: not a whole checkpoint ({reason(error)})"
        raise SubspanError(f"{said}; delete it to go on before it") from error


def _state(place: Path) -> dict[str, Any]:
    """What a checkpoint says in JSON.

    Raises:
        SubspanError: it, or a file beside it, is not as it was written.
    """
    state = read_json(place / STATE, constants=True)  # A schedule may start from infinity.
    files = state.get("files", {})
    if not isinstance(files, dict):
        raise SubspanError(f"{place / STATE}: not as it was written; delete that checkpoint to go on before it")
    changed = [name for name, was in files.items() if digest(place / name) != was]
    if "digest" in state and state["digest"] != _digest(state):
        changed.append(STATE)
    if changed:
        raise SubspanError(f"{place / changed[0]}: not as it was written; delete that checkpoint to go on before it")
    return state


def _digest(state: dict[str, Any]) -> str:
    kept = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _load(tuning: Tuning, place: Path, state: dict[str, Any]) -> Progress:
    if state.get("spec") not in (None, _digest(tuning.spec)):
        raise SubspanError(f"{place / STATE}: written by a run of another spec than spec.yaml has now; set it back")
    if changed := [name for name, was in state.get("tied", {}).items() if tuning.tied.get(name, was) != was]:
        said = f"{place / STATE}: the run had another {changed[0]} until now"
        raise SubspanError(f"{said}; put it back, or start anew with --overwrite")
    load_weights(tuning, place)
    _load_optimiser(tuning, load_tensors(place / OPTIMISER), state.get("optimiser", {}))
    tuning.schedule.load_state_dict(state.get("schedule") or state["scheduler"])
    # The schedule's own state has the rates; the optimiser's groups were made anew.
    for group, rate in zip(tuning.optimiser.param_groups, tuning.schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    if state["scaler"]:
        tuning.scaler.load_state_dict(state["scaler"])
    if "step" not in state:
        earlier = read_json(place / EARLIER)
        return Progress(earlier["global_step"], earlier["log_history"], random=_unhex(state["random"]))
    number = processes().process_index
    others = [state["random"], *state["others"]]
    known = number < len(others)
    if not known:
        torch.manual_seed(state["step"] * 1_000_003 + number)
    losses = {name: value if number == 0 else 0.0 for name, value in state["losses"].items()}  # They are of all.
    step, history, since, seconds = (state[name] for name in ("step", "history", "since", "seconds"))
    return Progress(step, history, losses, since, seconds, _unhex(others[number]) if known else None)


def load_weights(tuning: Tuning, place: Path) -> None:
    """Put back the tuned tensors and the schedules' state alone."""
    load_into(tuned_parameters(tuning.model), place / TUNED)
    tuning.budget.load(load_tensors(place / BUDGET))


def _by_name(
    model: TunedModel, optimiser: torch.optim.Optimizer, written: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The optimiser's state by the names of its parameters, which `written` is put into."""
    from torch.distributed.checkpoint import state_dict  # Half as long to import as torch: not before the first step.

    options = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    found = state_dict.get_optimizer_state_dict(model, optimiser, options=options)
    if written is not None:
        state_dict.set_optimizer_state_dict(model, optimiser, {**found, **written}, options=options)
    return found


def _load_optimiser(tuning: Tuning, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    model, optimiser = tuning.model, tuning.optimiser
    if not any(name.startswith("state.") for name in tensors) and not numbers:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():  # Up to 0.1: by number.
            index, _, key = name.partition(".")
            if index.isdigit():
                state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        return
    written = {**tensors, **numbers}
    _by_name(model, optimiser, written)
    for name, parameter in model.named_parameters():  # What no gradient had reached yet has no state.
        if parameter in optimiser.state and not any(key.startswith(f"state.{name}.") for key in written):
            del optimiser.state[parameter]


def _random() -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _unhex(states: dict[str, str]) -> dict[str, Tensor]:
    return {device: torch.tensor(list(bytes.fromhex(value)), dtype=torch.uint8) for device, value in states.items()}


def set_random(states: dict[str, Tensor]) -> None:
    """Set the generators' states, by device."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def resumed_choices(folder: Path) -> tuple[Sizes | None, dict[str, Tensor]] | None:
    """What schedules had chosen when the newest checkpoint in a folder was written; None without a checkpoint.

    Returns:
        The sizes by name of the transform (None: the checkpoint is of a version that did not keep them), and the chosen
        tensors by leaf.

    Raises:
        SubspanError: it was written with other transforms than there are here.
    """
    last = checkpoints(folder)[-1:]
    if not last:
        return None
    written, state = _state(last[0]), load_tensors(last[0] / BUDGET)
    check_origins(last[0] / STATE, written.get("transforms", {}))
    return written.get("given"), {name.removesuffix(NOW): value for name, value in state.items() if name.endswith(NOW)}

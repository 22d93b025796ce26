"""Which backend runs an operator: decided from data, with the reason why each other was refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from retrofit.runtime.devices import pick_device
from retrofit.runtime.errors import ConfigError, UnsupportedError, suggest

Support = tuple[bool, str]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A call, as far as the choice of a backend depends on it.

    Attributes:
        device: Device type, `cpu` or `cuda`.
        dtype: Of query, key and value.
        head_dim: Of query and key.
        num_tokens: The longer of the two sequences.
        is_strided: Whether the last axis of a tensor is not contiguous.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    num_tokens: int = 1
    is_strided: bool = False


# Operator -> what each backend says to a call, in order of preference.
OPERATORS: dict[str, Callable[[Probe], Mapping[str, Support]]] = {}


def choose_backend(operator: str, probe: Probe, wanted: str | None = None) -> str:
    """The backend that runs a call.

    The argument goes before `RETROFIT_BACKEND`; either forces one. Without them it is the first
    that can run the call.

    Raises:
        ConfigError: If no backend has the name that was asked for.
        UnsupportedError: If the one that was asked for, or none at all, can run the call.
    """
    forced = forced_backend(operator, wanted)
    answers = OPERATORS[operator](probe)
    if forced is None:
        for name, (is_usable, _) in answers.items():
            if is_usable:
                return name
    elif answers[forced][0]:
        return forced
    asked = forced or "a backend"
    told = "; ".join(
        f"{name}: {reason}" for name, (_, reason) in answers.items() if forced in (None, name)
    )
    raise UnsupportedError(
        f"{operator}: expected {asked} to run this call, got a refusal ({told}). "
        "Leave `backend` out and RETROFIT_BACKEND unset."
    )


def forced_backend(operator: str, wanted: str | None = None) -> str | None:
    """The backend that the argument or `RETROFIT_BACKEND` names, None where neither does.

    A name in `RETROFIT_BACKEND` that only other operators have does not concern this one.

    Raises:
        ConfigError: If the operator has no backend of the name that the argument gives, or no
            operator has that of `RETROFIT_BACKEND`.
    """
    name = wanted or os.environ.get("RETROFIT_BACKEND") or None
    if name is None:
        return None
    own = _backend_names(operator)
    if name in own:
        return name
    everywhere = {other for each in OPERATORS for other in _backend_names(each)}
    if not wanted and name in everywhere:
        return None
    source, names = ("backend", own) if wanted else ("RETROFIT_BACKEND", everywhere)
    raise ConfigError(
        f"{operator}: expected {source} to name a backend, got {name!r}. {suggest(name, names)}"
    )


def _backend_names(operator: str) -> Iterable[str]:
    return OPERATORS[operator](Probe(device="meta", dtype=torch.float32, head_dim=1))


def explain(
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    num_tokens: int = 4096,
) -> list[dict[str, Any]]:
    """What every backend of every operator says to a call, for `retrofit doctor`.

    Args:
        device: Device type; the accelerator where there is one when None.
        dtype: Of the tensors.
        head_dim: Of query and key.
        num_tokens: Sequence length.

    Returns:
        One row per operator and backend, in order of preference: `operator`, `backend`,
        `is_usable`, `reason` (why not; empty where usable), `is_chosen`, and the call's
        `device`, `dtype`, `head_dim`, `num_tokens`.
    """
    device = device or pick_device(None)
    probe = Probe(device=device, dtype=dtype, head_dim=head_dim, num_tokens=num_tokens)
    call = {**asdict(probe), "dtype": str(dtype).removeprefix("torch.")}
    del call["is_strided"]
    rows: list[dict[str, Any]] = []
    for operator, ask in sorted(OPERATORS.items()):
        forced = forced_backend(operator)
        is_open = True
        for name, (is_usable, reason) in ask(probe).items():
            is_chosen = is_usable and is_open and forced in (None, name)
            is_open = is_open and not is_chosen
            rows.append(
                {
                    "operator": operator,
                    "backend": name,
                    "is_usable": is_usable,
                    "reason": "" if is_usable else reason,
                    "is_chosen": is_chosen,
                    **call,
                }
            )
    return rows


def backends(operator: str, **call: Any) -> dict[str, Support]:
    """What each backend of one operator says to a call, in order of preference.

    Args:
        operator: Name of a public function, `block_sparse_attention` for example.
        **call: As for `explain`.

    Raises:
        ConfigError: If there is no such operator.
    """
    if operator not in OPERATORS:
        raise ConfigError(
            f"backends: expected the name of an operator, got {operator!r}. "
            f"{suggest(operator, OPERATORS)}"
        )
    rows = [row for row in explain(**call) if row["operator"] == operator]
    return {row["backend"]: (row["is_usable"], row["reason"]) for row in rows}

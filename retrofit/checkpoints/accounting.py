"""Where every tensor of a checkpoint's files goes: into a network, or nowhere, and then why.

Only headers are read: networks are built on the meta device, and the libraries' own renaming runs
on tensors without numbers.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from retrofit.checkpoints.components import build_component
from retrofit.checkpoints.layouts import Checkpoint
from retrofit.checkpoints.libraries import LIBRARIES
from retrofit.checkpoints.quantization import quantization_of
from retrofit.checkpoints.read_past import tensors_read_past
from retrofit.checkpoints.scales import is_scale, refuse_scales
from retrofit.checkpoints.single_file import OPTIONAL, convert
from retrofit.checkpoints.tracing import sources_of, trace_header
from retrofit.checkpoints.warned import collecting_warnings
from retrofit.checkpoints.weights import Weights, read_header
from retrofit.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)
LISTED = 3  # tensors in a message
ADAPTER = re.compile(r"(^|[._])(lora|loha|lokr|hada|dora)_")
TOGETHER = "Fetch config and weights again, together."
REASONS = {
    r"(^|\.)model_ema\.": "an average that only training needs",
    r"(position_ids|inv_freq|num_batches_tracked|masked_bias|attn\.bias)$": "computed, not learned",
    r"^(model\.)?(betas|alphas|sqrt_|log_one_|posterior_|lvlb_|logvar|global_step|v_pred|ztsnr)": (
        "a schedule, which the scheduler's config gives"
    ),
}


@dataclass(kw_only=True)
class Account:
    """What becomes of the tensors of one network.

    Attributes:
        network: Built without weights.
        missing: Names that no file has.
        unexpected: Names, as the network would call them, for which it has no part.
        mismatched: Name, expected shape, stored shape.
        placed: Names in the files of what it takes.
    """

    network: nn.Module
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    placed: set[str] = field(default_factory=set)


def check_tensors(
    checkpoint: Checkpoint, weights: Mapping[str, Weights], *, trust_remote_code: bool = False
) -> None:
    """Refuse files that don't hold what the networks need, and name in a note what is unused.

    Args:
        checkpoint: Where the configs lie.
        weights: Files by component, as `check_weights` found them.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If tensors are missing or of another shape, or some would be left out that
            change what the network computes: layers, scales, low-rank matrices.
    """
    if checkpoint.file is not None and checkpoint.layout == "single-file":
        refuse_scales(checkpoint.file)
    unused: dict[str, str] = {}
    placed: set[str] = set()
    for component, found in weights.items():
        account = _account(checkpoint, component, found, trust_remote_code)
        if account is None:
            unused |= dict.fromkeys(_read_past(checkpoint), "no part of the network")
            continue
        where = f"{checkpoint.name}: {component + '.' if component else ''}"
        _refuse(where, account)
        placed |= account.placed
        if checkpoint.file is None:
            unused |= _explain(component, account)
    if checkpoint.file is not None and placed:
        rest = [name for name in read_header(checkpoint.file) if name not in placed]
        refuse_adapters(checkpoint.name, rest)
        unused |= {name: _reason(name, "no part of the network") for name in rest}
    _note(checkpoint.name, unused)


def refuse_adapters(where: str, unused: Iterable[str]) -> None:
    """Refuse low-rank matrices beside weights: what they change would be left out.

    Raises:
        CheckpointError: If there are some.
    """
    found = sorted(name for name in unused if ADAPTER.search(name))
    if found:
        raise CheckpointError(
            f"{where}: holds {len(found)} tensors of a LoRA beside its weights ({_first(found)}), "
            "which no loader adds to them. Merge the LoRA and save again, or fetch the plain "
            "weights; `retrofit generate --lora` adds one from its own file."
        )


def _account(
    checkpoint: Checkpoint, component: str, weights: Weights, trust_remote_code: bool
) -> Account | None:
    """None where the loader itself refuses what it can't place."""
    library, _ = checkpoint.classes[component]
    if library == "retrofit" or library not in LIBRARIES:
        return None
    if quantization_of(checkpoint.config(component)) is not None:
        return None  # names and shapes are its library's own
    import torch

    if checkpoint.file is not None and component in OPTIONAL:
        return None
    with torch.device("meta"):
        network = build_component(checkpoint, component, trust_remote_code)
    if checkpoint.file is not None:
        return _account_single(checkpoint, component, network)
    stored = {k: v.shape for file in weights.files for k, v in read_header(file).items()}
    account = Account(network=network, placed=set(stored))
    if library == "transformers":
        return _account_transformers(account, stored)
    tensors = trace_header(stored)
    network._fix_state_dict_keys_on_load(tensors)
    _compare(account, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return account


def _account_transformers(account: Account, stored: Mapping[str, tuple[int, ...]]) -> Account:
    """As the library itself says, on tensors without numbers."""
    network: Any = account.network
    import torch

    with collecting_warnings():
        _, said = type(network).from_pretrained(
            None,
            config=network.config,
            state_dict={k: torch.empty(v, device="meta") for k, v in stored.items()},
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    account.missing = sorted(said["missing_keys"])
    account.unexpected = sorted(said["unexpected_keys"])
    shapes = {name: (tuple(mine), tuple(got)) for name, got, mine in said["mismatched_keys"]}
    account.mismatched = [(k, *shapes[k]) for k in network.state_dict() if k in shapes]
    return account


def _account_single(checkpoint: Checkpoint, component: str, network: nn.Module) -> Account:
    assert checkpoint.file is not None  # noqa: S101 - the caller has looked
    shapes = {name: info.shape for name, info in read_header(checkpoint.file).items()}
    converted = convert(checkpoint, component, network, trace_header(shapes))
    account = Account(network=network)
    _compare(account, {name: tuple(tensor.shape) for name, tensor in converted.items()})
    expected = network.state_dict()
    for name, tensor in converted.items():
        if name in expected:
            account.placed |= sources_of(tensor)
    return account


def _compare(account: Account, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Fill in what differs between a network and the files' tensors under its names."""
    expected = {k: tuple(v.shape) for k, v in account.network.state_dict().items()}
    ignored = getattr(account.network, "_keys_to_ignore_on_load_unexpected", None) or ()
    account.missing = sorted(expected.keys() - stored.keys())
    account.unexpected = sorted(
        name
        for name in stored.keys() - expected.keys()
        if not any(re.search(pattern, name) for pattern in ignored)
    )
    account.mismatched = [
        (name, shape, stored[name])
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]


def _refuse(where: str, account: Account) -> None:
    """Refuse what would give another network than the one that was saved.

    Raises:
        CheckpointError: With the first few names.
    """
    scales = [name for name in account.unexpected if is_scale(name)]
    if scales:
        raise CheckpointError(
            f"{where}holds scales of float8 weights ({_first(scales)}) that its config does not "
            "name, so that no loader multiplies by them. Fetch the checkpoint in bfloat16."
        )
    refuse_adapters(where.rstrip(": ."), account.unexpected)
    _refuse_layers(where, account)
    if account.mismatched:
        name, expected, got = account.mismatched[0]
        others = ", ".join(other for other, _, _ in account.mismatched[1:LISTED])
        count = len(account.mismatched) - 1
        more = f" ({count} more, such as {others})" if others else ""
        raise CheckpointError(
            f"{where}{name}: expected shape {list(expected)} as its config says, got {list(got)} "
            f"in its weights{more}. They are of two models: {TOGETHER[0].lower()}{TOGETHER[1:]}"
        )
    if account.missing and len(account.missing) == len(account.network.state_dict()):
        raise CheckpointError(
            f"{where.rstrip(': .')}: its weights lack all of this network, which its config lists. "
            "Fetch the whole checkpoint, or give configs (`--config`) of what the file holds."
        )
    if account.missing:
        raise CheckpointError(
            f"{where.rstrip(': .')}: its weights lack {len(account.missing)} tensors that its "
            f"config asks for ({_first(account.missing)}). Fetch the checkpoint again."
        )


def _refuse_layers(where: str, account: Account) -> None:
    """Refuse a config of fewer layers than the files hold.

    Raises:
        CheckpointError: With both numbers.
    """
    known = {*account.network.state_dict()}
    prefix = getattr(account.network, "base_model_prefix", "") or " "
    for stored in account.unexpected:
        name = stored.removeprefix(f"{prefix}.")
        for match in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            before, after = name[: match.start()], name[match.end() :]
            if f"{before}0{after}" not in known:
                continue
            number = re.compile(re.escape(before) + r"(\d+)\.")
            sizes = [
                1 + max(int(m[1]) for key in names if (m := number.match(key)))
                for names in (known, [k.removeprefix(f"{prefix}.") for k in account.unexpected])
            ]
            raise CheckpointError(
                f"{where}{before.rstrip('.')}: expected {sizes[0]} layers as its config says, got "
                f"{sizes[1]} in its weights. {TOGETHER}"
            )


def _explain(component: str, account: Account) -> dict[str, str]:
    """Why the tensors that a network has no part for are left out."""
    prefix = f"{component}/" if component else ""
    reason = f"no part of {type(account.network).__name__}"
    return {prefix + name: _reason(name, reason) for name in account.unexpected}


def _reason(name: str, otherwise: str) -> str:
    return next((why for form, why in REASONS.items() if re.search(form, name)), otherwise)


def _read_past(checkpoint: Checkpoint) -> list[str]:
    return [name for name in tensors_read_past(checkpoint) if not name.endswith(".*")]


def _note(where: str, unused: Mapping[str, str]) -> None:
    """Name what is unused, by reason."""
    said = []
    for reason, count in Counter(unused.values()).items():
        names = [name for name, why in unused.items() if why == reason]
        said.append(
            f"{_first(names)} ({count}: {reason})" if count > 1 else f"{names[0]} ({reason})"
        )
    if said:
        logger.warning("note: %s: unused in its files: %s", where, "; ".join(said))


def _first(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")

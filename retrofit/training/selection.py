"""What learns: everything, attention modules, LoRA layers in them, or a method's own parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from retrofit.layout.sites import LEARNED
from retrofit.patching.patch import Patch
from retrofit.runtime.errors import InputError, UnsupportedError
from retrofit.training.request import FinetuneRequest

ADAPTER = "retrofit"  # name of the LoRA adapter


def select(network: nn.Module, patch: Patch, request: FinetuneRequest) -> dict[str, nn.Parameter]:
    """Make ready what learns, and freeze everything else.

    Args:
        network: The patched network, changed in place: LoRA layers are put into it.
        patch: Its patch.
        request: Says what learns.

    Returns:
        The parameters that learn, by their name in the network.

    Raises:
        InputError: If there is nothing that could learn.
    """
    network.requires_grad_(False)
    if request.train == "lora":
        _add_lora(network, patch, request.rank)
    chosen = {
        name: parameter
        for name, parameter in network.named_parameters()
        if _learns(name, patch, request.train)
    }
    if not chosen:
        raise InputError(f"--train {request.train}: nothing in the network learns. Take all.")
    for parameter in chosen.values():
        parameter.requires_grad_(True)
        if not parameter.dtype.is_floating_point:
            raise UnsupportedError(
                f"--train {request.train}: the weights are {parameter.dtype}, which can't learn. "
                "Take --train lora, or a checkpoint in a float dtype."
            )
    return chosen


def adapter_config(network: nn.Module) -> Any:
    """The peft config of the adapter that `select` put in."""
    return vars(network)["peft_config"][ADAPTER]


def _learns(name: str, patch: Patch, train: str) -> bool:
    is_gate = f".{LEARNED}." in f".{name}"
    if train == "gates" or is_gate:
        return train == "gates" and is_gate
    if train == "lora":
        return f".{ADAPTER}." in name and "lora_" in name
    return train == "all" or any(name.startswith(f"{path}.") for path in _attention(patch))


def _attention(patch: Patch) -> list[str]:
    return [site.site.path for site in patch.sites.values()]


def _add_lora(network: nn.Module, patch: Patch, rank: int) -> None:
    """LoRA layers (https://arxiv.org/abs/2106.09685) in every linear layer of patched attention."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UnsupportedError(
            "--train lora: needs peft, which is not installed: pip install peft"
        ) from error
    targets = [
        f"{path}.{name}"
        for path in _attention(patch)
        for name, part in network.get_submodule(path).named_modules()
        if isinstance(part, nn.Linear)
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True)
    inject_adapter_in_model(config, network, adapter_name=ADAPTER)
    vars(network)["peft_config"] = {ADAPTER: config}

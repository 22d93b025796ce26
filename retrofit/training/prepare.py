"""A network and its batches made ready for training, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from retrofit.families.training import Step
from retrofit.runtime.errors import InputError, UnsupportedError
from retrofit.training.request import FinetuneRequest


def silence_dropout(network: nn.Module, *, checkpointing: bool) -> Callable[[], None]:
    """Train as the network is used: without dropout, which the patched attention can't have.

    Args:
        network: Changed in place.
        checkpointing: Whether activations are computed again in the backward, which some networks
            do in training mode only.

    Returns:
        What puts the network back into use.
    """
    dropouts = {module: module.p for module in network.modules() if isinstance(module, nn.Dropout)}
    for module in dropouts:
        module.p = 0.0
    network.train(checkpointing)

    def put_back() -> None:
        network.eval()
        for module, p in dropouts.items():
            module.p = p
        network.requires_grad_(False)

    return put_back


def cut_batch(step: Step, part: slice, device: Any) -> Step:
    """Some samples of a batch, on a device."""

    def place(value: Any, part: slice) -> Any:
        if isinstance(value, dict):
            return {name: place(item, part) for name, item in value.items()}
        return value[part].to(device) if isinstance(value, Tensor) else value

    return Step(
        arguments=place(step.arguments, part),
        target=place(step.target, part),
        weight=place(step.weight, part),
        shared=place(step.shared, slice(None)),
    )


def refuse_sharding(accelerator: Any, request: FinetuneRequest) -> None:
    """Refuse what does not run on several processes.

    Raises:
        InputError: If it is asked for.
    """
    kind, world = accelerator.distributed_type.value, accelerator.num_processes
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UnsupportedError(
            f"{kind}: weights that are cut up between processes can't be trained here, as the "
            "frozen teacher shares them. Run with plain data parallelism: --num-processes N."
        )
    if world > 1 and request.train == "gates":
        raise UnsupportedError("--train gates: runs on one process, got several. Start one.")
    if request.batch % (world * request.grad_accum):
        raise InputError(
            f"--batch {request.batch}: does not divide over {world} processes with --grad-accum "
            f"{request.grad_accum}. Give a multiple of {world * request.grad_accum}."
        )


def checkpoint_activations(network: nn.Module) -> None:
    """Let a network compute its activations again in the backward.

    Raises:
        UnsupportedError: If it can't.
    """
    for name in ("enable_gradient_checkpointing", "gradient_checkpointing_enable"):
        if hasattr(network, name):
            getattr(network, name)()
            return
    raise UnsupportedError(
        f"--checkpointing: {type(network).__name__} has none. Leave it out, or raise --grad-accum."
    )

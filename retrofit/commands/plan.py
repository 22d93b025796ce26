"""`retrofit plan`: what patching would bring on this machine, before anything is patched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import (
    count,
    format_bytes,
    print_json,
    print_lines,
    print_table,
    result,
    stages,
)

if TYPE_CHECKING:
    from retrofit.profiling.cost.network_plan import Cost, NetworkPlan
    from retrofit.profiling.cost.plan import Plan

SIZE = "What it would run on"
KIND_NAMES = {
    "attention": "dense attention",
    "sparse": "sparse attention",
    "product": "matrix products",
    "convolution": "convolutions",
    "memory": "moving memory",
    "calls": "Python between them",
}


def run(
    model: options.Model,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    component: options.Components = None,
    config: options.Config = "",
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Pixels of a picture, video or view.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", help="Frames of a video, views of a scene.", rich_help_panel=SIZE),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Length of a text.", rich_help_panel=SIZE)
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            "--steps", help="Denoising steps of a run, for a diffusion model.", rich_help_panel=SIZE
        ),
    ] = 20,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    r"""Predict time and memory, dense against patched, and whether patching helps at all.

    Reads configs only: the model is not loaded. A few seconds of measurement tell how fast this
    machine runs operations of its shapes. Times are for one call, batch 1, as a mean over the
    denoising steps of a run.

    [bold]Examples[/bold]

    $ retrofit plan sd15/ --method window --size 512x512
    unet: one call of 64x64 latents, 4096 tokens, float32 on CPU, AMD EPYC, 2 threads
    ...
    window will not help here (1.03x): attention takes 9% of a dense call, and doing none of it
    would give 1.10x. Break-even is near 2100 tokens.

    $ retrofit plan minilm/ -m block-sparse --tokens 512
    $ retrofit plan wan/ -m freeswim --size 1920x1080 --frames 81 --json

    [bold]In Python[/bold]

    from retrofit.profiling.cost.plan import Request, plan_checkpoint
    plan_checkpoint(find_checkpoint("sd15/"), Request(what="window", ...)).networks[0].speed
    """
    options.set_threads(threads)
    what = options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    width, height = options.read_size(size)
    for name, value in {"frames": frames, "tokens": tokens, "steps": steps}.items():
        options.require_positive(name, value)

    from retrofit.checkpoints import find_checkpoint
    from retrofit.profiling.cost.plan import Request, plan_checkpoint
    from retrofit.profiling.inspection import AskedSize
    from retrofit.runtime.devices import pick_device

    request = Request(
        what=what,
        parameters=parameters,
        asked=AskedSize(width=width, height=height, frames=frames, tokens=tokens),
        sites=tuple(sites or ()),
        components=tuple(component or ()),
        steps=steps,
        device=pick_device(device),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    checkpoint = find_checkpoint(model, weights=False, config=config)
    with stages() as advance:
        plan = plan_checkpoint(checkpoint, request, progress=advance)
    if json:
        print_json(_as_json(plan))
        return
    for network in plan.networks:
        _print(plan, network)


def _print(plan: Plan, network: NetworkPlan) -> None:
    from retrofit.families import FAMILIES
    from retrofit.profiling.cost.network_plan import exact_words, kept_words, verdict

    machine = _machine(plan)
    print_lines(
        f"{network.name or network.family}: one call of {_size(network)}, "
        f"{plan.dtype} on {machine['device']}, {count(machine['threads'], 'thread')}"
        + (f", mean of {plan.steps} steps" if plan.steps > 1 else ""),
        "",
    )
    columns = {"dense": network.dense, plan.recipe.methods: network.patched}
    if network.exact is not None:
        columns["exact"] = network.exact
    rows = [
        (KIND_NAMES[kind], *(_seconds(cost.seconds[kind]) for cost in columns.values()))
        for kind in KIND_NAMES
        if any(cost.seconds[kind] for cost in columns.values())
    ]
    rows += [
        ("predicted time", *(_seconds(cost.total) for cost in columns.values())),
        ("peak memory", *(format_bytes(cost.peak_bytes) for cost in columns.values())),
        ("  weights", *(format_bytes(cost.weight_bytes) for cost in columns.values())),
        ("  in a call", *(format_bytes(cost.call_bytes) for cost in columns.values())),
        ("work", *(f"{cost.flops / 1e12:.3g} TFLOP" for cost in columns.values())),
    ]
    print_table(("", *columns), rows)
    for tokens, speed in sorted({**network.elsewhere, network.tokens: network.speed}.items()):
        here = "  (the size asked for)" if tokens == network.tokens else ""
        print_lines(f"at {tokens:>8} tokens: {speed:5.2f}x{here}")
    is_busy = plan.rates.is_busy
    print_lines("", verdict(network, plan.recipe.method, is_busy=is_busy))
    if words := exact_words(network, plan.recipe.method, is_busy=is_busy):
        print_lines(words)
    if words := kept_words(network):
        print_lines(words)
    if behind := FAMILIES[network.family].behind:
        print_lines(f"{behind} come on top, and cost the same dense and patched.")
    print_lines(
        "memory is the weights and what a call makes resident beside them and its input; the "
        "libraries of a process come on top. "
        f"Measured for {plan.rates.seconds:.0f} s; load {machine['load']}."
    )


def _size(network: NetworkPlan) -> str:
    """`512 tokens`, or rows by columns of latents or pixels and the tokens they make."""
    if network.size.tokens:
        return str(network.size)
    unit = "latents" if network.latent_scale != (1, 1) else "pixels"
    return f"{network.size} {unit}, {network.tokens} tokens"


def _seconds(value: float) -> str:
    if not value:
        return "-"
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _machine(plan: Plan) -> dict[str, Any]:
    import torch

    from retrofit.runtime.devices import device_name
    from retrofit.runtime.machine import load_average

    return {
        "device": device_name(plan.device),
        "threads": torch.get_num_threads(),
        "load": load_average(),
        "cores": os.cpu_count(),
    }


def _as_json(plan: Plan) -> dict[str, Any]:
    return result(
        family=plan.networks[0].family,
        method=plan.recipe.methods,
        patched=plan.report.patched,
        skipped=[(skip.path, skip.reason) for skip in plan.report.skipped],
        keep_asked=plan.recipe.keep,
        keep_measured=plan.keep_measured,
        machine={**_machine(plan), "dtype": plan.dtype},
        steps=plan.steps,
        measured_seconds=plan.rates.seconds,
        busy=plan.rates.is_busy,
        networks=[_network_json(plan, network) for network in plan.networks],
    )


def _network_json(plan: Plan, network: NetworkPlan) -> dict[str, Any]:
    from retrofit.families import FAMILIES
    from retrofit.profiling.cost.network_plan import verdict

    return {
        "name": network.name,
        "family": network.family,
        "size": vars(network.size),
        "tokens": network.tokens,
        "dense": _cost_json(network.dense),
        "patched": _cost_json(network.patched),
        "exact": network.exact and _cost_json(network.exact),
        "speed": network.speed,
        "exact_speed": network.exact_speed,
        "attention_share": network.attention_share,
        "limit": network.limit,
        "speed_by_tokens": {str(n): speed for n, speed in sorted(network.elsewhere.items())},
        "break_even_tokens": network.break_even(),
        "keep": network.kept and network.kept.needed,
        "keep_computed": network.kept and network.kept.computed,
        "changes_nothing": network.is_idle,
        "verdict": verdict(network, plan.recipe.method, is_busy=plan.rates.is_busy),
        "not_counted": FAMILIES[network.family].behind or None,
    }


def _cost_json(cost: Cost) -> dict[str, Any]:
    return {
        "seconds": cost.total,
        "parts": dict(cost.seconds),
        "flops": cost.flops,
        "peak_bytes": cost.peak_bytes,
        "weight_bytes": cost.weight_bytes,
        "call_bytes": cost.call_bytes,
    }

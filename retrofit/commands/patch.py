"""`retrofit patch`: write a patched checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import (
    count,
    format_bytes,
    print_json,
    print_lines,
    progress,
    report_keys,
    result,
    say,
)
from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    from retrofit.artifact.planning import Plan


def run(
    model: options.Model,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    component: options.Components = None,
    config: options.Config = "",
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help=options.NEW_FOLDER,
            rich_help_panel=options.OUTPUT,
            metavar="FOLDER",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be patched, and whether it could be.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    link: options.Link = False,
    force: options.Force = False,
    no_proof: Annotated[
        bool,
        typer.Option(
            "--no-proof",
            help="Do not run the probe that `verify` repeats.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            help="Of the probe.",
            rich_help_panel=options.WHERE,
            min=0,
            max=options.MAX_SEED,
        ),
    ] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    r"""Write a patched checkpoint: the source's own files and retrofit.json.

    Ordinary loaders still give the dense model from it, `retrofit.load` the patched one.
    A small seeded probe proves first that the patch changes something; `retrofit verify` repeats
    it anywhere.

    [bold]Examples[/bold]

    $ retrofit patch minilm/ --method block-sparse --set keep=0.25 -o minilm-sparse/
    encoder: block-sparse: patched 6 of 6 attention sites
    settings: keep 0.25, mass None, block_size [16, 16], pooling avg, order raster, ...
    proof: 6 sparse sites keep 0.25; the output is 0.82 away from dense (64 tokens, ...): a
    fingerprint on random input, which says nothing of quality; `retrofit compare` does
    wrote minilm-sparse/: 13 files, 91.6 MB, 11.1 s
    next: retrofit verify minilm-sparse/

    $ retrofit patch sdxl/ --method hidiffusion --dry-run
    unet2d: hidiffusion: patched 10 of 140 attention sites, 8 other modules
    dry run: nothing was written

    $ retrofit patch sdxl/ --method window --sites 'unet.down_blocks.*' -o out/

    [bold]In Python[/bold]

    patch = retrofit.patch(pipe, "block-sparse", keep=0.25)
    retrofit.save(pipe, "out/")
    """
    if out is None and not dry_run:
        raise InputError("expected -o FOLDER, or --dry-run. Say where to write.")
    options.set_threads(threads)
    from retrofit.artifact.planning import plan_patch, prove
    from retrofit.artifact.saving import refuse_target, write_patched
    from retrofit.checkpoints import find_checkpoint
    from retrofit.runtime.devices import pick_device

    what = options.read_recipe(method, recipe)
    parameters = options.read_settings(settings)
    started = perf_counter()
    found = find_checkpoint(model, weights=not dry_run, config=config)
    plan = plan_patch(
        found,
        what,
        sites=sites or (),
        components=component or (),
        trust_remote_code=trust_remote_code,
        **parameters,
    )
    proof = None
    if out is not None:
        refuse_target(plan, out, force=force)
    if not dry_run or plan.has_weights:
        from retrofit.checkpoints.opening import account_for_weights

        account_for_weights(plan.checkpoint, trust_remote_code=trust_remote_code)
    if out is not None and not dry_run:
        if not no_proof:
            where = pick_device(device)
            say(f"proving the patch on {where} ...")
            proof = prove(
                plan, seed=seed, device=where, dtype=dtype, trust_remote_code=trust_remote_code
            )
        with progress("linking" if link else "copying", plan.num_bytes) as advance:
            write_patched(plan, out, proof=proof, link=link, force=force, advance=advance)
    if json:
        print_json(_as_json(plan, proof, None if dry_run else out))
    else:
        print_lines(*_describe(plan, proof, None if dry_run else out, perf_counter() - started))


def keep_asked(plan: Plan) -> float | None:
    """The `keep` of the recipe, for methods that have one."""
    return plan.recipe.keep


def keep_measured(proof: dict[str, Any] | None) -> float | None:
    """Mean of what the proof's networks kept."""
    kept = [entry["keep_measured"] for entry in (proof or {}).get("networks", [])]
    kept = [keep for keep in kept if keep is not None]
    return sum(kept) / len(kept) if kept else None


def summarize_proof(proof: dict[str, Any]) -> dict[str, Any]:
    """A proof without the samples that only `verify` needs."""
    entries = [
        {key: value["sha256"] if key in ("dense", "patched") else value for key, value in e.items()}
        for e in proof["networks"]
    ]
    return {**proof, "networks": entries}


def _as_json(plan: Plan, proof: dict[str, Any] | None, out: Path | None) -> dict[str, Any]:

    report = plan.handle.report
    return result(
        family=report.families[0],
        **report_keys(report),
        keep_asked=keep_asked(plan),
        keep_measured=keep_measured(proof),
        changed=list(report.changed),
        recipe=plan.recipe.to_dict(),
        out=None if out is None else str(out),
        files=None if out is None else len(plan.files) + len(plan.configs),
        bytes=None if out is None else plan.num_bytes,
        proof=None if proof is None else summarize_proof(proof),
    )


def _describe(
    plan: Plan, proof: dict[str, Any] | None, out: Path | None, seconds: float
) -> list[str]:
    from retrofit.patching.settings import as_plain_data

    report = plan.handle.report
    lines = [f"{', '.join(report.families)}: {report}"]
    for rule in plan.recipe.rules:
        settings = as_plain_data(rule.method).items()
        told = ", ".join(f"{name} {value}" for name, value in settings)
        of_rule = "" if len(plan.recipe.rules) == 1 else f" of {rule.method.name}"
        lines.append(f"settings{of_rule}: {told}")
    reasons: dict[str, int] = {}
    for skip in report.skipped:
        reasons[skip.reason] = reasons.get(skip.reason, 0) + 1
    if reasons:
        lines.append("left dense: " + ", ".join(f"{n} {why}" for why, n in reasons.items()))
    lines += [_describe_proof(entry, proof) for entry in (proof or {}).get("networks", [])]
    lines += _idle_at_training_size(plan, proof)
    if out is None:
        seen = (
            "" if plan.has_weights else "; there are no weights here, only configs were looked at"
        )
        return [*lines, f"dry run: nothing was written{seen}"]
    if proof is None:
        lines.append("proof: none was recorded (--no-proof)")
    number = len(plan.files) + len(plan.configs)
    return [
        *lines,
        f"wrote {out}: {count(number, 'file')}, {format_bytes(plan.num_bytes)}, {seconds:.1f} s",
        f"next: retrofit verify {shlex.quote(_as_path(out))}",
    ]


def _idle_at_training_size(plan: Plan, proof: dict[str, Any] | None) -> list[str]:
    """A line where a proof needed more than the size that a network was trained at."""
    from retrofit.families.examples import InputSize

    sizes = {
        entry["name"]: InputSize(**entry["size"])
        for entry in (proof or {"networks": ()})["networks"]
    }
    lines = []
    for network, _ in plan.handle.networks:
        examples = network.family.inputs
        if examples is None or network.name not in sizes:
            continue
        native, tried = examples.native(network.module), examples.probes(network.module)
        if native in tried and tried.index(sizes[network.name]) > tried.index(native):
            unit = " latents" if network.family.denoises else ""
            where = f"{native}{unit}, the training size"
            lines.append(plan.recipe.explain_no_change(where))
    return lines


def _as_path(out: Path) -> str:
    """As an argument that no command takes for an option."""
    return f"./{out}" if str(out).startswith("-") else str(out)


def _describe_proof(entry: dict[str, Any], proof: dict[str, Any] | None) -> str:
    from retrofit.families.examples import InputSize

    keep = entry["keep_measured"]
    kept = "" if keep is None else f" keep {keep:.2f}"
    name = f" {entry['name']}" if entry["name"] else ""
    return (
        f"proof:{name} {count(entry['sparse_sites'], 'sparse site')}{kept}; the output is "
        f"{entry['relative_difference']:.2g} away from dense ({InputSize(**entry['size'])}, "
        f"{entry['dtype']}, seed {(proof or {})['seed']}): a fingerprint on random input, which "
        "says nothing of quality; `retrofit compare` does"
    )

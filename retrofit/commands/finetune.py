"""`retrofit finetune`: train a patched network for a while against its dense teacher."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrofit.commands import options
from retrofit.commands.console import stages
from retrofit.commands.early import check_names
from retrofit.commands.finetune_job import Job, read_job
from retrofit.commands.finetune_output import tell, tell_plan
from retrofit.runtime.errors import InputError

if TYPE_CHECKING:
    from retrofit.artifact.planning import Plan
    from retrofit.training.request import FinetuneRequest

DATA = "What it learns from"
LEARNS = "How it learns"


def _option(names: str, text: str, panel: str = LEARNS, **more: Any) -> Any:
    return typer.Option(
        *names.split(), help=text, rich_help_panel=panel, show_default=False, **more
    )


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL [NAME=VALUE]...",
            help="A checkpoint with --method or --recipe, or one that `retrofit patch` wrote; then "
            "any setting of a --config file, as in lr=1e-4 or set.keep=0.1.",
            show_default=False,
        ),
    ] = None,
    method: options.Method = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    sites: options.Sites = None,
    config: Annotated[
        Path | None,
        _option("--config", "YAML file with any of these settings by name.", options.WHAT),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            "Captioned pictures (a folder, .csv or .jsonl), texts, or `self`: what the dense "
            "model draws of --prompts.",
            DATA,
        ),
    ] = None,
    prompts: Annotated[
        str | None, _option("--prompts", "File with a caption a line.", DATA)
    ] = None,
    samples: Annotated[int | None, _option("--samples", "How many are used.", DATA)] = None,
    size: Annotated[
        str | None,
        _option("--size", "Pixels; the training size.", DATA, metavar="WxH"),
    ] = None,
    held_out: Annotated[
        int | None, _option("--held-out", "Samples that are only looked at; 64.", DATA)
    ] = None,
    steps: Annotated[int | None, _option("--steps", "Optimizer steps; 500.")] = None,
    batch: Annotated[int | None, _option("--batch", "Samples a step, in all; 8.")] = None,
    grad_accum: Annotated[
        int | None, _option("--grad-accum", "Parts in which a batch is run, to save memory; 1.")
    ] = None,
    train: Annotated[
        str | None, _option("--train", "all, attention, lora, or gates (of seer); all.")
    ] = None,
    rank: Annotated[int | None, _option("--rank", "Of LoRA; 16.")] = None,
    objective: Annotated[
        str | None,
        _option("--objective", "denoise (the model's own loss), distill (dense model), or both."),
    ] = None,
    lr: Annotated[
        float | None, _option("--lr", "Highest learning rate; the recipe's, where it has one.")
    ] = None,
    ema: Annotated[
        float | None, _option("--ema", "Decay of a running average, which is kept then.")
    ] = None,
    precision: Annotated[
        str | None, _option("--precision", "bf16, fp16 or no; bf16 on a GPU.")
    ] = None,
    checkpointing: Annotated[
        bool | None, _option("--checkpointing", "Compute activations twice, to save memory.")
    ] = None,
    validate_every: Annotated[
        int | None, _option("--validate-every", "Steps between looks; a tenth of all.")
    ] = None,
    validation_prompts: Annotated[
        str | None,
        _option("--validation-prompts", "File of captions that are drawn at every look."),
    ] = None,
    seed: Annotated[int | None, _option("--seed", "Of everything drawn; 0.")] = None,
    num_processes: Annotated[
        int | None,
        _option("--num-processes", "On this machine; a GPU each.", options.WHERE, min=1),
    ] = None,
    time_limit: Annotated[
        float | None,
        _option("--time-limit", "Minutes after which it stops with a state.", options.WHERE),
    ] = None,
    tracker: Annotated[
        str | None, _option("--tracker", "tensorboard or wandb.", options.OUTPUT)
    ] = None,
    out: Annotated[
        str | None, _option("-o --out", options.NEW_FOLDER, options.OUTPUT, metavar="FOLDER")
    ] = None,
    resume: Annotated[
        bool, _option("--resume", "Go on where the same command was stopped.", options.OUTPUT)
    ] = False,
    dry_run: Annotated[
        bool, _option("--dry-run", "Only say what would learn, and from what.", options.OUTPUT)
    ] = False,
    force: options.Force = False,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
    plot: options.Plot = None,
    json: options.Json = False,
) -> None:
    r"""Train a patched network for a while against its dense teacher, and write what comes out.

    The dense model that was patched is the teacher: the loss is the model's own, the distance from
    the teacher's prediction, or both. Held-out samples are scored before the first step, on the
    way and at the end. States and a log lie in OUT-training. It stops where the held-out loss
    rises above where it began.

    [bold]Examples[/bold]

    $ retrofit finetune shapes -m clear --set radius=3 --data pictures/ --lr 5e-4 -o tuned/
    on held-out samples  dense    before   after    recovered
    the model's loss     0.05866  0.1143   0.06211  94%
    ...
    $ retrofit finetune shapes-clear/ --data self --prompts prompts.txt --lr 5e-4 -o tuned/
    $ retrofit finetune minilm/ -m window --set keep=0.5 --data texts/ --train attention -o tuned/
    $ retrofit finetune --config run.yaml lr=1e-4 set.radius=4 --dry-run
    $ accelerate launch -m retrofit finetune --config run.yaml

    [bold]In Python[/bold]

    from retrofit.training import finetune, plan_finetune, read_request
    request = read_request({"data": "pictures/", "lr": 5e-4})
    finetune(plan_finetune(find_checkpoint("shapes"), "clear", request), request, Path("tuned"))
    """
    model, words = _split_words(words or [])
    given = {
        "model": model,
        "method": method,
        "recipe": recipe,
        "set": options.read_settings(settings),
        "sites": sites,
        "out": out,
        "data": data,
        "prompts": prompts,
        "samples": samples,
        "size": size,
        "held_out": held_out,
        "steps": steps,
        "batch": batch,
        "grad_accum": grad_accum,
        "train": train,
        "rank": rank,
        "objective": objective,
        "lr": lr,
        "ema": ema,
        "precision": precision,
        "checkpointing": checkpointing,
        "validate_every": validate_every,
        "validation_prompts": validation_prompts,
        "seed": seed,
    }
    job = read_job(config, words, given)
    check_names({"model": job.model, "method": job.method})
    options.set_threads(threads)
    options.refuse_picture("--plot", plot)
    from retrofit.training.log import refuse_tracker

    refuse_tracker(tracker)
    plan, request, num_samples = _plan(job, dry_run, trust_remote_code)
    if dry_run:
        tell_plan(plan, request, num_samples, as_json=json)
        return
    if job.out is None:
        raise InputError("expected -o FOLDER, or --dry-run. Say where to write.")
    if num_processes is not None and "WORLD_SIZE" not in os.environ:
        _start_processes(num_processes)
        return
    from retrofit.runtime.devices import pick_device
    from retrofit.training import Running, finetune

    is_main = os.environ.get("RANK", "0") == "0"
    with stages() as advance:
        running = Running(
            device=pick_device(device),
            resume=resume,
            force=force,
            trust_remote_code=trust_remote_code,
            time_limit=None if time_limit is None else 60 * time_limit,
            tracker=tracker,
            **({"report": advance} if is_main else {}),
        )
        done = finetune(plan, request, Path(job.out), running)
    if is_main:
        tell(plan, request, done, Path(job.out), plot=plot, as_json=json)


def _split_words(words: list[str]) -> tuple[str | None, list[str]]:
    """The model, which stands first, and the settings after it."""
    if words and ("=" not in words[0] or Path(words[0]).expanduser().exists()):
        return words[0], words[1:]
    return None, words


def _plan(
    job: Job, dry_run: bool, trust_remote_code: bool
) -> tuple[Plan, FinetuneRequest, int | None]:
    """What is patched, what is asked of the fine-tune, and how many samples there are."""
    from retrofit.checkpoints import find_checkpoint
    from retrofit.training import plan_finetune, read_request
    from retrofit.training.samples import count_samples

    if job.model is None:
        raise InputError("expected MODEL, or `model:` in a --config file. Say what to train.")
    what = None
    if job.method is not None or job.recipe is not None:
        what = options.read_recipe(job.method, job.recipe)
    found = find_checkpoint(job.model, weights=not dry_run)
    plan = plan_finetune(
        found,
        what,
        read_request(job.request),
        trust_remote_code=trust_remote_code,
        sites=job.sites,
        **job.settings,
    )
    request = read_request({**plan.recipe.finetune, **job.request})
    if request.lr is None:
        raise InputError(
            f"no learning rate: {plan.recipe.methods} has no usual one for this family. Add --lr: "
            "5e-4 for small networks such as `shapes`, 1e-5 to 1e-4 for large ones."
        )
    return plan, request, count_samples(plan, request)


def _start_processes(number: int) -> None:
    """Run the same command in several processes, by PyTorch's launcher."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="retrofit",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(local_ranks_filter={0}),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", "retrofit", *sys.argv[1:])
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values() if failure.exitcode > 0]
        raise typer.Exit(codes[0] if codes else 1) from None
    except SignalException as stopped:
        raise typer.Exit(128 + int(stopped.sigval)) from None

"""`inspect`: sites, tokens and work, from configs alone."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import load_networks
from retrofit.profiling.inspection import AskedSize, inspect_checkpoint
from tests import tiny_models, tiny_pipelines


@pytest.mark.parametrize(
    ("make", "least"),
    [(tiny_pipelines.make_wan_pipeline, (3, 3)), (tiny_models.make_vit, (4, 4))],
    ids=["wan", "vit"],
)
@pytest.mark.parametrize("short", [(0, -1), (-1, 0)], ids=["rows", "columns"])
def test_a_size_without_a_token_is_refused_and_the_least_is_not(
    make, least, short, run_command, tmp_path
):
    make().save_pretrained(tmp_path)
    sizes = [tuple(sum(pair) for pair in zip(least, less, strict=True)) for less in (short, (0, 0))]
    wrong, right = (run_command("inspect", tmp_path, "--size", f"{w}x{h}") for w, h in sizes)
    assert wrong.code == 2
    assert "expected 4x4 pixels or more" in wrong.err
    assert len(wrong.err.strip().splitlines()) == 1
    assert right.code == 0, right.err


@pytest.fixture
def configs_only(copy_of):
    """A checkpoint without its weights."""

    def strip(folder):
        copied = copy_of(folder)
        for file in copied.rglob("*.safetensors"):
            file.unlink()
        return copied

    return strip


def test_every_site_is_listed_with_its_tokens(pipeline, configs_only, run_command):
    answer = run_command("inspect", configs_only(pipeline), "--size", "48x32", "--json")
    assert answer.code == 0, answer.err
    (network,) = answer.json["networks"]
    assert answer.json["family"] == network["family"] == "unet2d"
    # the VAE halves: 24x16 latents, and each level halves again
    assert network["latent_scale"] == [1, 2]
    assert (network["size"]["height"], network["size"]["width"]) == (16, 24)
    sites = {site["path"]: site for site in network["sites"]}
    assert len(sites) == 32
    top = sites["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"]
    assert (top["tokens"], top["keys"], top["kind"]) == (24 * 16, 24 * 16, "self")
    assert (top["heads"], top["head_dim"]) == (2, 4)
    deep = sites["unet.mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert (deep["tokens"], deep["keys"], deep["kind"]) == (3 * 2, 77, "cross")


def test_the_work_is_what_the_flop_counter_counts(encoder):
    (report,) = inspect_checkpoint(find_checkpoint(encoder), AskedSize(tokens=96))
    heads, dim, tokens = 12, 4, 96
    assert all(row.flops == 2 * 2 * heads * dim * tokens**2 for row in report.sites)
    model = load_networks(find_checkpoint(encoder), [""], device="cpu")
    model.set_attn_implementation("eager")  # whose two products the counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, tokens, dtype=torch.int64))
    assert report.flops == counter.get_total_flops()


def test_the_work_of_a_unet_is_what_the_flop_counter_counts(pipeline):
    found = find_checkpoint(pipeline / "unet")
    (report,) = inspect_checkpoint(found, AskedSize())
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        unet = UNet2DConditionModel.from_config(found.config(""))
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(
                torch.empty(1, 4, 16, 16),
                torch.empty((), dtype=torch.int64),
                torch.empty(1, 77, 12),
            )
    assert report.flops == counter.get_total_flops()


def test_frames_and_pixels_become_latents(tmp_path, run_command):
    folder = tiny_pipelines.write_pipeline(tiny_pipelines.make_wan_pipeline(), tmp_path / "wan")
    answer = run_command("inspect", folder, "--size", "52x32", "--frames", "9", "--json")
    (network,) = answer.json["networks"]
    # half the size and half the frames after the first
    assert network["size"] == {"height": 16, "width": 26, "frames": 5, "tokens": 0}
    assert network["sites"][0]["tokens"] == 5 * 8 * 13


def test_methods_are_said_to_apply_or_why_not(encoder, run_command):
    methods = run_command("inspect", encoder, "--json").json["networks"][0]["methods"]
    assert methods["block-sparse"] == "applies"
    assert "UNet" in methods["hidiffusion"]
    out = run_command("inspect", encoder).out
    assert "methods that apply: block-sparse" in out
    assert "not hidiffusion:" in out


def test_alike_sites_share_a_row_and_all_shows_each(pipeline, run_command):
    grouped, every = (run_command("inspect", pipeline, *more).out for more in ((), ("--all",)))
    assert "unet.up_blocks.1.attentions.*.transformer_blocks.0.attn1" in grouped
    assert "x3" in grouped
    assert "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1" in every
    assert every.count("attn") == 32


def test_the_globs_of_grouped_rows_are_globs_for_sites(pipeline, run_command):
    glob = "unet.up_blocks.1.attentions.*.transformer_blocks.0.attn1"
    answer = run_command(
        "patch", pipeline, "--method", "window", "--sites", glob, "--dry-run", "--json"
    )
    assert len(answer.json["patched"]) == 3


def test_a_patched_checkpoint_says_so(patched, run_command):
    answer = run_command("inspect", patched)
    assert answer.out.startswith("patched with block-sparse")
    assert len(run_command("inspect", patched, "--json").json["patched"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "big"), "expected WIDTHxHEIGHT"),
        (("--size", "0x32"), "expected WIDTHxHEIGHT"),
        (("--size", "512"), "expected WIDTHxHEIGHT"),
        (("--size", "32x32"), "--size says nothing to family encoder. Use --tokens"),
        (("--frames", "0"), "expected 1 or more"),
        (("--tokens", "-4"), "expected 1 or more"),
        (("--tokens", "321"), "at most 320 tokens, got 321"),
        (("--component", "unet"), "is a single network"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(arguments, message, encoder, run_command):
    answer = run_command("inspect", encoder, *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.parametrize(
    ("make", "size", "multiple", "nearest"),
    [
        (tiny_models.make_flux, "100x100", 16, "The nearest are 96x96 and 112x112"),
        (tiny_models.make_flux, "64x24", 16, "The nearest are 64x16 and 64x32"),
        (tiny_models.make_sd15_unet, "100x64", 8, "The nearest are 96x64 and 104x64"),
    ],
)
def test_pixels_off_the_grid_are_refused_with_the_nearest(
    make, size, multiple, nearest, tmp_path, run_command
):
    make().save_pretrained(tmp_path)
    answer = run_command("inspect", tmp_path, "--size", size)
    assert answer.code == 2
    assert f"--size {size}: expected multiples of {multiple} pixels" in answer.err
    assert nearest in answer.err
    assert run_command("inspect", tmp_path, "--size", nearest.split()[3]).code == 0


def test_the_help_shows_the_methods_that_its_example_takes(tmp_path, run_command):
    tiny_models.make_sdxl_unet().save_pretrained(tmp_path)
    said = re.compile(r"methods that apply: ((?:[\w-]+, )*[\w-]+)")
    found = [
        said.search(" ".join(run_command("inspect", given).out.split()))[1].split(", ")
        for given in (tmp_path, "--help")
    ]
    assert sorted(found[0]) == sorted(found[1])


def test_a_network_of_no_family_is_refused_with_the_families(pipeline, run_command):
    answer = run_command("inspect", pipeline / "text_encoder")
    assert answer.code == 2
    assert "no known family" in answer.err
    assert "unet2d" in answer.err


def test_out_of_reach_attention_is_shown(tmp_path, run_command):
    tiny_models.make_siglip_vision().save_pretrained(tmp_path)
    answer = run_command("inspect", tmp_path)
    assert answer.code == 0, answer.err
    assert "out of reach" in answer.out


def test_configs_that_do_not_fit_are_one_line(encoder, configs_only, run_command):
    folder = configs_only(encoder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))
    answer = run_command("inspect", folder)
    assert answer.code == 2
    assert answer.err.count("\n") == 1

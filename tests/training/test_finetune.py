"""Whole fine-tunes of tiny checkpoints at the command line: written, proved and undone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import retrofit
from retrofit.checkpoints.manifest import MANIFEST, _digest
from retrofit.runtime.reading import parse_yaml
from tests import tiny_pipelines

WINDOW = ("-m", "window", "--set", "keep=0.3")
SHORT = (
    "steps=4",
    "batch=4",
    "held_out=8",
    "validate_every=2",
    "lr=2e-3",
    "warmup=1",
    "size=32x32",
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def tune(run_command, pipeline, pictures, tmp_path):
    """Fine-tune the tiny pipeline; gives the new folder and the command's answer."""

    def run(*more, name="tuned", code=0, method=WINDOW, model=pipeline):
        out = tmp_path / name
        words = [*SHORT, *(word for word in more if not word.startswith("-"))]
        options = [word for word in more if word.startswith("-")]
        answer = run_command(
            "finetune", model, *words, *method, "--data", pictures, "-o", out, "--json", *options
        )
        assert answer.code == code, answer
        return out, answer

    return run


def changed_weights(before, after):
    a, b = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert {n: (x.dtype, x.shape) for n, x in a.items()} == {
        n: (x.dtype, x.shape) for n, x in b.items()
    }
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_everything_is_trained_written_proved_and_refused_by_others(
    tune, pipeline, run_command, refused, tmp_path
):
    out, answer = tune()
    facts = answer.json
    looks = [scores["weighted"] + scores["error"] for scores in facts["looks"].values()]
    assert looks[-1] < looks[0]
    assert facts["samples"] == {"train": 20, "held_out": 8}
    assert len(changed_weights(pipeline, out)) > 50
    assert run_command("verify", out).code == 0

    with pytest.raises(ValueError, match="retrofit_attention"):
        DiffusionPipeline.from_pretrained(out)
    loaded = retrofit.load(out)
    stored = load_file(out / WEIGHTS)
    assert all(torch.equal(x, stored[n]) for n, x in loaded.unet.state_dict().items())
    line = refused("unpatch", out, "-o", tmp_path / "undone")
    assert "fine-tuned" in line
    assert "sd" in line
    card = (out / "README.md").read_text()
    assert parse_yaml(card.split("---")[1])["base_model"] == "sd"
    assert "recovered" in card


def test_attention_alone_and_its_record_is_checked(tune, pipeline, refused, tmp_path):
    out, _ = tune("train=attention")
    assert {("attn1" in name) for name in changed_weights(pipeline, out)} == {True}
    record = (out / MANIFEST).read_text()
    for change, told in (
        (lambda tuned: tuned.update(train="some"), "tuned.train"),
        (lambda tuned: tuned.pop("base"), "base"),
        (lambda tuned: tuned.update(components="unet"), "tuned.components"),
        (lambda tuned: tuned.update(other=1), "other"),
    ):
        data = json.loads(record)
        change(data["tuned"])
        (out / MANIFEST).write_text(json.dumps({**data, "digest": _digest(data)}))
        assert told in refused("unpatch", out, "-o", tmp_path / "undone")


def test_an_adapter_leaves_the_weights_and_can_be_undone(
    tune, pipeline, run_command, refused, tmp_path
):
    from peft import PeftConfig

    tune("train=attention")
    out, _ = tune("train=lora", "rank=4", "--force", "--resume", code=2)
    shutil.rmtree(out.with_name("tuned-training"))
    out, _ = tune("train=lora", "rank=4", "--force")
    assert (out / WEIGHTS).read_bytes() == (pipeline / WEIGHTS).read_bytes()
    assert PeftConfig.from_pretrained(str(out / "adapter")).r == 4
    assert run_command("verify", out).code == 0
    DiffusionPipeline.from_pretrained(out)  # dense, as before
    assert run_command("unpatch", out, "-o", tmp_path / "undone").code == 0
    assert not (tmp_path / "undone" / "adapter").exists()

    adapter = out / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-8])
    answer = run_command("verify", out)
    assert answer.code == 1
    assert "adapter_model.safetensors" in answer.err + answer.out


def test_gates_leave_the_weights(tune, pipeline):
    out, answer = tune(
        "train=gates", method=("-m", "seer", "--set", "keep=0.3", "--set", "block_size=16")
    )
    assert answer.json["parameters"] > 0
    assert (out / WEIGHTS).read_bytes() == (pipeline / WEIGHTS).read_bytes()
    learned = retrofit.patch_of(retrofit.load(out)).state_dict()
    assert sum(x.numel() for x in learned.values()) == answer.json["parameters"]


def test_a_patched_checkpoint_is_taken_as_it_is(tune, run_command, pipeline, tmp_path):
    patched = tmp_path / "patched"
    assert run_command("patch", pipeline, *WINDOW, "--no-proof", "-o", patched).code == 0
    out, _ = tune(method=(), model=patched)
    recipe = json.loads((out / MANIFEST).read_text())["recipe"]
    assert recipe == json.loads((patched / MANIFEST).read_text())["recipe"]
    _, again = tune(method=(), model=out, name="again", code=2)
    assert "already fine-tuned" in again.err


def test_samples_of_the_dense_model(run_command, pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat\nthe small house\n")
    answer = run_command(
        "finetune", pipeline, *SHORT[:-1], "size=32x32", "samples=12", *WINDOW, "--data", "self",
        "--prompts", prompts, "--validation-prompts", prompts, "-o", tmp_path / "out",
    )  # fmt: skip
    assert answer.code == 0, answer
    sheets = sorted((tmp_path / "out-training" / "pictures").iterdir())
    assert [sheet.name for sheet in sheets] == [f"step-000000{i}.png" for i in (0, 2, 4)]


@pytest.mark.parametrize(
    ("make", "component", "method"),
    [
        (tiny_pipelines.make_sdxl_pipeline, "unet", ("-m", "window", "--set", "keep=0.3")),
        (tiny_pipelines.make_flux_pipeline, "transformer", ("-m", "clear", "--set", "radius=2")),
        (tiny_pipelines.make_sd3_pipeline, "transformer", ("-m", "clear", "--set", "radius=2")),
    ],
    ids=["sdxl", "flux", "sd3"],
)
def test_every_kind_of_pipeline_learns(make, component, method, tune, tmp_path):
    source = tiny_pipelines.write_pipeline(make(), tmp_path / "source")
    _, answer = tune("lr=3e-4", "steps=6", "--force", method=method, model=source, name="tuned")
    looks = [scores["weighted"] + scores["error"] for scores in answer.json["looks"].values()]
    assert looks[-1] < looks[0]
    loaded = retrofit.load(tmp_path / "tuned")
    assert retrofit.patch_of(loaded).report.patched
    file = f"{component}/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / file) for folder in (source, tmp_path / "tuned"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_texts_bring_an_encoder_nearer_to_dense(run_command, encoder, texts, tmp_path):
    answer = run_command(
        "finetune", encoder, "-m", "window", "--set", "keep=0.2", "--data", texts, "steps=6",
        "tokens=96", "batch=4", "held_out=8", "lr=1e-4", "warmup=1", "-o", tmp_path / "out",
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer
    looks = answer.json["looks"]
    assert looks["6"]["error"] < looks["0"]["error"]
    assert looks["0"]["loss"] is None
    model_type = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert model_type.startswith("retrofit_")


def test_a_file_says_what_words_do_not(run_command, pipeline, pictures, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {pipeline}\nmethod: window\nset: {{keep: 0.5}}\ndata: {pictures}\n"
        "lr: 1e-4\nsteps: 9\nbatch: 4\nheld_out: 8\n"
    )
    answer = run_command("finetune", "--config", config, "set.keep=0.3", "steps=7", "--dry-run",
                         "--json", "--batch", 2)  # fmt: skip
    assert answer.code == 0, answer
    request = answer.json["request"]
    assert (request["lr"], request["steps"], request["batch"]) == (1e-4, 7, 2)
    assert answer.json["samples"] == 28
    assert sorted(tmp_path.iterdir()) == [config]

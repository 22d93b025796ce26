"""`retrofit compare` as a user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retrofit.commands import run
from retrofit.evaluate.checkpoints import Variant, Where, compare_checkpoint
from retrofit.evaluate.inputs import InputChoice
from retrofit.patching.recipe import Recipe
from retrofit.runtime.errors import InputError
from tests import tiny_pipelines

FEW = ("--num-inputs", "2", "--rounds", "1", "--no-memory", "--device", "cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.write_encoder_checkpoint(tmp_path_factory.mktemp("encoder") / "encoder")


def _compare(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(["compare", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_json_holds_the_keys_of_every_verb_and_the_measurements(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _compare(capsys, encoder, "-m", "window", "--set", "keep=0.5", *FEW, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["schema"] == 1
    assert data["family"] == "encoder"
    assert data["method"] == "window"
    assert len(data["patched"]) == 6
    assert data["skipped"] == []
    assert data["keep_asked"] == 0.5
    assert data["keep_measured"] == pytest.approx(0.5, abs=0.05)
    assert len(data["inputs"]) == 2
    assert 0 < data["attention_share"] < 1
    assert data["tokens"] == 320
    assert data["variants"][0]["metrics"]["relative_error"]["median"] > 0.01
    assert data["variants"][0]["speed"]["min"] <= data["variants"][0]["speed"]["max"]


def test_every_value_of_a_setting_is_a_variant(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("-m", "window", "--method", "neighborhood")
    settings = ("--set", "keep=0.5", "--set", "keep=0.25")
    code, out, err = _compare(capsys, encoder, *methods, *settings, *FEW, "--json")
    assert code == 0, err
    variants = {variant["name"]: variant for variant in json.loads(out)["variants"]}
    assert list(variants) == [
        "window keep=0.5",
        "window keep=0.25",
        "neighborhood keep=0.5",
        "neighborhood keep=0.25",
    ]
    assert variants["window keep=0.25"]["recipe"]["parameters"]["keep"] == 0.25
    errors = [variant["metrics"]["relative_error"]["median"] for variant in variants.values()]
    assert len(set(errors)) == 4


def test_table_verdict_and_plot_are_shown(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "made" / "too" / "compare.png"
    code, out, err = _compare(capsys, encoder, "-m", "window", *FEW, "--plot", plot)
    assert code == 0, err
    assert "relative error, lower is closer" in out
    assert re.search(r"verdict: .*(faster|as fast|slower).* changes the output by \d", out)
    assert "FLOPs at 320 tokens" in out
    assert "warming up window ..." in err
    with Image.open(plot) as picture:
        assert min(picture.size) > 200


def test_patched_checkpoint_is_compared_with_its_own_patch(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "patched"
    patched = ["patch", encoder, "-m", "window", "--set", "keep=0.25", "--no-proof", "-o", out]
    assert run([str(word) for word in patched]) == 0
    code, text, err = _compare(capsys, out, "-m", "neighborhood", *FEW, "--json")
    assert code == 0, err
    names = [variant["name"] for variant in json.loads(text)["variants"]]
    assert names == ["as saved: window", "neighborhood"]
    assert json.loads(text)["keep_asked"] == 0.25


def test_pipeline_is_compared_on_latents_of_the_size_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_pipelines.write_pipeline(tiny_pipelines.make_sd_pipeline(), tmp_path / "sd")
    size = ("--size", "40x48")
    code, out, err = _compare(capsys, folder, "-m", "hidiffusion", *size, *FEW, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["family"] == "unet2d"
    assert data["inputs"] == ["24x20, seed 0", "24x20, seed 1"]  # twice the latent, rows first
    assert data["tokens"] == 24 * 20
    assert data["variants"][0]["metrics"]["relative_error"]["min"] > 0.001


def test_memory_of_every_variant_comes_from_its_own_process(encoder: Path) -> None:
    variants = [Variant(name="window", what="window")]
    found = compare_checkpoint(
        encoder, variants, InputChoice(count=1), Where(device="cpu"), rounds=1
    )
    dense, window = (row.peak_bytes for row in found.rows)
    assert dense is not None
    assert window is not None
    assert 2**26 < dense < 2**33
    assert not found.memory_exceeds(found.variants[0])


def test_two_variants_of_one_name_are_refused(encoder: Path) -> None:
    from retrofit.methods.window import WindowConfig

    recipe = Recipe.of(WindowConfig(keep=0.5))
    variants = [Variant(name="half", what=recipe), Variant(name="half", what=recipe)]
    with pytest.raises(InputError, match="'half' is asked for twice"):
        compare_checkpoint(encoder, variants, InputChoice(), Where(device="cpu"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "not patched, so there is nothing to compare it with. Name a method"),
        (("-m", "windoe"), "Did you mean window"),
        (("-m", "hidiffusion"), "hidiffusion does not fit this model"),
        (("-m", "window", "--set", "keep=0"), "keep"),
        (("-m", "window", "--set", "keeep=0.5"), "keeep"),
        (("-m", "window", "--rounds", "0"), "--rounds 0: expected 1 or more"),
        (("-m", "window", "--num-inputs", "0"), "--num-inputs 0: expected 1 or more"),
        (("-m", "window", "--size", "64x64"), "--size says nothing to family encoder"),
        (("-m", "window", "--size", "big"), "expected WIDTHxHEIGHT"),
        (("-m", "window", "--tokens", "9999"), "expected at most 320 tokens"),
        (("-m", "window", "--inputs", "nowhere"), "nowhere: no such file or folder"),
        (("-m", "window", "--plot", "plot.txt"), "expected a name ending in .png"),
        (("-m", "window", "--plot", f"{__file__}/plot.png"), "is a file. Give a name in another"),
        (("-m", "window", "--sites", "*.nothing"), "matches none of the 6 sites"),
        (("--recipe", "missing.yaml"), "missing.yaml: can't be read"),
        (("-m", "window", "--device", "toaster"), "toaster"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    encoder: Path,
    arguments: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = _compare(capsys, encoder, *arguments)
    assert code == 2, err
    assert complaint in err
    assert err.strip().splitlines()[-1].startswith("error: ")
    assert not out


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "got an empty file"), (b" \n\n", "got an empty file"), (b"\xff\xfe\x80", "in UTF-8")],
    ids=["empty", "blank", "binary"],
)
def test_inputs_that_say_nothing_are_refused(
    content: bytes, message: str, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    code, out, err = _compare(capsys, encoder, "-m", "window", "--inputs", file)
    assert (code, out) == (2, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {file}: expected a text")
    assert message in line


def test_missing_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _compare(capsys, "no-such-folder", "-m", "window")
    assert code == 2
    assert "no-such-folder: no such folder or file" in err


@pytest.mark.parametrize(("asked", "expected"), [(None, "float32"), ("float16", "float16")])
def test_float16_runs_in_float32_on_a_cpu_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str | None, expected: str
) -> None:
    from transformers import BertModel

    encoder = tiny_pipelines.write_encoder_checkpoint(tmp_path / "encoder")
    half = BertModel.from_pretrained(encoder).half()
    half.save_pretrained(encoder)
    words = [] if asked is None else ["--dtype", asked]
    words += ["-m", "window", "--set", "keep=0.5", *FEW, "--json"]
    code, out, err = _compare(capsys, encoder, *words)
    assert code == 0, err
    assert json.loads(out)["machine"]["dtype"] == expected

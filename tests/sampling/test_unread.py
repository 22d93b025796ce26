"""Words behind the text encoder's limit, and what else the libraries warn of."""

from __future__ import annotations

import logging
import warnings

import pytest

from retrofit.checkpoints.warned import collecting_warnings
from retrofit.runtime.errors import CheckpointError
from retrofit.sampling.png import read_record
from tests import tiny_pipelines

LONG = "a cat the cat a dog the dog a cat a cat"  # the tiny encoder takes 16 tokens


def test_words_that_nobody_reads_are_named_and_recorded(pipeline, run_command, tmp_path):
    file = tmp_path / "a.png"
    words = ("generate", pipeline, "-p", f"{LONG} zzz blue", "--steps", "2", "-o", file)
    answer = run_command(*words)
    assert answer.code == 0, answer.err
    notes = [line for line in answer.err.splitlines() if "nobody read" in line]
    assert len(notes) == 1
    assert "zzz blue'" in notes[0]
    assert read_record(file)["unread"]["prompt"].endswith("zzz blue")
    assert run_command("generate", "--like", file, "-o", tmp_path / "b.png").code == 0


def test_a_prompt_that_is_read_to_its_end_has_no_note(pipeline, run_command, tmp_path):
    file = tmp_path / "a.png"
    answer = run_command("generate", pipeline, "-p", "a cat", "--steps", "2", "-o", file)
    assert "nobody read" not in answer.err
    assert "unread" not in read_record(file)


def test_what_one_of_two_encoders_reads_is_read():
    from retrofit.sampling.unread import _unread

    flux = tiny_pipelines.make_flux_pipeline()
    assert _unread(flux, f"{LONG} zzz blue") == ""
    flux.tokenizer_2 = None
    assert _unread(flux, f"{LONG} zzz blue").endswith("zzz blue")


def test_an_unknown_warning_is_handed_on_once_and_a_known_one_is_not(caplog):
    library = logging.getLogger("diffusers.models.odd")
    with collecting_warnings():
        for _ in range(2):
            library.warning("the picture is sideways")
            library.warning("The following part of your input was truncated because of CLIP")
            warnings.warn("half of it is gone", UserWarning, stacklevel=1)
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "sideways" in text] == ["diffusers: the picture is sideways"]
    assert len([text for text in told if "half of it" in text]) == 1
    assert not any("truncated" in text for text in told)


def test_a_warning_that_means_another_result_is_refused():
    library = logging.getLogger("diffusers.utils.peft_utils")
    with pytest.raises(CheckpointError, match="left out"), collecting_warnings():
        library.warning("Loading adapter weights from state_dict led to unexpected keys found")

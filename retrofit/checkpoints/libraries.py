"""What retrofit needs of the libraries that networks come from: classes, dtypes, errors."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from retrofit.architectures.recognition import network_class
from retrofit.checkpoints import Checkpoint, read_json
from retrofit.runtime.errors import CheckpointError, UnsupportedError, suggest
from retrofit.runtime.schema import OTHER_KEYS, find_problems

if TYPE_CHECKING:
    import torch

LIBRARY_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    ImportError,
)
LIBRARIES = ("diffusers", "transformers", "retrofit")


def class_of(checkpoint: Checkpoint, component: str) -> Any:
    """The class of a component.

    Raises:
        UnsupportedError: If the installed library does not have it.
    """
    library, class_name = checkpoint.classes[component]
    if library not in LIBRARIES:
        raise UnsupportedError(
            f"{checkpoint.name}: component {component!r} comes from {library!r}, not from "
            "diffusers or transformers. Load it yourself and call `retrofit.patch`."
        )
    if library == "retrofit":
        return network_class(class_name)
    module = importlib.import_module(library)
    if library == "transformers" and not hasattr(module, class_name):
        class_name = "AutoModel"
    if not hasattr(module, class_name):
        raise UnsupportedError(
            f"{checkpoint.name}: {library} {module.__version__} has no class {class_name!r}. "
            f"Upgrade it: pip install --upgrade {library}"
        )
    return getattr(module, class_name)


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by its name.

    Raises:
        UnsupportedError: If there is none.
    """
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedError(
            f"dtype {name!r} does not exist. {suggest(name, ('float32', 'float16', 'bfloat16'))}"
        )
    return dtype


def dtype_argument() -> str:
    """What the installed diffusers calls the dtype of a load."""
    import diffusers
    from packaging.version import Version

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


@contextmanager
def failing_as_checkpoint_error(checkpoint: Checkpoint) -> Iterator[None]:
    """What a library says about a checkpoint it can't open, as one line."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, LIBRARY_ERRORS):
            raise  # the tokenizers' library raises bare ones
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if type(error).__name__ == "OutOfMemoryError":
            raise
        text = " ".join(str(error).split())
        text = text if len(text) < 300 else f"{text[:300]} ..."
        raise CheckpointError(
            f"{checkpoint.name}: can't be opened ({type(error).__name__}: {text}). Check that its "
            "config belongs to its weights, and that the library is as new as the checkpoint."
        ) from error


class TokenizerFile(TypedDict):
    """What every `tokenizer.json` has; the library checks the rest."""

    model: Mapping[str, Any]


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: If its files are damaged.
    """
    from transformers import AutoTokenizer

    file = folder / "tokenizer.json"
    problems = []
    if file.is_file():
        found = read_json(file)
        problems = find_problems(found, Annotated[TokenizerFile, OTHER_KEYS])
    if problems:
        raise CheckpointError(f"{file}: {'; '.join(problems)}. Fetch the checkpoint again.")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the library raises bare ones
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}: its tokenizer can't be opened ({type(error).__name__}: {text}). Fetch the "
            "checkpoint again."
        ) from error


def conversion_command(checkpoint: Checkpoint, library: str, class_name: str) -> str:
    """The command that writes safetensors beside the pickles of a checkpoint."""
    folder = checkpoint.root
    if library == "retrofit":
        return (
            'python -c "import sys, torch, safetensors.torch as s; '
            "s.save_file(torch.load(sys.argv[1], map_location='cpu', weights_only=True), "
            f'sys.argv[2])" {shlex.quote(f"{folder}/model.pt")} '
            f"{shlex.quote(f'{folder}/model.safetensors')}"
        )
    if checkpoint.pipeline_class is not None:
        library, class_name = "diffusers", "DiffusionPipeline"
    elif library == "transformers" and not class_name:
        class_name = "AutoModel"
    return (
        f'python -c "import sys; from {library} import {class_name} as M; '
        'M.from_pretrained(sys.argv[1], use_safetensors=False).save_pretrained(sys.argv[1])" '
        f"{shlex.quote(str(folder))}"
    )

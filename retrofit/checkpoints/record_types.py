"""The shape of `retrofit.json`, which is held against it before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from retrofit.checkpoints.fingerprint import FileRecord
from retrofit.runtime.schema import OTHER_KEYS, Sha256, Within

Count = Annotated[int, Within(0, 10**9)]
Side = Annotated[int, Within(1, 65_536)]


class ProbeSize(TypedDict):
    """Of the inputs of a proof, in the units of the network."""

    height: Side
    width: Side
    frames: Annotated[int, Within(1, 1024)]
    tokens: Annotated[int, Within(0, 1_000_000)]


class OutputDigest(TypedDict):
    """What came out of one run of a proof."""

    sha256: Sha256
    numel: Annotated[int, Within(1, 2**40)]
    mean: float
    std: float
    largest: float
    samples: Annotated[list[float], Within(1, 4096)]


class NetworkProof(TypedDict):
    """What a proof says of one network."""

    name: str
    family: str
    dtype: str
    size: ProbeSize
    inputs: Sha256
    sites: Count
    sparse_sites: Count
    keep_measured: float | None
    relative_difference: float
    dense: OutputDigest
    patched: OutputDigest


class Proof(TypedDict):
    """See `retrofit.artifact.proof`."""

    seed: Annotated[int, Within(0, 2**63 - 1)]
    device: str
    steps: Annotated[int, Within(1, 10_000)]
    networks: list[NetworkProof]


class SiteEntry(TypedDict):
    """One patched site."""

    network: str
    path: str
    index: Count
    block: Count
    kind: str


class OuterRecipe(TypedDict, total=False):
    """What is read of a recipe file without its method, which checks the rest."""

    family: str | None
    description: str | None
    finetune: Mapping[str, Any] | None


class SavedRecipe(OuterRecipe):
    """The same of a recipe in a record, which has every setting."""

    method: str
    parameters: Mapping[str, Any]


class SavedRule(TypedDict):
    """One rule of a recipe of several."""

    method: str
    parameters: Mapping[str, Any]


class SavedRules(OuterRecipe):
    """A recipe of several rules in a record."""

    rules: Annotated[list[Annotated[SavedRule, OTHER_KEYS]], Within(1, 1000)]


class Tuned(TypedDict):
    """How a checkpoint was fine-tuned."""

    base: str
    train: Literal["all", "attention", "lora", "gates"]
    components: list[str]
    request: Mapping[str, Any]
    scores: Mapping[str, Any]


class MaybeTuned(TypedDict, total=False):
    """What only a fine-tuned checkpoint has."""

    tuned: Tuned


class Record(MaybeTuned):
    """All of it."""

    schema: int
    digest: Sha256
    source: str
    family: list[str]
    recipe: Annotated[SavedRecipe, OTHER_KEYS] | Annotated[SavedRules, OTHER_KEYS]
    sites: list[SiteEntry]
    changed: list[str]
    skipped: list[tuple[str, str]]
    files: Mapping[str, FileRecord]
    configs: Mapping[str, FileRecord]
    single_file: str
    versions: Mapping[str, str]
    proof: Proof | None

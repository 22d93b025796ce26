from __future__ import annotations

import pytest
import torch

from retrofit.kernels import backends, block_sparse_attention, explain, select_blocks
from retrofit.kernels._dispatch import OPERATORS, Probe, choose_backend
from retrofit.runtime.errors import ConfigError, UnsupportedError

X = torch.randn(1, 1, 20, 8)
KEPT = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("RETROFIT_BACKEND", raising=False)
    answers = {"fast": (False, "no such chip"), "slow": (True, ""), "slower": (True, "")}
    monkeypatch.setitem(OPERATORS, "made_up", lambda probe: answers)
    return "made_up"


PROBE = Probe(device="cpu", dtype=torch.float32, head_dim=8)


def test_the_first_backend_that_can_run_is_chosen(operator: str) -> None:
    assert choose_backend(operator, PROBE) == "slow"


def test_the_argument_goes_before_the_environment(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_BACKEND", "slower")
    assert choose_backend(operator, PROBE) == "slower"
    assert choose_backend(operator, PROBE, "slow") == "slow"


def test_a_forced_backend_that_cannot_run_is_an_error_with_its_reason(operator: str) -> None:
    with pytest.raises(UnsupportedError, match=r"expected fast .*\(fast: no such chip\)"):
        choose_backend(operator, PROBE, "fast")


def test_no_backend_at_all_names_every_reason(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"a": (False, "too old"), "b": (False, "too small")}
    monkeypatch.setitem(OPERATORS, operator, lambda probe: answers)
    with pytest.raises(UnsupportedError, match="a: too old; b: too small"):
        choose_backend(operator, PROBE)


def test_an_unknown_name_lists_the_choices(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="backend to name a backend, got 'slwo'.*Did you mean"):
        choose_backend(operator, PROBE, "slwo")
    monkeypatch.setenv("RETROFIT_BACKEND", "cuda")
    with pytest.raises(ConfigError, match="RETROFIT_BACKEND to name a backend, got 'cuda'"):
        choose_backend(operator, PROBE)


def test_a_name_of_another_operator_does_not_concern_this_one(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETROFIT_BACKEND", "slower")
    assert select_blocks(X, X, keep=0.5).all()
    with pytest.raises(ConfigError, match="backend to name a backend"):
        block_sparse_attention(X, X, X, KEPT, backend="slower")


def test_the_environment_forces_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_BACKEND", "torch")
    chosen = {row["operator"]: row["backend"] for row in explain(device="cpu") if row["is_chosen"]}
    assert set(chosen.values()) == {"torch"}
    monkeypatch.setenv("RETROFIT_BACKEND", "native")
    with pytest.raises(UnsupportedError, match="float64; the native kernel takes"):
        block_sparse_attention(X.double(), X.double(), X.double(), KEPT)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_refusal_has_a_reason_and_one_backend_is_taken(
    device: str, dtype: torch.dtype
) -> None:
    rows = explain(device=device, dtype=dtype, head_dim=72)
    assert {row["operator"] for row in rows} >= {"block_sparse_attention", "select_blocks"}
    for row in rows:
        assert bool(row["reason"]) != row["is_usable"]
        assert row["device"] == device
    for operator in {row["operator"] for row in rows}:
        assert sum(row["is_chosen"] for row in rows if row["operator"] == operator) == 1


def test_backends_of_an_unknown_operator_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean block_sparse_attention"):
        backends("block_sparse_atention")

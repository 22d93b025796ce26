"""The interception point: every order of hooks, copies, interrupts, compile and export."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from retrofit.runtime.errors import AlreadyPatchedError, InterceptionError, UnsupportedError
from retrofit.runtime.intercept import ReplaceFunction, find_interceptor, install, uninstall

OWNER = "a test"


class SelfAttention(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


class Chunked(nn.Module):
    """An attention that computes the softmax itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def double_values(_call_index, query, key, value, **kwargs):
    return scaled_dot_product_attention(query, key, 2 * value, **kwargs)


def raise_interrupt(_call_index, *args, **kwargs):
    raise KeyboardInterrupt


def patch(module: nn.Module, replacement=double_values) -> None:
    handler = ReplaceFunction(
        scaled_dot_product_attention, replacement, where="attn", why_unreached="Use sdpa."
    )
    install(module, handler, owner=OWNER, where="attn")


@pytest.fixture
def attention() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def accelerate_hook(log: list[str]):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Log(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            log.append("accelerate")
            return args, kwargs

    return lambda m: add_hook_to_module(m, Log()), remove_hook_from_module


def diffusers_hook(log: list[str]):
    from diffusers.hooks import HookRegistry, ModelHook

    class Log(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            log.append("diffusers")
            return args, kwargs

    class LogAround(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            log.append("around")
            return self.fn_ref.original_forward(*args, **kwargs)

    def add(module: nn.Module) -> None:
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(LogAround(), "around")
        registry.register_hook(Log(), "log")

    def remove(module: nn.Module) -> None:
        for name in ("log", "around"):
            module._diffusers_hook.remove_hook(name)
        del module._diffusers_hook

    return add, remove


ORDERS = [
    order
    for order in itertools.permutations(("patch", "hook", "unhook", "unpatch"))
    if order.index("patch") < order.index("unpatch") and order.index("hook") < order.index("unhook")
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("make_hook", [accelerate_hook, diffusers_hook])
def test_any_order_of_patch_and_foreign_hook_is_right_at_every_moment(
    attention, x, order, make_hook
):
    log: list[str] = []
    hook, unhook = make_hook(log)
    dense = attention(x)
    doubled = 2 * dense
    patched = hooked = False
    for action in order:
        if action == "patch":
            patch(attention)
        elif action == "unpatch":
            uninstall(attention)
        else:
            (hook if action == "hook" else unhook)(attention)
        patched = {"patch": True, "unpatch": False}.get(action, patched)
        hooked = {"hook": True, "unhook": False}.get(action, hooked)
        log.clear()
        out = attention(x)
        torch.testing.assert_close(out, doubled if patched else dense)
        assert bool(log) == hooked
        assert (find_interceptor(attention) is not None) == patched


def test_remove_without_hooks_leaves_no_attribute(attention, x):
    before, dense = set(attention.__dict__), attention(x)
    patch(attention)
    uninstall(attention)
    assert set(attention.__dict__) == before
    assert torch.equal(attention(x), dense)


def test_uninstall_of_an_unpatched_module_changes_nothing(attention):
    before = set(attention.__dict__)
    uninstall(attention)
    assert set(attention.__dict__) == before


def test_deepcopy_runs_the_copys_own_weights(attention, x):
    patch(attention)
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        twin.qkv.weight.mul_(3)
    expected = SelfAttention().eval()
    expected.load_state_dict(twin.state_dict())
    torch.testing.assert_close(twin(x), 2 * expected(x))


def test_pickle_round_trip_stays_patched(attention, x):
    patch(attention)
    buffer = io.BytesIO()
    pickle.dump(attention, buffer)
    twin = pickle.loads(buffer.getvalue())
    assert find_interceptor(twin) is not None
    torch.testing.assert_close(twin(x), attention(x))


def test_ctrl_c_inside_the_call_leaves_no_mode_behind(attention, x):
    patch(attention, raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        attention(x)
    other = SelfAttention().eval()
    other.load_state_dict(attention.state_dict())
    uninstall(attention)
    assert torch.equal(attention(x), other(x))


def test_a_module_that_never_makes_the_call_is_an_error():
    module = Chunked()
    patch(module)
    with pytest.raises(InterceptionError, match="attn: expected a call of scaled_dot.*Use sdpa"):
        module(torch.randn(1, 4, 8))


def test_a_replaced_forward_is_refused_by_name(attention):
    attention.forward = lambda x: x
    with pytest.raises(UnsupportedError, match=r"attn: its forward was replaced by .*<lambda>"):
        patch(attention)


def test_a_second_owner_is_refused_by_name(attention):
    patch(attention)
    with pytest.raises(AlreadyPatchedError, match="already patched by a test"):
        install(attention, lambda inner, *args, **kwargs: None, owner="another", where="attn")


def test_the_signature_stays_the_modules_own(attention):
    before = inspect.signature(attention.forward)
    patch(attention)
    assert inspect.signature(attention.forward) == before


def test_compile_before_and_after_patching_gives_the_patched_result(attention, x):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    dense = attention(x)
    torch.testing.assert_close(compiled(x), dense)
    patch(attention)
    torch.testing.assert_close(compiled(x), 2 * dense)
    uninstall(attention)
    torch.testing.assert_close(compiled(x), dense)


def test_inductor_agrees_with_eager(attention, x):
    patch(attention)
    compiled = torch.compile(attention, fullgraph=True)
    torch.testing.assert_close(compiled(x), attention(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_carries_the_replacement(attention, x, strict):
    patch(attention)
    program = torch.export.export(attention, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), attention(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(attention, x, use_reentrant):
    from torch.utils.checkpoint import checkpoint

    patch(attention)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    attention(a).square().sum().backward()
    checkpoint(attention, b, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_functional_call_uses_the_given_weights(attention, x):
    patch(attention)
    weights = {name: 2 * value for name, value in attention.state_dict().items()}
    other = SelfAttention().eval()
    other.load_state_dict(weights)
    torch.testing.assert_close(torch.func.functional_call(attention, weights, x), 2 * other(x))

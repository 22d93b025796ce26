"""`plan`: counted work against formulas by hand, predictions from known rates, plain words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from retrofit.checkpoints import find_checkpoint
from retrofit.checkpoints.opening import build_networks, load_networks
from retrofit.families.examples import InputSize
from retrofit.kernels import block_sparse_attention, neighborhood_attention, window_attention
from retrofit.kernels.block_sparse.native import native_supports
from retrofit.methods import METHODS
from retrofit.profiling.cost import sizes
from retrofit.profiling.cost.dtypes import set_dtype
from retrofit.profiling.cost.examples import Pool, cut
from retrofit.profiling.cost.network_plan import (
    KINDS,
    Cost,
    NetworkPlan,
    cost_of,
    exact_words,
    verdict,
)
from retrofit.profiling.cost.plan import Request, plan_checkpoint
from retrofit.profiling.cost.python_cost import PythonCost
from retrofit.profiling.cost.rates import Rates, measure_rates
from retrofit.profiling.cost.trace import Trace, tracing
from retrofit.profiling.inspection import AskedSize
from tests import tiny_models
from tests.architectures.small_networks import small_vggt

TOKENS = 96


def seconds(**more):
    return {**dict.fromkeys(KINDS, 0.0), **more}


def network_plan(dense, patched, elsewhere=None, exact=None):
    costs = [
        c and Cost(seconds=seconds(**c), flops=1.0, weight_bytes=1.0, call_bytes=1.0)
        for c in (dense, patched, exact)
    ]
    return NetworkPlan(
        name="",
        family="encoder",
        size=InputSize(tokens=100),
        tokens=100,
        dense=costs[0],
        patched=costs[1],
        elsewhere=elsewhere or {},
        exact=costs[2],
    )


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def trace_of(run):
    with tracing(nn.Module()) as trace:
        run()
    return trace


def test_work_of_an_encoder_is_that_of_its_formulas(encoder):
    request = Request(what="window", parameters={"keep": 0.5}, asked=AskedSize(tokens=TOKENS))
    plan = plan_checkpoint(find_checkpoint(encoder), request)
    (network,) = plan.networks
    model = find_checkpoint(encoder).config("")
    width, inner, layers = (
        model["hidden_size"],
        model["intermediate_size"],
        model["num_hidden_layers"],
    )
    products = layers * TOKENS * 2 * (4 * width**2 + 2 * width * inner) + 2 * width**2  # pooler
    attention = layers * 4 * width * TOKENS**2
    assert network.dense.flops == products + attention
    assert network.patched.flops == products + attention / 2
    assert network.dense.seconds["attention"] > 0
    assert network.dense.seconds["sparse"] == 0
    assert network.patched.seconds["sparse"] > 0


@pytest.mark.parametrize(
    ("run", "pairs"),
    [
        (lambda q: scaled_dot_product_attention(q, q, q), 60 * 60),
        (lambda q: window_attention(q, q, q, grid=(1, 6, 10), window_size=(1, 3, 5)), 60 * 15),
        (
            lambda q: neighborhood_attention(q, q, q, grid=(1, 6, 10), window_size=(1, 3, 3)),
            60 * 9,
        ),
        (
            lambda q: block_sparse_attention(
                q,
                q,
                q,
                torch.ones(1, 1, 6, 6, dtype=torch.bool, device="meta"),
                block_size=(10, 10),
            ),
            60 * 60,
        ),
    ],
    ids=["dense", "boxes", "neighborhood", "blocks"],
)
def test_attention_counts_its_pairs(run, pairs):
    trace = trace_of(lambda: run(meta(2, 3, 60, 8)))
    assert trace.flops == 4 * 2 * 3 * 8 * pairs
    assert trace.flops_of("attention", "sparse") == trace.flops


def test_products_and_convolutions_are_counted_as_what_they_are():
    linear, conv = nn.Linear(8, 12), nn.Conv2d(4, 6, 3, padding=1)
    linear.to("meta"), conv.to("meta")
    trace = trace_of(lambda: (linear(meta(5, 8)), conv(meta(2, 4, 7, 9))))
    assert trace.flops_of("product") == 2 * 5 * 8 * 12
    assert trace.flops_of("convolution") == 2 * 2 * 6 * 7 * 9 * 4 * 9


def test_memory_is_what_is_held_at_the_worst_moment():
    module = nn.Linear(10, 10, bias=False).to("meta")

    def run():
        a = meta(1000)  # held to the end
        b = meta(2000)
        c = b + 1  # 1000 + 2000 + 2000 floats, the peak
        del b, c
        return a + meta(500).sum()

    with tracing(module) as trace:
        run()
    assert trace.peak_bytes == 4 * (100 + 1000 + 2000 + 2000)


def test_what_a_layer_lets_go_is_not_counted_in_the_next():
    layers = [nn.Sequential(nn.Linear(8, 4000), nn.GELU(), nn.Linear(4000, 8)) for _ in range(4)]
    module = nn.Sequential(*layers).to("meta")
    x = meta(50, 8)
    with tracing(module) as trace:
        module(x)
    inside = 2 * 4 * 50 * 4000  # before and after the GELU of one layer
    assert inside < trace.peak_bytes - trace.weight_bytes < 1.2 * inside


def test_predicted_time_is_amount_times_rate():
    trace = trace_of(lambda: (torch.mm(meta(4, 5), meta(5, 6)), meta(100) + 1))
    rates = Rates(python=PythonCost(per_operator=0.5, per_site=7.0))
    for operation in trace.counts:
        rate = 2.0 if operation.kind == "product" else 3.0
        rates.points[operation.family] = [(7.0, 7.0 * rate)]
    cost = cost_of([(trace, 1)], rates)
    assert cost.seconds["product"] == pytest.approx(2.0 * 2 * 4 * 5 * 6)
    assert cost.seconds["memory"] == pytest.approx(3.0 * 800)
    assert cost.seconds["calls"] == pytest.approx(0.5 * trace.operators)
    assert cost.total == pytest.approx(sum(cost.seconds.values()))


def test_cost_of_a_run_is_the_mean_over_its_steps():
    short = trace_of(lambda: torch.mm(meta(4, 5), meta(5, 6)))
    long = trace_of(lambda: torch.mm(meta(8, 5), meta(5, 6)))
    rates = Rates(points={op.family: [(1.0, 1.0)] for t in (short, long) for op in t.counts})
    cost = cost_of([(short, 3), (long, 1)], rates)
    assert cost.total == pytest.approx((3 * 240 + 480) / 4)
    assert cost.flops == (3 * 240 + 480) / 4


def test_a_family_without_a_rate_takes_that_of_its_nearest_relative():
    points = {("product", "mm", 1, 1): [(1.0, 7.0)], ("convolution", 2): [(1.0, 9.0)]}
    rates = Rates(points=points, per_byte=5.0)
    product = next(iter(trace_of(lambda: torch.mm(meta(4, 5), meta(5, 6))).counts))
    addition = next(iter(trace_of(lambda: meta(10) + 1).counts))
    assert rates.time_of(product) == 7.0 * product.flops
    assert rates.time_of(addition) == 5.0 * addition.num_bytes


def test_seconds_lie_on_a_line_between_what_was_measured():
    rates = Rates(points={("product", "mm", torch.float32, 5, 6): [(120.0, 4.0), (240.0, 6.0)]})

    def predict(rows):
        return rates.time_of(
            next(iter(trace_of(lambda: torch.mm(meta(rows, 5), meta(5, 6))).counts))
        )

    assert [predict(rows) for rows in (1, 2, 3, 4, 8)] == pytest.approx([2, 4, 5, 6, 12])
    rates.per_byte = 0.02  # 164 bytes
    assert predict(1) == pytest.approx(0.02 * 4 * (5 + 30 + 6))


def test_weights_come_from_another_place_at_every_repetition():
    layer, x = nn.Linear(64, 32).to("meta"), meta(5, 64)
    with tracing(layer) as trace:
        layer(x)
    assert trace.weight_bytes == 4 * (64 * 32 + 32)
    ((operation, example),) = trace.examples.values()
    pool = Pool("cpu", 40 * trace.weight_bytes)
    first = pool.fill(operation, example)
    again = pool.renew(operation, example, first)
    assert all(a.shape == b.shape for a, b in zip(first.args, again.args, strict=True))
    assert again.args[1] is first.args[1]
    assert again.args[2].data_ptr() != first.args[2].data_ptr()
    assert first.args[2].std() == pytest.approx(1, abs=0.1)
    places = {pool.renew(operation, example, first).args[2].data_ptr() for _ in range(30)}
    assert len(places) == 30


@pytest.mark.parametrize(
    "run",
    [
        lambda: scaled_dot_product_attention(*[meta(2, 8, 5000, 64)] * 3),
        lambda: torch.mm(meta(40_000, 512), meta(512, 512)),
        lambda: torch.nn.functional.conv2d(meta(2, 64, 256, 256), meta(64, 64, 3, 3), padding=1),
        lambda: neighborhood_attention(
            *[meta(1, 4, 4 * 64 * 64, 64)] * 3, grid=(4, 64, 64), window_size=(4, 21, 21)
        ),
        lambda: window_attention(
            *[meta(1, 4, 8 * 64 * 64, 64)] * 3, grid=(8, 64, 64), window_size=(8, 32, 32)
        ),
    ],
    ids=["attention", "product", "convolution", "neighborhood", "boxes"],
)
def test_examples_too_large_to_measure_are_cut(run):
    trace = trace_of(run)
    ((operation, example),) = [held for held in trace.examples.values() if held[0].kind != "memory"]
    with torch.no_grad():
        smaller, flops = cut(operation, example)
    assert 0 < flops < operation.flops
    assert flops < 1e10
    assert smaller.function is example.function


def test_every_family_is_measured(encoder):
    model = build_networks(find_checkpoint(encoder))
    ids = torch.ones(1, TOKENS, dtype=torch.int64, device="meta")
    with tracing(model) as trace:
        model(input_ids=ids)
    rates = measure_rates([trace], "cpu")
    assert rates.unmeasured == {}
    worked = {operation.family for operation, _ in trace.examples.values() if operation.amount}
    assert set(rates.points) == worked
    assert all(x > 0 for points in rates.points.values() for point in points for x in point)


def test_steps_that_differ_are_all_counted(pipeline, monkeypatch):
    monkeypatch.setattr(sizes, "PROBES", ())  # break-even is looked at elsewhere
    request = Request(
        what="hidiffusion",
        parameters={},
        asked=AskedSize(width=64, height=64),
        steps=10,
    )
    plan = plan_checkpoint(find_checkpoint(pipeline), request)
    (network,) = plan.networks
    assert plan.steps == 10
    assert network.name == "unet"
    assert network.patched.flops < network.dense.flops


def test_break_even_lies_where_the_speed_passes_1():
    plan = network_plan({"attention": 2.0}, {"sparse": 1.0}, {25: 0.5, 400: 4.0})
    assert plan.speed == 2.0
    assert plan.break_even() == 50  # half way, on a logarithmic scale, from 25 to 100


@pytest.mark.parametrize(
    ("patched", "elsewhere", "expected"),
    [
        (1.0, {25: 1.0, 400: 1.0}, None),
        (1.0, {25: 1.0, 400: 0.7}, None),
        (0.8, {25: 1.1, 400: 1.2}, 0),
        (1.0, {25: 1 + 1e-12, 400: 1.2}, 100),
    ],
    ids=["no difference", "slower where it is large", "faster everywhere", "idle where small"],
)
def test_break_even_needs_a_gain_at_the_largest_size(patched, elsewhere, expected):
    plan = network_plan({"attention": 1.0}, {"sparse": patched}, elsewhere)
    assert plan.break_even() == expected


@pytest.mark.parametrize(
    ("dense", "patched", "elsewhere", "words"),
    [
        ((1.0, 1.0), (0.2, 1.0), {}, ("should make a call about 1.67x as fast", "takes 50%")),
        ((0.1, 9.9), (0.05, 9.9), {}, ("will not help here", "would give 1.01x")),
        ((1.0, 1.0), (3.0, 1.0), {}, ("will make a call slower here (0.50x", "slower at every")),
        ((1.0, 1.0), (0.2, 1.0), {25: 0.5}, ("Break-even is near",)),
        ((1.0, 1.0), (1.0, 1.0), {25: 1.0, 400: 1.0}, ("will not help", "makes little difference")),
        ((1.0, 1.0), (1.0, 1.0), {25: 1.0, 400: 0.7}, ("At the largest size", "400", "slower")),
    ],
    ids=["helps", "does not help", "harms", "break-even", "does nothing", "harms where large"],
)
def test_the_verdict_is_in_plain_words(dense, patched, elsewhere, words):
    plan = network_plan(
        {"attention": dense[0], "product": dense[1]},
        {"sparse": patched[0], "product": patched[1]},
        elsewhere,
    )
    assert all(word in verdict(plan, METHODS["window"]()) for word in words)


@pytest.mark.parametrize(
    ("method", "patched", "exact", "words"),
    [
        ("window", 0.1, 0.5, "exact alone, which leaves nothing out, gives 1.33x of that."),
        ("window", 0.5, 0.5, "gives 1.33x: take --method exact."),
        ("window", 3.0, 0.5, "gives 1.33x: take --method exact."),
        ("window", 0.1, 0.95, ""),
        ("window", 0.1, None, ""),
        ("exact", 0.5, 0.5, ""),
    ],
)
def test_how_much_of_the_gain_is_exact_is_said(method, patched, exact, words):
    plan = network_plan(
        {"attention": 1.0, "product": 1.0},
        {"sparse": patched, "product": 1.0},
        exact=exact and {"sparse": exact, "product": 1.0},
    )
    said = exact_words(plan, METHODS[method]())
    assert said.endswith(words)
    assert bool(said) == bool(words)
    assert not exact_words(plan, METHODS[method](), is_busy=True)


def test_a_patch_that_changes_nothing_is_named(run_command, encoder):
    options = ("-m", "window", "--tokens", 32, "--set", "window_size=32")
    answer = run_command("plan", encoder, *options)
    assert answer.code == 0, answer.err
    assert "window changes nothing at 32 tokens: every token sees all" in answer.out
    assert "should make a call" not in answer.out


def test_the_command_prints_a_prediction(run_command, encoder):
    answer = run_command("plan", encoder, "-m", "window", "--tokens", TOKENS, "--device", "cpu")
    assert answer.code == 0, answer.err
    for words in ("predicted time", "peak memory", "the size asked for", "of a dense call"):
        assert words in answer.out


def test_the_command_prints_json(run_command, encoder):
    answer = run_command("plan", encoder, "-m", "block-sparse", "--tokens", 320, "--json")
    assert answer.code == 0, answer.err
    (network,) = answer.json["networks"]
    assert answer.json["method"] == "block-sparse"
    assert len(answer.json["patched"]) == 2
    speed = network["dense"]["seconds"] / network["patched"]["seconds"]
    assert network["speed"] == pytest.approx(speed)
    assert network["verdict"]
    if native_supports("cpu", torch.float32, 16)[0]:
        exact = network["exact"]
        assert exact["parts"]["sparse"] > 0 == exact["parts"]["attention"]
        assert network["exact_speed"] == pytest.approx(
            network["dense"]["seconds"] / exact["seconds"]
        )
    else:
        assert network["exact"] is None


def test_what_follows_the_network_is_named(run_command):
    answer = run_command("plan", "rooms", "-m", "block-sparse", "--size", "32x32", "--frames", "2")
    assert answer.code == 0, answer.err
    assert "the camera, depth and point heads come on top" in " ".join(answer.out.split())


def test_on_a_busy_machine_there_is_no_verdict():
    plan = network_plan({"attention": 8.0, "product": 2.0}, {"attention": 1.0, "product": 2.0})
    assert "should make a call about 3.33x as fast" in verdict(plan, METHODS["window"]())
    said = verdict(plan, METHODS["window"](), is_busy=True)
    assert said.startswith("can't tell whether window helps here: the machine is busy.")
    assert "--threads 1" in said


@pytest.mark.parametrize(
    ("rates", "is_busy"),
    [
        (Rates(spread=0.1), False),
        (Rates(spread=0.4), True),
        (Rates(is_crowded=True), True),
    ],
    ids=["steady", "spread", "crowded"],
)
def test_a_machine_is_busy_by_other_programs_or_by_the_spread_of_passes(rates, is_busy):
    assert rates.is_busy is is_busy


@pytest.mark.parametrize(("threads", "is_crowded"), [(1, False), (2, True)])
def test_other_programs_count_where_the_clock_counts_their_time(threads, is_crowded, monkeypatch):
    monkeypatch.setattr("retrofit.runtime.machine.OtherPrograms.cores", lambda self: 1e3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert measure_rates([], "cpu").is_crowded is is_crowded
    finally:
        torch.set_num_threads(before)


def test_weights_are_not_read(run_command, encoder, copy_of):
    folder = copy_of(encoder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    answer = run_command("plan", folder, "-m", "window", "--tokens", TOKENS, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["machine"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --method or --recipe"),
        (("-m", "windows"), "windows"),
        (("-m", "window", "--size", "huge"), "expected WIDTHxHEIGHT"),
        (("-m", "window", "--size", "64x64"), "--size says nothing"),
        (("-m", "window", "--tokens", "0"), "--tokens"),
        (("-m", "window", "--steps", "0"), "--steps"),
        (("-m", "window", "--dtype", "int8"), "int8"),
        (("-m", "window", "--set", "keep=2"), "keep"),
        (("-m", "t3"), "t3"),
    ],
    ids=["none", "method", "size", "axis", "tokens", "steps", "dtype", "setting", "misfit"],
)
def test_wrong_input_is_one_line(run_command, encoder, arguments, message):
    answer = run_command("plan", encoder, *arguments)
    assert answer.code == 2
    assert answer.out == ""
    lines = [line for line in answer.err.strip().splitlines() if not line.endswith(" ...")]
    assert len(lines) == 1
    assert message in lines[0]


def test_an_operation_on_nothing_costs_its_call():
    trace = trace_of(lambda: meta(0, 3) + 1)
    rates = measure_rates([trace], "cpu")
    assert rates.time_of(next(iter(trace.counts))) == 0
    assert rates.time_of_calling(trace) > 0


def test_an_empty_trace_costs_nothing():
    assert cost_of([(Trace(), 1)], Rates()).total == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make", [tiny_models.make_wan, small_vggt, tiny_models.make_bert], ids=["wan", "vggt", "bert"]
)
def test_dtypes_are_those_of_the_loaded_network(make, dtype, tmp_path):
    make().save_pretrained(tmp_path)
    checkpoint = find_checkpoint(tmp_path)
    name = str(dtype).removeprefix("torch.")
    loaded = load_networks(checkpoint, [""], device="cpu", dtype=name)
    built = build_networks(checkpoint)
    set_dtype(built, dtype)
    for listed in (nn.Module.named_parameters, nn.Module.named_buffers):
        assert [(k, v.dtype) for k, v in listed(built)] == [(k, v.dtype) for k, v in listed(loaded)]


def test_half_precision_on_a_cpu_is_planned_as_it_is_run(run_command, tmp_path):
    tiny_models.make_bert(0).half().save_pretrained(tmp_path)
    size = ("--tokens", 48, "--device", "cpu")
    answer = run_command("plan", tmp_path, "-m", "window", *size, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["machine"]["dtype"] == "float32"

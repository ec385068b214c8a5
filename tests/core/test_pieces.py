"""The pieces of layers whose gradient is not autograd's, against float64 written out, with the kernels and without."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evenly.core.kernels import cpu, pieces
from evenly.nn import OnlineNorm, PowerNorm, PowerNormV

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [0, 1, 2, 3, 5, 8, 17, 31, 64, 101]

kernels = pytest.mark.skipif(not cpu.available(), reason="the kernels are not compiled")


@st.composite
def inputs(draw):
    """A tensor in some order of memory, and the axes that keep a statistic."""
    shape = draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4))
    while math.prod(shape) > 40_000:
        shape[shape.index(max(shape))] = 2
    order = draw(st.permutations(range(len(shape))))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 99)))

    def make() -> torch.Tensor:
        x = (torch.randn([shape[axis] for axis in order]) * 2 + 1).to(dtype)
        return x.permute([order.index(axis) for axis in range(len(shape))])

    kept = sorted(draw(st.sets(st.integers(0, len(shape) - 1))))
    x, g = make(), make()
    if draw(st.booleans()) and draw(st.booleans()):
        g = g.contiguous()  # another order than that of x
    if draw(st.booleans()) and draw(st.booleans()) and shape[0] > 1:
        x, g = x[::2], g[::2]  # with gaps
    if kept and kept[-1] == len(shape) - 1 and draw(st.booleans()):
        kept[-1] = -1
    return x, g, kept


@pytest.fixture(params=["kernels", "reference"])
def computed_by(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(pieces, "available", lambda x: False)
    elif not cpu.available():
        pytest.skip("the kernels are not compiled")
    return request.param


def spread(number, x, kept):
    axes = [axis % x.ndim for axis in kept]
    return number.view([x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)])


def total(v, kept):
    axes = [axis for axis in range(v.ndim) if axis not in [k % v.ndim for k in kept]]
    return v.sum(axes) if axes else v


def numbers(x, kept, dtype=torch.float64):
    return torch.randn([x.shape[axis] for axis in kept]).to(dtype)


@pytest.mark.usefixtures("computed_by")
class TestEachPiece:
    @staticmethod
    def near(got, want, size, dtype):
        """Relative to what was added up."""
        assert got.dtype == torch.float64
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got / (1 + size), want / (1 + size), rtol=0, atol=tolerance)

    @given(inputs())
    def test_sums_of_squares(self, case):
        x, _, kept = case
        want = total(x.double().square(), kept)
        self.near(pieces.sums_of_squares(x, kept), want, want, x.dtype)

    @given(inputs(), st.booleans())
    def test_sums_of_pairs(self, case, centred):
        x, g, kept = case
        mean = numbers(x, kept) if centred else None
        d = x.double() if mean is None else x.double() - spread(mean, x, kept)
        first, second = pieces.sums_of_pairs(g, x, kept, mean)
        self.near(first, total(g.double(), kept), total(g.double().abs(), kept), x.dtype)
        self.near(second, total(g.double() * d, kept), total((g.double() * d).abs(), kept), x.dtype)

    @given(inputs(), st.booleans(), st.booleans(), st.booleans())
    def test_maps(self, case, centred, shifted, single):
        x, g, kept = case
        dtype = torch.float32 if single else torch.float64
        mean = numbers(x, kept, dtype) if centred else None
        shift = numbers(x, kept, dtype) if shifted else None
        slope, gain = numbers(x, kept, dtype), numbers(x, kept, dtype)
        want = x.double() if mean is None else x.double() - spread(mean, x, kept)
        want = want * spread(slope, x, kept)
        if shift is not None:
            want = want + spread(shift, x, kept)
        for y, expected in [
            (pieces.scale(x, kept, slope, shift, mean), want),
            (pieces.combine(g, x, kept, gain, slope, shift, mean), want + g.double() * spread(gain, x, kept)),
        ]:
            assert y.dtype == x.dtype
            assert y.shape == x.shape
            torch.testing.assert_close(y.double(), expected.double(), rtol=EXACT[x.dtype], atol=EXACT[x.dtype])

    @given(inputs(), st.booleans())
    def test_clip(self, case, moved):
        x, g, kept = case
        mean, shift = (numbers(x, kept), numbers(x, kept)) if moved else (None, None)
        slope, limit = numbers(x, kept), 1.3
        z = x.double() if mean is None else x.double() - spread(mean, x, kept)
        z = z * spread(slope, x, kept)
        if shift is not None:
            z = z + spread(shift, x, kept)
        y = pieces.clip(x, kept, limit, slope, shift, mean)
        torch.testing.assert_close(y.double(), z.clamp(-limit, limit), rtol=EXACT[x.dtype], atol=EXACT[x.dtype])
        back = pieces.clip(x, kept, limit, slope, shift, mean, grad=g)
        far = (z.abs() - limit).abs() > 1e-5 * (1 + z.abs())  # not at the edge
        assert torch.equal(back[far], torch.where(z.abs() <= limit, g, torch.zeros_like(g))[far])

    def test_clip_at_the_edges(self):
        x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0, float("nan"), float("inf")] * 9])
        one = torch.ones(1)
        torch.testing.assert_close(pieces.clip(x, [0], 1.0, one), x.clamp(-1, 1), equal_nan=True)
        want = ((x >= -1) & (x <= 1)).float()
        assert torch.equal(pieces.clip(x, [0], 1.0, one, grad=torch.ones_like(x)), want)

    @given(st.integers(1, 90), st.sampled_from([1, 2, 7, 130]), st.booleans(), st.booleans(), st.integers(0, 99))
    def test_scan(self, steps, width, constant, single, seed):
        torch.manual_seed(seed)
        dtype = torch.float32 if single else torch.float64
        a = 0.93 if constant else 1 - 3 * torch.rand(steps, width, dtype=dtype)  # below -1 too
        v, state = torch.randn(steps, width, dtype=dtype), torch.randn(width, dtype=dtype)
        before, last = pieces.scan(a, v, state)
        assert before.dtype == last.dtype == dtype
        state, largest, tolerance = state.double(), 1.0, 1e-5 if single else 1e-12
        for t in range(steps):
            torch.testing.assert_close(before[t].double(), state, rtol=0, atol=tolerance * largest)
            state = (a if constant else a[t].double()) * state + v[t].double()
            largest = max(largest, float(state.abs().max()))
        torch.testing.assert_close(last.double(), state, rtol=0, atol=tolerance * largest)

    def test_what_float_cannot_hold(self):
        for size in (1e-25, 1e25):
            for shape, kept in [((3, 50), [0]), ((50, 3), [1])]:
                x = torch.randn(shape) * size
                want = total(x.double().square(), kept)
                got = pieces.sums_of_squares(x, kept)
                if pieces.available(x):
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)

    def test_means_far_from_zero(self):
        x = torch.randn(4, 1000, dtype=torch.float64) + 1e4
        mean = x.float().double().mean(1)
        y = pieces.scale(x.float(), [0], torch.ones(4), mean=mean)
        want = x.float().double() - mean.view(-1, 1)
        # the mean is not rounded to float32, which would shift everything by up to 5e-4
        torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-6 if pieces.available(y) else 1e-3)


# ---- layers in one pass ---------------------------------------------------------------------------------------------


def steps_of(layer, batches, training_steps=3):
    """Outputs, gradients and state of a layer over some steps."""
    out = []
    for x, grad in batches[:training_steps]:
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        y.backward(grad)
        out += [y.detach(), leaf.grad, *[p.grad.clone() for p in layer.parameters()]]
    return out + [b.clone() for b in layer.state_dict().values()]


ROWS = [((5, 7), (1, 1), (3, 4, 3, 3)), ((300, 130), (2, 9001)), ((70_000, 4),)]


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", ROWS, ids=str)
def test_rows_of_an_optimizer(shapes, dtype, monkeypatch):
    torch.manual_seed(0)
    pairs = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for shape in shapes]
    got = pieces.row_products(pairs)
    want = torch.cat([pieces._row_products(g.double(), x.double()) for g, x in pairs], 1)
    close = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got, want, rtol=close, atol=close * float(want.max()))
    for g, x in pairs:
        slope = torch.randn(len(x), dtype=torch.float64)
        moved, twin = x.clone(), x.clone()
        pieces.advance_rows(moved, g, -0.3, slope)
        with monkeypatch.context() as patch:
            patch.setattr(pieces, "available", lambda t: False)
            pieces.advance_rows(twin, g, -0.3, slope)
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(moved, twin, rtol=tolerance, atol=3 * tolerance)


@kernels
def test_products_of_rows_that_float_cannot_hold():
    x = torch.tensor([[1e25, 1.0], [1e-30, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    got = pieces.row_products([(x, x)])
    assert got[0, 0] == pytest.approx(1e50) and got[0, 1] < 1e-37
    assert got[:, 2].isnan().all() and got[:, 3].isinf().all()


LAYERS = {
    "power": lambda c, g, **o: PowerNorm(c, warmup_iters=0, group_num=g, **o),
    "power, warm-up": lambda c, g, **o: PowerNorm(c, warmup_iters=2, group_num=g, **o),
    "power, batch": lambda c, g, **o: PowerNorm(c, warmup_iters=1, group_num=g, backward_scale="batch", **o),
    "power, no groups": lambda c, g, **o: PowerNorm(c, warmup_iters=0, group_scaling=False, **o),
    "power, plain": lambda c, g, **o: PowerNorm(c, warmup_iters=1, group_num=g, affine=False, **o),
    "power v": lambda c, g, **o: PowerNormV(c, **o),
    "online": lambda c, g, **o: OnlineNorm(c, 0.9, 0.8, **o),
    "online, groups": lambda c, g, **o: OnlineNorm(c, 0.9, 0.8, group_size=c // g, **o),
    "online, no guard": lambda c, g, **o: OnlineNorm(c, 0.9, 0.8, guard="none", **o),
    "online, clamp": lambda c, g, **o: OnlineNorm(c, 0.9, 0.8, guard="activation_clamping", clamp_value=1.5, **o),
    "online, plain": lambda c, g, **o: OnlineNorm(c, 0.9, 0.8, affine=False, **o),
}


def randomized(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand_like(p) + 0.5)
    return layer


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "groups", "size"), [(1, 1, 1), (7, 3, 5), (40, 2, 65), (130, 4, 64), (3, 1, 600)])
@pytest.mark.parametrize("name", LAYERS)
def test_one_pass_is_the_layer(name, rows, groups, size, dtype, monkeypatch):
    """The kernels in this dtype against PyTorch's operators in float64."""
    check_layer(LAYERS[name](groups * size, groups), (rows, groups * size), dtype, monkeypatch)


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize(("n", "groups", "size", "positions"), [(5, 2, 3, (7, 9)), (1, 1, 1, (2,)), (3, 4, 40, (3, 3))])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("online")])
def test_online_normalization_of_images(name, n, groups, size, positions, channel_dim, dtype, monkeypatch):
    """The same where the kernels are loops over numbers of samples and channels, and maps."""
    c = groups * size
    shape = (n, c, *positions) if channel_dim == 1 else (n, *positions, c)
    check_layer(LAYERS[name](c, groups, channel_dim=channel_dim), shape, dtype, monkeypatch)


def check_layer(layer, shape, dtype, monkeypatch):
    torch.manual_seed(0)
    batches = [((torch.randn(shape) * 2 + 1).to(dtype), torch.randn(shape).to(dtype)) for _ in range(3)]
    layer = randomized(layer).to(torch.float64 if dtype == torch.float64 else torch.float32)
    exact = copy.deepcopy(layer).double()
    got = steps_of(layer, batches)
    monkeypatch.setattr(pieces, "available", lambda x: False)
    want = steps_of(exact, [(x.double(), g.double()) for x, g in batches])
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for p, q in zip(got, want, strict=True):
        largest = max(1.0, float(q.abs().max()))
        torch.testing.assert_close(p.double() / largest, q.double() / largest, rtol=tolerance, atol=tolerance)


def same_bits_with_any_threads(compute):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@kernels
@pytest.mark.parametrize(
    ("name", "shape"), [(name, (331, 264)) for name in LAYERS] + [("online, groups", (40, 264, 3, 3))]
)
def test_bits_do_not_depend_on_the_number_of_threads(name, shape):
    torch.manual_seed(0)
    batches = [(torch.randn(shape) * 2 + 1, torch.randn(shape)) for _ in range(3)]
    layer = randomized(LAYERS[name](264, 4))
    same_bits_with_any_threads(lambda: steps_of(copy.deepcopy(layer), batches))


@kernels
@pytest.mark.parametrize(("shape", "kept"), [((9, 16, 33, 31), [1]), ((40, 2000), [0]), ((3000, 50), [1])])
@pytest.mark.parametrize("last", [False, True])
def test_pieces_do_not_depend_on_the_number_of_threads(shape, kept, last):
    torch.manual_seed(0)
    x, g = torch.randn(shape), torch.randn(shape)
    if last and x.ndim == 4:
        x, g = x.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)
    gain, slope, shift = (numbers(x, kept) for _ in range(3))
    v = torch.randn(300, 1000)
    same_bits_with_any_threads(
        lambda: [
            pieces.sums_of_squares(x, kept),
            *pieces.sums_of_pairs(g, x, kept, shift),
            pieces.combine(g, x, kept, gain, slope, shift, slope),
            pieces.row_products([(g.contiguous(), x.contiguous())]),
            *pieces.scan(0.9, v, v[0]),
        ]
    )


@kernels
def test_a_long_stream_in_float32():
    """What rounding takes from the state of a recursion comes back: a drift would grow with the length."""
    torch.manual_seed(0)
    layer = OnlineNorm(8, 0.9999, 0.999)
    exact = copy.deepcopy(layer).double()
    for _ in range(3):
        x, grad = torch.randn(20_000, 8) * 3 + 50, torch.randn(20_000, 8)
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        layer(leaf).backward(grad)
        exact(twin).backward(grad.double())
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=2e-5, atol=2e-6)
    for p, q in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=1e-5)


@kernels
def test_nothing_but_the_input_is_kept():
    x = torch.randn(64, 256, requires_grad=True)
    for name in ("power", "online"):
        layer = LAYERS[name](256, 4)
        kept: dict[int, int] = {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            layer(x)
        assert sum(kept.values()) < 1.2 * x.untyped_storage().nbytes()


@kernels
def test_power_v_has_second_derivatives():
    layer = randomized(PowerNormV(3, dtype=torch.float64))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(copy.deepcopy(layer), {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@kernels
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_extreme_scale(size):
    torch.manual_seed(0)
    for name in ("power", "power, warm-up", "power v"):
        layer = LAYERS[name](8, 2)
        exact = copy.deepcopy(layer).double()
        x, grad = torch.randn(50, 8) * size, torch.randn(50, 8)
        leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
        y, z = layer(leaf), exact(twin)
        y.backward(grad)
        z.backward(grad.double())
        torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-5 * float(z.abs().max()))
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-5 * float(twin.grad.abs().max()))


@kernels
@pytest.mark.parametrize("name", LAYERS)
def test_memory_order_does_not_matter(name):
    """Inputs and gradients that are transposed, or have gaps."""
    torch.manual_seed(0)
    layer = randomized(LAYERS[name](12, 3))
    x, grad = torch.randn(20, 12), torch.randn(20, 12)
    want = steps_of(copy.deepcopy(layer), [(x, grad)])
    for change in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]):
        leaf = change(x).detach().requires_grad_()
        twin = copy.deepcopy(layer)
        y = twin(leaf)
        y.backward(change(grad))
        got = [y.detach(), leaf.grad, *[p.grad for p in twin.parameters()], *twin.state_dict().values()]
        for p, q in zip(got, want, strict=True):
            torch.testing.assert_close(p, q)

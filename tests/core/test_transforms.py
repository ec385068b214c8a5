"""`normalize` under torch.compile, torch.func, autocast, threads and repeated runs."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import evenly

CALLS = {
    "batch": ("n c h w -> c", {}),
    "group": ("n (g c) h w -> n g", {"g": 2}),
    "instance": ("n c h w -> n c", {}),
    "layer": ("... d -> ...", {}),
    "rms": ("... d -> ...", {"center": False, "scale": "rms"}),
    "l2": ("n c h w -> n h w", {"center": False, "scale": "l2"}),
    "l1": ("n c h w -> n", {"scale": "l1"}),
    "max": ("n c h w -> n", {"scale": "max"}),
    "fused": ("n c h w -> c", {"activation": "silu"}),
    "by": ("n c h w -> c", {"by": torch.tensor([0, 1, 0]), "num_groups": 2}),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
def test_compile_fullgraph(name):
    pattern, options = CALLS[name]

    def run(x, residual, mask):
        return evenly.normalize(x, pattern, residual=residual, mask=mask, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x, requires_grad=True)
    seed = torch.randn_like(x)
    mask = torch.rand(3, 4, 5, 6) < 0.8
    want, got = run(x, r, mask), compiled(x, r, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(want, (x, r), seed), torch.autograd.grad(got, (x, r), seed), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


def test_compile_moments_and_whiten():
    x = torch.randn(12, 4, 5, dtype=torch.float64)
    run = torch.compile(lambda x: evenly.moments(x, "n c h -> c")[:2], fullgraph=True, backend="eager")
    for a, b in zip(run(x), evenly.moments(x, "n c h -> c")[:2], strict=True):
        torch.testing.assert_close(a, b)
    run = torch.compile(lambda x: evenly.whiten(x, "n c h -> c"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), evenly.whiten(x, "n c h -> c"))


@pytest.mark.parametrize("name", ["batch", "group", "layer", "l2"])
def test_compile_dynamic_shapes(name):
    """One graph for all sizes, without a graph break."""
    pattern, options = CALLS[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x: evenly.normalize(x, pattern, **options), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in [(3, 4, 5, 6), (2, 6, 3, 4), (5, 8, 2, 9), (7, 4, 6, 2)]:
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(run(x), evenly.normalize(x, pattern, **options), rtol=1e-12, atol=1e-12)
    assert counter.frame_count <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_inductor():
    def run(x, w):
        return evenly.normalize(x, "n c h w -> c", weight=w, activation="relu")

    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    w = torch.randn(4, requires_grad=True)
    want, got = run(x, w), torch.compile(run, fullgraph=True)(x, w)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    seed = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(want, (x, w), seed), torch.autograd.grad(got, (x, w), seed), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_vmap(name):
    pattern, options = CALLS[name]
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)

    def run(x):
        return evenly.normalize(x, pattern, **options)

    want = torch.stack([run(t) for t in x])
    torch.testing.assert_close(vmap(run)(x), want, rtol=1e-12, atol=1e-12)
    y = x.movedim(0, 2).contiguous()
    torch.testing.assert_close(vmap(run, in_dims=2, out_dims=2)(y), want.movedim(0, 2), rtol=1e-12, atol=1e-12)


def test_vmap_over_every_tensor():
    x, w, r = torch.randn(3, 5, 4), torch.randn(3, 4), torch.randn(3, 5, 4)
    mask = torch.rand(3, 5, 4) < 0.7

    def run(x, w, r, m):
        return evenly.normalize(x, "n c -> c", weight=w, bias=w, residual=r, mask=m)

    want = torch.stack([run(*a) for a in zip(x, w, r, mask, strict=True)])
    torch.testing.assert_close(vmap(run)(x, w, r, mask), want, rtol=1e-5, atol=1e-5)
    want = torch.stack([run(x[0], a, r[0], mask[0]) for a in w])
    torch.testing.assert_close(vmap(run, in_dims=(None, 0, None, None))(x[0], w, r[0], mask[0]), want)


@pytest.mark.parametrize("name", CALLS)
def test_func_grad_and_jacobians(name):
    pattern, options = CALLS[name]
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64)

    def run(x):
        return evenly.normalize(x, pattern, **options)

    def loss(x):
        return run(x).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(x), want, rtol=1e-12, atol=1e-12)
    jac = torch.autograd.functional.jacobian(run, x)
    torch.testing.assert_close(jacrev(run)(x), jac, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jacfwd(run)(x), jac, rtol=1e-11, atol=1e-11)
    t = torch.randn_like(x)
    _, tangent = jvp(run, (x,), (t,))
    torch.testing.assert_close(tangent, torch.tensordot(jac, t, dims=4), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grad(lambda v: grad(loss)(v).pow(2).sum())(x).isfinite(), torch.ones_like(x).bool())


def test_per_sample_gradients():
    w = torch.randn(4, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    def loss(w, x):
        return evenly.normalize(x, "... d -> ...", weight=w).pow(3).sum()

    got = vmap(grad(loss), in_dims=(None, 0))(w, x)
    torch.testing.assert_close(got, torch.stack([grad(loss)(w, t) for t in x]), rtol=1e-12, atol=1e-12)


def test_functional_call_of_a_layer():
    layer = evenly.nn.LayerNorm(4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    params = {k: v.detach() for k, v in layer.named_parameters()}
    g = grad(lambda p: functional_call(layer, p, (x,)).pow(2).sum())(params)
    assert set(g) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """Under autocast a half input is normalized with statistics of float32, and gradients flow to float32 leaves."""
    x = torch.randn(6, 8, requires_grad=True)
    lin = torch.nn.Linear(8, 8)
    w = torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        h = lin(x)
        assert h.dtype == dtype
        for pattern in ["n c -> c", "... d -> ..."]:
            y = evenly.normalize(h, pattern, weight=w)
            assert y.dtype in (dtype, torch.float32)
            want = evenly.normalize(h.double(), pattern, weight=w.double())
            torch.testing.assert_close(y.double(), want, rtol=2**-7, atol=1e-4)
            # float32 in is not rounded to half.
            z = evenly.normalize(x, pattern, weight=w)
            assert z.dtype == torch.float32
            torch.testing.assert_close(z, evenly.normalize(x.double(), pattern).float(), rtol=1e-5, atol=1e-5)
        y.float().pow(3).sum().backward()
    assert w.grad.dtype == torch.float32
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_the_same_result_every_time():
    x = torch.randn(8, 16, 9, 9)
    for (pattern, options), how in itertools.product(CALLS.values(), [torch.float32, torch.bfloat16]):
        opts = {**options, "by": torch.arange(8) % 2} if "by" in options else options
        runs = []
        for _ in range(3):
            leaf = x.to(how, copy=True).requires_grad_()
            y = evenly.normalize(leaf, pattern, **opts)
            y.pow(3).sum().backward()
            runs.append((y, leaf.grad))
        for y, g in runs[1:]:
            assert torch.equal(y, runs[0][0])
            assert torch.equal(g, runs[0][1])


def test_concurrent_calls():
    """Many threads, many patterns (some new to the cache): every result as in one thread, bit for bit."""
    jobs = []
    for i in range(60):
        names = [f"{n}{i % 20}" for n in "ncd"]
        kept = names[i % 3]
        jobs.append((torch.randn(5, 4 + i % 3, 6), f"{' '.join(names)} -> {kept}"))

    def run(job):
        x, pattern = job
        leaf = x.clone().requires_grad_()
        y = evenly.normalize(leaf, pattern, scale=["std", "l2", "max"][len(pattern) % 3], activation="gelu")
        y.pow(2).sum().backward()
        return y.detach(), leaf.grad

    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(run, jobs, chunksize=1))
    for (y, g), job in zip(threaded, jobs, strict=True):
        y1, g1 = run(job)
        assert torch.equal(y, y1)
        assert torch.equal(g, g1)


def test_works_on_meta_tensors():
    x = torch.empty(3, 4, 5, device="meta")
    y = evenly.normalize(x, "n c h -> c", weight=torch.empty(4, device="meta"), activation="relu")
    assert y.device.type == "meta"
    assert y.shape == x.shape
    assert evenly.moments(x, "n c h -> c").mean.shape == (4,)


def test_subclass_parameter_input():
    p = torch.nn.Parameter(torch.randn(4, 6))
    evenly.normalize(p, "o i -> o").sum().backward()
    assert p.grad is not None

"""Compile the CUDA kernels for a device that need not be there; run by ``test_cuda_kernels.py``.

Launches are recorded and not made: each kernel is compiled down to machine code for the arguments that it was
launched with. What Triton's interpreter lets pass and its compiler does not is found here.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import evenly
from evenly.core.kernels import cuda
from evenly.core.kernels.cuda import entry as launches
from evenly.core.kernels.cuda import kernels
from evenly.core.kernels.launch import serve

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
}  # fmt: skip
OPTIONS = ("num_warps",)


class Recorder:
    """Stands for a kernel: a launch compiles it."""

    seen: ClassVar[dict[tuple[Any, ...], tuple[str, int]]] = {}

    def __init__(self, kernel: Any, target: GPUTarget) -> None:
        self.kernel = kernel
        self.target = target

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        apart = {p.name for p in self.kernel.params if p.do_not_specialize}
        for number, (name, value) in enumerate(bound.arguments.items()):
            parameter = self.kernel.params[number]
            one = type(value) is int and value == 1 and name not in apart
            if parameter.is_constexpr or value is None or one:
                signature[name] = "constexpr"
                constants[(number,)] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(number,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and name not in apart:
                    attributes[(number,)] = [["tt.divisibility", 16]]
        key = (self.kernel.fn.__name__, str(signature), str(constants), str(attributes), str(options))
        if key in self.seen:
            return
        source = ASTSource(self.kernel, signature, constants, attributes)
        made = triton.compile(source, target=self.target, options=options)
        self.seen[key] = self.kernel.fn.__name__, len(made.asm["cubin"])


def problems(quick: bool) -> list[tuple[str, tuple[int, ...], dict[str, Any], bool]]:
    """Pattern, shape, options, channels-last: one for each of the ways through the kernels."""
    found = [
        ("... d -> ...", (4096, 768), {"affine": "d"}, False),
        ("n c h w -> c", (32, 64, 56, 56), {"affine": "c", "activation": "relu", "residual": True}, False),
        ("n c h w -> c", (8, 64, 28, 28), {"affine": "c", "activation": "silu"}, True),
        (
            "n c l -> c",
            (32, 64, 500),
            {"affine": "c", "activation": "relu", "residual": True, "mask": (32, 1, 500)},
            False,
        ),
    ]
    if not quick:
        found += [
            ("n (g c) h w -> n g", (8, 256, 28, 28), {"affine": "(g c)", "g": 32, "activation": "gelu"}, False),
            ("n c h w -> c", (8, 256, 28, 28), {"affine": "c", "activation": "relu", "residual": True}, False),
            ("... d -> ...", (64, 40000), {"affine": "d"}, False),
            ("... d -> ...", (64, 300), {"center": False, "scale": "l2"}, False),
            ("n c l -> n c", (64, 30, 50), {"affine": "c l", "center": False, "scale": "rms"}, False),
            ("n c h w -> c", (8, 64, 28, 28), {"affine": "c", "activation": "silu", "mask": (8, 1, 28, 28)}, True),
            ("... d -> ...", (64, 768), {"affine": "d", "residual": True, "mask": (64, 1)}, False),
            ("n c l -> n c", (64, 30, 50), {"affine": "c l", "activation": "gelu", "mask": (64, 1, 50)}, False),
        ]
    return found


def main() -> None:
    """Compile, and print one line for each kernel."""
    quick = "--quick" in sys.argv
    target = GPUTarget("cuda", 80 if "--sm80" in sys.argv else 90, 32)
    serve("cpu", cuda.load)
    launches._on = lambda x: launches._here
    launches._multiprocessors = lambda device: 132
    for name in kernels.__all__:
        setattr(kernels, name, Recorder(getattr(kernels, name), target))
    dtypes = (torch.float32,) if quick else (torch.float32, torch.bfloat16, torch.float64)
    for dtype in dtypes:
        for pattern, shape, options, last in problems(quick):
            if dtype == torch.float64 and options.get("scale") == "l2":
                continue
            x = torch.empty(shape, dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            options = dict(options)
            leaf = x.requires_grad_()
            extra = torch.empty_like(x).requires_grad_() if options.pop("residual", False) else None
            if "mask" in options:
                options["mask"] = torch.empty(options["mask"], dtype=torch.bool)
            weight = None
            if "affine" in options:
                size = {"d": shape[-1:], "c": shape[1:2], "(g c)": shape[1:2], "c l": shape[1:]}[options["affine"]]
                weight = torch.empty(size, dtype=dtype, requires_grad=True)
            y = evenly.normalize(leaf, pattern, weight=weight, bias=weight, residual=extra, **options)
            y.sum().backward()
    for name, size in Recorder.seen.values():
        print(f"{name:16s} {size} bytes of machine code")
    missing = set(kernels.__all__) - {name for name, _ in Recorder.seen.values()}
    print(f"compiled {len(Recorder.seen)} for sm_{target.arch}; never launched: {', '.join(sorted(missing)) or 'none'}")


if __name__ == "__main__":
    main()

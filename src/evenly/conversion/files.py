"""Files of the conversion: weights in, weights out, calibration inputs. Nothing is ever unpickled freely.

Weights are read from safetensors, or by ``torch.load(weights_only=True)``, which refuses anything but tensors and
plain containers. They are written to a temporary file beside the target, which then takes its place, so that a
crash leaves the old file or the new one. The file also says how the network was changed, and
:func:`load_converted` changes a fresh network in the same way before it loads the weights.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenly.conversion.affine import ChannelAffine
from evenly.conversion.convert import add_missing_bias, layer_options, new_layer, nothing, swap
from evenly.conversion.linear import LINEAR, out_features
from evenly.conversion.report import Report
from evenly.conversion.sources import norm_layers

__all__ = [
    "InputFiles",
    "build",
    "call_factory",
    "load_converted",
    "load_weights",
    "save_converted",
    "write_atomically",
]

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_ARRAYS = {".npy", ".safetensors"}


def call_factory(spec: str) -> Any:
    """What ``module:factory`` gives, called without arguments; the current folder is searched too.

    Raises:
        ValueError: the spec has another form, the module or the factory is not there.
    """
    module_name, _, factory = spec.partition(":")
    if not module_name or not factory:
        raise ValueError(f"--model {spec!r} is not of the form module:factory, such as mypackage.nets:resnet18.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"--model {spec!r}: {error}.") from error
    if not callable(getattr(module, factory, None)):
        raise ValueError(f"--model {spec!r}: {module_name} has no callable named {factory!r}.")
    return getattr(module, factory)()


def build(spec: str) -> nn.Module:
    """The network that ``module:factory`` gives; see :func:`call_factory`.

    Raises:
        ValueError: also if no network comes back.
    """
    model = call_factory(spec)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {spec!r} gave a {type(model).__name__}, expected a torch.nn.Module.")
    return model


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a ``.safetensors`` file or a ``torch.save`` file of tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds anything but tensors; it is not unpickled then.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is not a safetensors file: {error}.") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} holds more than tensors, or is damaged, and was not loaded. Save model.state_dict(), or better a "
            f".safetensors file. ({str(error).splitlines()[0]})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} is not a state dict: expected names and tensors.")
    return dict(state)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    file = Path(path)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_converted(model: nn.Module, original: nn.Module, report: Report, path: str | Path) -> None:
    """Write a converted network's weights, with what :func:`load_converted` needs to rebuild it.

    Args:
        model: the converted network.
        original: the network before, whose architecture a factory gives.
        report: of the conversion.
        path: a ``.safetensors`` file.
    """
    from safetensors.torch import save

    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors, which is the format written.")
    state = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    write_atomically(path, save(state, metadata={"format": "pt", "evenly": json.dumps(_plan(model, original, report))}))


def load_converted(model: nn.Module, path: str | Path) -> nn.Module:
    """A converted network from its file and a fresh network of the original architecture.

    Args:
        model: what the factory gives; it is not changed.
        path: written by :func:`save_converted` or ``evenly convert --out``.

    Raises:
        ValueError: the file was not written by a conversion, or of another architecture.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as stream:
        metadata = stream.metadata() or {}
    if "evenly" not in metadata:
        raise ValueError(f"{path} does not say how its network was converted; it was not written by evenly.")
    plan = json.loads(metadata["evenly"])
    result = copy.deepcopy(model)
    sources = {s.name: s for s in norm_layers(result)}
    new: dict[nn.Module, nn.Module] = {}
    for name, what in plan["layers"].items():
        if name not in sources:
            raise ValueError(f"{path}: the network has no normalization layer named {name!r}; it is another one.")
        source = sources[name]
        if what["layer"] == "nothing":
            layer = nothing(source)
        else:
            layer = new_layer(source, what["layer"], what["groups"], layer_options(source, result))
            if what["bias"]:
                add_missing_bias(layer, source.num_features)
        layer.train(source.module.training)
        new[source.module] = layer
    result = swap(result, new)
    for name in plan["biases"]:
        module: Any = result.get_submodule(name)
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(out_features(module)))
    result.load_state_dict(load_weights(path))
    return result


def _plan(model: nn.Module, original: nn.Module, report: Report) -> dict[str, Any]:
    layers: dict[str, Any] = {}
    for row in report.rows:
        if row.statistics == "kept":
            continue
        layer: Any = model.get_submodule(row.name)
        whole = report.target not in ("none", "folded") or isinstance(layer, ChannelAffine)
        layers[row.name] = {
            "layer": report.target if whole else "nothing",
            "groups": getattr(layer, "num_groups", None) if report.target == "group" else None,
            "bias": getattr(layer, "bias", None) is not None,
        }
    before = dict(original.named_modules())
    biases = [
        name
        for name, m in model.named_modules()
        if isinstance(m, LINEAR) and m.bias is not None and getattr(before.get(name), "bias", None) is None
    ]
    return {"layers": layers, "biases": biases}


class InputFiles:
    """Unlabelled inputs of a folder, batch by batch, in the order of their names; read again at each pass.

    A folder holds images (at any depth), or ``.npy`` and ``.safetensors`` files of batches of inputs; a single such
    file will do as well. Images are scaled to [0, 1] and then standardized with ``mean`` and ``std``.

    Args:
        path: the folder or file.
        batch_size: images a batch.
        size: (height, width) that images are resized to; ``None``: as they are, all of one size.
        mean, std: one number a channel, or one for all.
        gray: read images with one channel.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int = 50,
        size: tuple[int, int] | None = None,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        gray: bool = False,
    ) -> None:
        root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"There is no file or folder {root}.")
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        self.arrays = [p for p in files if p.suffix.lower() in _ARRAYS]
        self.images = [p for p in files if p.suffix.lower() in _IMAGES]
        if bool(self.arrays) == bool(self.images):
            found = "both images and arrays" if self.arrays else "neither"
            raise ValueError(f"{root} holds {found}; expected images, or .npy or .safetensors files of inputs.")
        if any(s <= 0 for s in std):
            raise ValueError(f"std={std} must be positive.")
        self.batch_size, self.size, self.gray = batch_size, size, gray
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))

    def __iter__(self) -> Iterator[Any]:
        for file in self.arrays:
            yield from _array(file)
        for i in range(0, len(self.images), self.batch_size):
            yield self._batch(self.images[i : i + self.batch_size])

    def _batch(self, files: list[Path]) -> Tensor:
        from PIL import Image

        images: list[Tensor] = []
        for file in files:
            with Image.open(file) as opened:
                image = opened.convert("L" if self.gray else "RGB")
                if self.size is not None:
                    image = image.resize((self.size[1], self.size[0]))
                pixels = torch.tensor(np.asarray(image), dtype=torch.float32) / 255
            pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"{file} has {pixels.shape[1]}x{pixels.shape[2]} pixels, {files[0]} "
                    f"{images[0].shape[1]}x{images[0].shape[2]}: give --size HEIGHTxWIDTH."
                )
            images.append(pixels)
        return (torch.stack(images) - self.mean) / self.std


def _array(file: Path) -> Iterator[Any]:
    """One file is one batch: an array, or named tensors that become keyword arguments (one tensor: the input)."""
    if file.suffix == ".npy":
        try:
            yield torch.from_numpy(np.load(file, allow_pickle=False))
        except ValueError as error:
            raise ValueError(f"{file} is not a plain array and was not loaded: {error}") from error
        return
    tensors = load_weights(file)
    yield next(iter(tensors.values())) if len(tensors) == 1 else tensors


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Linear layers and convolutions whose weight is kept in 8 or 4 bits and widened when it is read.

They are nn.Linear and nn.Conv2d, and `weight` is an attribute as theirs is: forward, attention processors and the bands of the
autoencoder read it and get the type that computes. The codes are parameters, for offloading by layers moves no buffers back.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hires.checkpoints.containers.layers import is_packable
from hires.models.storage.weights import Codes, packed, widened_codes


class PackedLayer(nn.Module):
    """What both kinds share."""

    codes: nn.Parameter
    scale: nn.Parameter
    storage: str
    shape: torch.Size
    dtype: torch.dtype
    error: float
    """‖W - Q(W)‖ / ‖W‖ of the weight that was packed last."""

    @property
    def weight(self) -> Tensor:
        """The weight, widened anew at every read."""
        return widened_codes(Codes(storage=self.storage, codes=self.codes, scale=self.scale), self.shape, self.dtype)

    def hold(self, weight: Tensor, storage: str, dtype: torch.dtype, device: torch.device) -> None:
        """Pack a weight and keep it on a device. ValueError for NaN or infinity."""
        codes = packed(weight, storage)
        self.storage, self.shape, self.dtype = storage, weight.shape, dtype
        self.error = relative_error(widened_codes(codes, weight.shape, torch.float32), weight.float())
        self.codes = nn.Parameter(codes.codes.to(device), requires_grad=False)
        self.scale = nn.Parameter(codes.scale.to(device), requires_grad=False)

    def replace(self, weight: Tensor) -> None:
        """Pack another weight in the place of this one, wherever it lies. ValueError for NaN or infinity."""
        codes = packed(weight, self.storage)
        self.error = relative_error(widened_codes(codes, self.shape, torch.float32), weight.float())
        self.codes.copy_(codes.codes)
        self.scale.copy_(codes.scale)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]
    """A linear layer."""


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override]
    """A convolution."""


def relative_error(found: Tensor, exact: Tensor) -> float:
    """‖found - exact‖ / ‖exact‖; 0 where both are zero."""
    size = float(exact.norm())
    return float((found - exact).norm()) / size if size else 0.0


def packable(module: nn.Module) -> set[str]:
    """The names of the weights of a module that `weights` packs."""
    names = {f"{name}.weight": part.weight for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    return {name for name, weight in names.items() if is_packable(name, tuple(weight.shape))}


def packed_layers(module: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """The packed layers of a module, by the names of their weights."""
    for name, layer in module.named_modules():
        if isinstance(layer, PackedLayer):
            yield f"{name}.weight", layer


def without_weight(layer: nn.Module) -> PackedLinear | PackedConv2d:
    """A packed layer in the place of another, of the same settings and bias, which is to `hold` its weight."""
    kind: type[PackedLinear | PackedConv2d] = PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear
    empty = kind.__new__(kind)
    empty.__dict__.update(layer.__dict__ | {"_parameters": {"bias": layer._parameters["bias"]}})
    return empty


def unpacked_copy(module: nn.Module) -> nn.Module:
    """A module of the same layers on the meta device, none of them packed."""
    bare = copy.deepcopy(module).to("meta")
    for name, layer in list(packed_layers(bare)):
        put(bare, name.removesuffix(".weight"), _as_built(layer))
    return bare


def _as_built(layer: PackedLayer) -> nn.Module:
    kind = nn.Conv2d if isinstance(layer, PackedConv2d) else nn.Linear
    plain = kind.__new__(kind)
    weight = nn.Parameter(torch.empty(layer.shape, device="meta"), requires_grad=False)
    own = {name: value for name, value in layer.__dict__.items() if name not in ("storage", "shape", "dtype", "error")}
    plain.__dict__.update(own | {"_parameters": {"weight": weight, "bias": layer.bias}})
    return plain


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Set a layer of a module by its whole name."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, layer)


def packing_errors(module: nn.Module) -> dict[str, float]:
    """How far each packed weight is from its own, relative, by its name."""
    return {name: layer.error for name, layer in packed_layers(module)}


def described_errors(module: nn.Module) -> str:
    """The worst and the median of `packing_errors`, in words; empty where nothing is packed."""
    errors = packing_errors(module)
    if not errors:
        return ""
    worst = max(errors, key=errors.__getitem__)
    median = statistics.median(errors.values())
    return f"{len(errors)} layers, relative error of a weight {median:.2%} at the median, {errors[worst]:.2%} at most ({worst})"

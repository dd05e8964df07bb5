"""Counts the bytes of live tensors, on fake tensors at true size: no memory is needed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak of the bytes held by storages that operators made; those given to `host` count there instead."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak, self.host, self.host_peak, self.largest = 0, 0, 0, 0, 0
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: Any, key: int = key) -> None:
            _, left = self._known.pop(key)
            self.live -= left

        self._known[key] = (weakref.ref(storage, gone), size)

    def move_to_host(self, tensor: Tensor) -> Tensor:
        """A copy that counts as host memory."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        size = storage.nbytes()
        self._known.pop(storage._cdata)
        self.live -= size
        self.host += size
        self.host_peak = max(self.host_peak, self.host)

        def gone(_: Any, size: int = size, key: int = storage._cdata) -> None:
            self._known.pop(key)
            self.host -= size

        self._known[storage._cdata] = (weakref.ref(storage, gone), 0)
        return copy


@contextmanager
def counted() -> Iterator[Allocations]:
    """Fake tensors and a counter of what operators make."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hires.tiling.bands import finite

    known = mock.patch.object(finite, "all_finite", return_value=True)  # fake tensors have no values to look at
    with known, FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), Allocations() as allocations:
        yield allocations

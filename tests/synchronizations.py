"""Find, without a GPU, the operations for which the host would wait for a GPU."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations below autograd whose result, or the shape of whose result, depends on values.
_aten = torch.ops.aten
READING_OPERATIONS = (
    _aten._local_scalar_dense,  # item, int, float, bool
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.equal,
)
INDEXING_OPERATIONS = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
# Methods that copy values to the host without an operation, if the tensor is on the host already.
READING_METHODS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)


class SynchronizationFinder(TorchDispatchMode):
    """Record where the host would wait if the tensors were on a GPU, within a `with` block.

    Attributes:
        places: For each such operation, in order, its name and the innermost lines of the package and of
            Transformers that lead to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._methods = _MethodFinder(self)

    def __enter__(self) -> SynchronizationFinder:
        self._methods.__enter__()
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet in READING_OPERATIONS or (
            packet in INDEXING_OPERATIONS and _has_boolean_index(args[1])
        ):
            self.record(packet.__name__)
        return func(*args, **(kwargs or {}))

    def record(self, name: str) -> None:
        """Add an operation to `places`."""
        lines = []
        for frame in traceback.extract_stack():
            if "llava_simplified/" in frame.filename or "transformers/" in frame.filename:
                file = frame.filename.rpartition("/")[2]
                lines.append(f"{file}:{frame.name}: {frame.line}")
        self.places.append(f"{name} < " + " < ".join(reversed(lines[-3:])))


class _MethodFinder(TorchFunctionMode):
    def __init__(self, finder: SynchronizationFinder) -> None:
        self._finder = finder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self._finder.record(func.__name__)
        return func(*args, **(kwargs or {}))


def _has_boolean_index(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)

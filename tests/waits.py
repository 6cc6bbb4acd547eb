"""What makes the host wait for a GPU, found on tensors that only pretend to lie on one (PyTorch's FakeTensorMode)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS_BACK = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")


class Waits(TorchDispatchMode):
    """Names every call that would make the host wait for the device, or the device for pageable memory of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.crossed = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._opname
        if name in READS_BACK:
            self.found.append(name)
        out = function(*args, **(kwargs or {}))
        tensors = [value for value in (*args, out) if isinstance(value, Tensor)]
        if name in ("_to_copy", "copy_") and len({tensor.device.type for tensor in tensors}) > 1:
            self.crossed += 1
            if not ((kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
                self.found.append(f"{name} {list(tensors[0].shape)}")
        return out

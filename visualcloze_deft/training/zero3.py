"""Weights split over processes as they are read, so that under ZeRO-3 no process holds them whole.

DeepSpeed splits a model that it is given whole. Here each tensor is a view of its mapped file, of
which a process copies its own share: the file lies in the page cache, once for all processes of a
machine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.utils import is_zero_param
from torch import Tensor, nn


def splitter(config: dict[str, Any], dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """A function that leaves this process its share of each weight of a module, in `dtype`.

    config: DeepSpeed's, of stage 3. All processes must give it equal weights in the same order, on
    any device: nothing is sent. What is split already stays as it is.
    """
    # An empty module: DeepSpeed then exchanges torch's linear function for its own, which does not
    # keep the gathered weight for the backward pass, and finds nothing yet to split.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)

    def split(module: nn.Module) -> None:
        parameter: Any  # with what DeepSpeed adds to it
        for parameter in module.parameters():
            if not is_zero_param(parameter):
                parameter.data = parameter.data.to(dtype)
                init._convert_to_deepspeed_param(parameter)  # zero.Init's own steps, but for its
                parameter.partition()  # broadcast, which would make every process a whole copy
                parameter.data = parameter.data.to(init.local_device)  # where it is gathered

    return split


def whole(weight: Tensor) -> AbstractContextManager[object]:
    """A context in which a weight that is split is whole, for reading; all processes enter it."""
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([weight])
    return context

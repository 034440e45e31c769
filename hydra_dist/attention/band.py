"""The explicit mask of one tile along the edge of a window, by its geometry.

All blocks in the interior of a window look the same, so their mask is described by four numbers and built once.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Band(NamedTuple):
    """Query i of ``num_queries`` and key j of ``num_keys`` lie ``offset + i - j`` positions apart.

    The key is seen where 0 <= distance < window; ``window`` None means that only the lower limit holds.
    """

    num_queries: int
    num_keys: int
    offset: int
    window: int | None

    def allowed(self, device: torch.device | str) -> Tensor:
        """bool [num_queries, num_keys]"""
        rows = torch.arange(self.num_queries, device=device).unsqueeze(1)
        distance = self.offset + rows - torch.arange(self.num_keys, device=device)
        return distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)

"""The documents of a batch, as a plan wants them: sorted start positions instead of a tensor."""

import torch
from torch import Tensor

from hydra_dist.context.geometry import Documents


def documents_of(document_starts: Tensor, sequence_length: int) -> Documents:
    """The sorted start positions of each batch row's documents.

    Raises:
        ValueError: not [B, S] integers, or not the starts of consecutive documents.
    """
    if document_starts.dim() != 2 or document_starts.shape[1] != sequence_length:
        raise ValueError(
            f"document_starts has shape {list(document_starts.shape)}; [batch, {sequence_length}] is wanted, over the "
            f"whole sequence"
        )
    if document_starts.dtype.is_floating_point or document_starts.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"document_starts is {document_starts.dtype}; integers are wanted")
    host = document_starts.detach().cpu()
    begins = host == torch.arange(sequence_length)
    goes_on = torch.zeros_like(begins)
    goes_on[:, 1:] = host[:, 1:] == host[:, :-1]
    wrong = (~(begins | goes_on)).nonzero()
    if wrong.numel():
        batch, position = wrong[0].tolist()
        raise ValueError(
            f"document_starts[{batch}, {position}] is {int(host[batch, position])}; a row's document begins at the row "
            f"itself ({position}) or where that of the row before it begins, and at 0 for the first row"
        )
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in begins)

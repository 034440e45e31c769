"""Which rows a step trains on, and which rows an evaluation scores.

A row is a stretch of S + 1 tokens of the stream. Training visits all whole rows once an epoch, in an order that a
keyed permutation gives for each epoch: a batch is a function of (seed, step, row of the step) alone, so a run can stop
anywhere, go on with other ranks, and read the same tokens. Evaluation reads the rows in order and pads the last one,
so that every held-out token is scored exactly once.
"""

from collections.abc import Sequence
from functools import lru_cache

from hydra_dist.data.batch import Batch, pack_rows
from hydra_dist.data.permutation import Permutation
from hydra_dist.data.shards import Dataset
from hydra_dist.errors import ConfigError


class Sampler:
    """Rows of one split: for training as a function of (seed, step, row), for evaluation in order.

    Args:
        sequence_length: tokens a row, S.

    Attributes:
        num_rows: whole rows, an epoch of training; the up to S tokens behind the last are not trained on.
        num_eval_rows: rows that hold every target of the split; the last may be padded.

    Raises:
        ConfigError: the training split holds no row of this length; names the longest that works. (A held-out split
            that is shorter is scored as one padded row.)
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int):
        longest = dataset.num_tokens - 1
        if sequence_length < 1:
            raise ConfigError(f"sequence_length {sequence_length} is not a number of tokens; {longest} or fewer works")
        if sequence_length > longest and dataset.split != "eval":
            raise ConfigError(
                f"sequence_length {sequence_length} is longer than the {dataset.split} split of {dataset.directory} "
                f"({dataset.num_tokens} tokens; a row needs one more than it is long); at most {longest} works"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_rows = longest // sequence_length
        self.num_eval_rows = -(-longest // sequence_length)
        self._permutation = lru_cache(maxsize=2)(lambda epoch: Permutation(self.num_rows, seed, epoch))

    def row_of(self, global_row: int) -> tuple[int, int]:
        """(epoch, row of the stream) of the ``global_row``-th row since training began."""
        epoch, index = divmod(global_row, self.num_rows)
        return epoch, self._permutation(epoch)(index)

    def batch(self, step: int, rows: Sequence[int], rows_per_step: int) -> Batch:
        """The rows ``rows`` (each 0..rows_per_step-1) of a step's batch of ``rows_per_step`` rows over all ranks.

        Raises:
            ValueError: a negative step, or a row that the step does not have.
        """
        if step < 0 or any(not 0 <= row < rows_per_step for row in rows):
            raise ValueError(f"step {step}, rows {list(rows)}: a step has rows 0..{rows_per_step - 1}")
        starts = [self.row_of(step * rows_per_step + row)[1] * self.sequence_length for row in rows]
        return pack_rows(self.dataset, starts, self.sequence_length)

    def eval_batch(self, rows: Sequence[int]) -> Batch:
        """The given rows in stream order, of which 0..num_eval_rows-1 hold every target of the split exactly once.

        A row beyond them is padding alone, without a target, so that ranks can be given equally many rows.
        """
        if any(row < 0 for row in rows):
            raise ValueError(f"rows {list(rows)}: rows start at 0")
        return pack_rows(self.dataset, [row * self.sequence_length for row in rows], self.sequence_length)

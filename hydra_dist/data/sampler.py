"""Which rows a step trains on, and which rows an evaluation scores.

A row is a stretch of S + 1 tokens of the stream. Training visits all whole rows once an epoch, in an order that a
keyed permutation gives for each epoch: a batch is a function of (seed, step, row of the step) alone, so a run can stop
anywhere, go on with other ranks, and read the same tokens. Evaluation reads the rows in order and pads the last one,
so that every held-out token is scored exactly once.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from hydra_dist.data.batch import Batch, pack_rows
from hydra_dist.data.permutation import Permutation
from hydra_dist.data.shards import Dataset
from hydra_dist.errors import ConfigError


class Sampler:
    """Training rows as a function of (seed, step, row).

    Args:
        sequence_length: tokens a row, S.

    Attributes:
        num_rows: rows an epoch; the up to S tokens behind the last whole row are not trained on.

    Raises:
        ConfigError: the split holds no row of this length; names the longest that works.
    """

    def __init__(self, dataset: Dataset, sequence_length: int, seed: int):
        _check_length(sequence_length)
        longest = dataset.num_tokens - 1
        if sequence_length > longest:
            raise ConfigError(
                f"sequence_length {sequence_length} is longer than the {dataset.split} split of {dataset.directory} "
                f"({dataset.num_tokens} tokens; a row needs one more than it is long); at most {longest} works"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.seed = seed
        self.num_rows = longest // sequence_length
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


class EvalRows:
    """Held-out rows in order.

    Attributes:
        num_rows: of which the last may be partial (padded); a ``sequence_length`` beyond the split gives one row.
    """

    def __init__(self, dataset: Dataset, sequence_length: int):
        _check_length(sequence_length)
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.num_rows = -(-(dataset.num_tokens - 1) // sequence_length)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows; a row at or beyond ``num_rows`` is padding alone, so that ranks can be given equally many."""
        if any(row < 0 for row in rows):
            raise ValueError(f"rows {list(rows)}: rows start at 0")
        return pack_rows(self.dataset, [row * self.sequence_length for row in rows], self.sequence_length)


def eval_rows(
    dataset: Dataset, sequence_length: int, rows_per_batch: int = 1, *, rank: int = 0, num_ranks: int = 1
) -> Iterator[Batch]:
    """All held-out rows in order, as batches dealt round robin to ``num_ranks`` data ranks.

    Every rank gets the same number of batches of ``rows_per_batch`` rows, those beyond the end being padding; over all
    ranks every target comes exactly once.
    """
    rows = EvalRows(dataset, sequence_length)
    stride = rows_per_batch * num_ranks
    for first in range(0, rows.num_rows, stride):
        start = first + rank * rows_per_batch
        yield rows.batch(range(start, start + rows_per_batch))


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ConfigError(f"sequence_length {sequence_length} is not a number of tokens; 1 or more works")

import pytest
import torch

from hydra_dist.data import Dataset, prepare
from hydra_dist.data.batch import IGNORED, pack_rows


@pytest.fixture
def dataset(tree, tmp_path):
    return Dataset(prepare([tree(40)], tmp_path / "data", "train:300", shard_tokens=300, eval_fraction=0).directory)


def plain_row(dataset, start, length):
    """A row token by token: tokens, targets, document starts, text bytes."""
    ids = dataset.tokens(0, dataset.num_tokens).tolist()
    size = dataset.tokenizer.token_bytes
    tokens, targets, starts, text_bytes, document = [], [], [], 0, 0
    for position in range(start, start + length):
        row = position - start
        if position + 1 >= len(ids):
            document = document if row and position + 1 > len(ids) else row
            tokens.append(dataset.end_id)
            targets.append(IGNORED)
        else:
            if ids[position] == dataset.begin_id:
                document = row
            tokens.append(ids[position])
            is_end = ids[position] == dataset.end_id
            targets.append(IGNORED if is_end else ids[position + 1])
            text_bytes += 0 if is_end else int(size[ids[position + 1]])
        starts.append(document)
    return tokens, targets, starts, text_bytes


@pytest.mark.parametrize("length", [1, 2, 17, 256, 1000])
def test_rows_equal_a_plain_loop(dataset, length):
    last = dataset.num_tokens - 1
    positions = [0, 1, 5, 299, 300, 301, last - length, last // 2]
    positions = [p for p in positions if 0 <= p <= last - length]
    batch = pack_rows(dataset, positions, length)
    for row, start in enumerate(positions):
        tokens, targets, starts, text_bytes = plain_row(dataset, start, length)
        assert batch.tokens[row].tolist() == tokens
        assert batch.targets[row].tolist() == targets
        assert batch.document_starts[row].tolist() == starts
        assert int(batch.row_text_bytes[row]) == text_bytes
    assert batch.text_bytes == batch.row_text_bytes.sum()
    for tensor in (batch.tokens, batch.targets, batch.document_starts):
        assert tensor.shape == (len(positions), length)
        assert tensor.dtype == torch.int64


def test_the_plain_loop_rejects_targets_across_documents_and_starts_of_the_stream(dataset):
    batch = pack_rows(dataset, [100], 256)
    _, targets, starts, _ = plain_row(dataset, 100, 256)
    unmasked = dataset.tokens(101, 357).tolist()
    assert unmasked != targets
    assert (dataset.document_starts(100, 356) - 100).tolist() != starts  # not clamped
    assert batch.document_starts.unique().numel() > 2


def test_documents_are_told_by_the_index_and_not_by_token_values(dataset):
    batch = pack_rows(dataset, [0], 600)
    ends = batch.tokens == dataset.end_id
    begins = batch.tokens == dataset.begin_id
    assert torch.equal(ends, batch.targets == IGNORED)
    assert torch.equal(batch.document_starts == torch.arange(600), begins)


def test_what_lies_beyond_the_stream_is_a_document_of_padding(dataset):
    start = dataset.num_tokens - 10
    batch = pack_rows(dataset, [start, dataset.num_tokens - 1, dataset.num_tokens + 500], 16)
    assert batch.targets[0, :9].tolist() == [*dataset.tokens(start + 1, dataset.num_tokens).tolist()]
    assert (batch.targets[0, 9:] == IGNORED).all()
    assert (batch.tokens[0, 9:] == dataset.end_id).all()
    assert (batch.document_starts[0, 9:] == 9).all()
    for row in (1, 2):
        assert (batch.targets[row] == IGNORED).all()
        assert (batch.document_starts[row] == 0).all()
    assert batch.row_text_bytes[1:].tolist() == [0, 0]

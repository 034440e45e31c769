import itertools

import pytest

from hydra_dist.data import Dataset, Sampler, prepare
from hydra_dist.data.batch import IGNORED
from hydra_dist.errors import ConfigError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("sampler")
    (root / "corpus").mkdir()
    for number in range(60):
        (root / "corpus" / f"{number}.txt").write_text(f"document {number} " * (1 + number % 17))
    return prepare([root / "corpus"], root / "data", "train:280", shard_tokens=400, eval_fraction=0.25).directory


def rows_of(batch):
    return [tuple(row) for row in batch.tokens.tolist()]


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(prepared):
    sampler = Sampler(Dataset(prepared), 64, seed=5)
    n = sampler.num_rows
    epochs = [[sampler.row_of(e * n + i) for i in range(n)] for e in range(3)]
    for number, rows in enumerate(epochs):
        assert {epoch for epoch, _ in rows} == {number}
        assert sorted(row for _, row in rows) == list(range(n))
    orders = [[row for _, row in rows] for rows in epochs]
    other = Sampler(Dataset(prepared), 64, seed=6)
    orders += [list(range(n)), [other.row_of(i)[1] for i in range(n)]]
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_same_tokens_whatever_the_ranks(prepared, ranks):
    rows_per_step, steps = 6, 5
    whole = Sampler(Dataset(prepared), 48, seed=1)
    for step in range(steps):
        expected = whole.batch(step, range(rows_per_step), rows_per_step)
        found = []
        for rank in range(ranks):
            sampler = Sampler(Dataset(prepared), 48, seed=1)  # each rank opens its own
            found += rows_of(sampler.batch(step, range(rank * 6 // ranks, (rank + 1) * 6 // ranks), rows_per_step))
        assert found == rows_of(expected)
    assert rows_of(whole.batch(0, [0], 6)) != rows_of(whole.batch(0, [1], 6))


def test_a_batch_depends_on_nothing_but_seed_step_and_row(prepared):
    sampler = Sampler(Dataset(prepared), 48, seed=1)
    later = rows_of(sampler.batch(40, [3], 4))
    for step in (7, 0, 39):
        sampler.batch(step, range(4), 4)
    assert rows_of(sampler.batch(40, [3], 4)) == later
    assert rows_of(sampler.batch(20, [3 + 4], 8)) != later
    assert rows_of(sampler.batch(80, [1 + 0], 2)) == rows_of(sampler.batch(40, [1], 4))  # global row 161 both times
    assert rows_of(Sampler(Dataset(prepared), 48, seed=2).batch(40, [3], 4)) != later


def test_steps_and_rows_that_do_not_exist(prepared):
    sampler = Sampler(Dataset(prepared), 48, seed=1)
    for step, rows in [(-1, [0]), (0, [4]), (0, [-1])]:
        with pytest.raises(ValueError, match=r"rows 0\.\.3"):
            sampler.batch(step, rows, 4)
    with pytest.raises(ValueError, match="start at 0"):
        sampler.eval_batch([-1])


def test_the_longest_row_works_and_one_more_is_refused_by_name(prepared):
    dataset = Dataset(prepared)
    longest = dataset.num_tokens - 1
    sampler = Sampler(dataset, longest, seed=0)
    assert sampler.num_rows == 1
    assert sampler.batch(0, [0, 1], 2).tokens.shape == (2, longest)
    with pytest.raises(ConfigError, match=f"{longest + 1} is longer than the train split .*at most {longest} works"):
        Sampler(dataset, longest + 1, seed=0)
    with pytest.raises(ConfigError, match="sequence_length 0"):
        Sampler(dataset, 0, seed=0)


LENGTHS = [1, 7, 64, 100, "exact", "whole"]


@pytest.mark.parametrize(
    "split, length", [("eval", "longer"), *[(split, length) for split in ("train", "eval") for length in LENGTHS]]
)
def test_evaluation_scores_every_target_once_and_its_bytes_are_the_texts(prepared, split, length):
    dataset = Dataset(prepared, split)
    stream = dataset.num_tokens - 1
    divisors = [d for d in range(2, stream) if stream % d == 0]
    length = {"exact": (divisors or [stream])[0], "whole": stream, "longer": stream + 50}.get(length, length)
    sampler = Sampler(dataset, length, seed=0)
    batch = sampler.eval_batch(range(sampler.num_eval_rows))
    ids = dataset.tokens(0, dataset.num_tokens)
    expected = [int(b) for a, b in itertools.pairwise(ids) if a != dataset.end_id]
    targets = batch.targets.flatten()
    assert targets[targets != IGNORED].tolist() == expected
    assert batch.text_bytes == dataset.text_bytes
    alone = [sampler.eval_batch([row]).text_bytes for row in range(sampler.num_eval_rows)]
    assert batch.row_text_bytes.tolist() == alone
    beyond = sampler.eval_batch([sampler.num_eval_rows])
    assert (beyond.targets == IGNORED).all()
    assert beyond.text_bytes == 0
    # Whole rows alone would leave targets out.
    if stream % length:
        whole = sampler.eval_batch(range(sampler.num_rows)).targets
        assert (whole != IGNORED).sum() < len(expected)

"""The memory benchmark on a model of a few thousand parameters, and a verdict that can be no."""

import pytest
import yaml

from benchmarks import memory_by_sequence
from benchmarks.harness import Options
from benchmarks.tensor_memory import TensorMemory

SMALL = {"sequence_lengths": "512,1024,2048", "vocab_size": 300}


@pytest.fixture
def small(tiny_settings, tmp_path):
    tiny_settings["train"]["loss_chunk_size"] = 128
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(tiny_settings))
    settings = {**memory_by_sequence.SETTINGS, **SMALL, "config": str(config)}
    return Options(device="cpu", settings=settings, say=lambda text: None)


def test_memory_is_linear_and_shared_by_the_ranks(small):
    result = memory_by_sequence.run(small)
    assert result.holds, result.finding
    peaks = {(row[0], row[1]): row[2] for row in result.table.rows}
    assert set(peaks) == {(length, ranks) for length in (512, 1024, 2048) for ranks in (1, 2)}
    assert 1.5 < peaks[2048, 1] / peaks[1024, 1] < 2.1
    assert 0.4 < peaks[2048, 2] / peaks[2048, 1] < 0.65
    assert len(result.quantities["peak bytes, 2048 tokens, 2 ranks"].raw) == 2
    assert result.counts["largest tensor in elements, 2048 tokens, 1 rank"] < 2048 * 300


@pytest.mark.parametrize(
    ("peak", "largest", "holds"),
    [
        (lambda s: 5_000 + 100 * s, lambda s: 64 * s, True),
        (lambda s: s * s, lambda s: 64 * s, False),
        (lambda s: 100 * s, lambda s: s * s, False),
        (lambda s: 100 * s, lambda s: 300 * s, False),
    ],
)
def test_square_memory_scores_and_logits_are_told(small, monkeypatch, peak, largest, holds):
    def fake(config, vocab_size, sequence_length, ranks, device):
        memory = TensorMemory()
        memory.peak_bytes = peak(sequence_length) // ranks
        memory.largest_elements = largest(sequence_length) // ranks
        return [memory] * ranks

    monkeypatch.setattr(memory_by_sequence, "measure", fake)
    assert memory_by_sequence.run(small).holds is holds

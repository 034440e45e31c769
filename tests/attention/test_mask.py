"""The mask's definition, its errors, and that its tiles say the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_dist.attention import mask as mask_module
from hydra_dist.attention.band import Band
from hydra_dist.attention.mask import Mask


def paint(tiles, batch_size, q_length, k_length):
    """int [B, Sq, Sk]: how many tiles compute each pair."""
    counts = torch.zeros(batch_size, q_length, k_length, dtype=torch.int)
    for tile in tiles:
        rows, columns = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
        seen = Band(rows, columns, tile.offset, tile.window).allowed("cpu")
        if tile.kind == "full":
            seen = torch.ones_like(seen)
        batch = slice(None) if tile.batch is None else tile.batch
        counts[batch, tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += seen
    return counts


def agree(mask, batch_size, q_length, k_length):
    counts = paint(mask.tiles(q_length, k_length), batch_size, q_length, k_length)
    return torch.equal(counts, mask.allowed(q_length, k_length).expand(batch_size, -1, -1).int())


def test_causal_by_default_and_the_corners_of_each_condition():
    assert torch.equal(Mask().allowed(3, 3)[0], torch.ones(3, 3).tril().bool())
    assert Mask(causal=False).allowed(2, 3).all()
    assert Mask(window=1).allowed(3, 3)[0].equal(torch.eye(3).bool())
    assert Mask(causal=False, window=2).allowed(4, 4).equal(Mask(window=2).allowed(4, 4))
    assert Mask(window=9).allowed(4, 4).equal(Mask().allowed(4, 4))
    late = Mask(q_positions=torch.tensor([7, 8]), k_positions=torch.tensor([6, 7, 8, 9]))
    assert late.allowed(2, 4)[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_documents():
    starts = torch.tensor([[0, 0, 2, 3], [0, 0, 0, 0]])
    assert Mask(document_starts=starts).allowed(4, 4)[0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert Mask(document_starts=starts).allowed(4, 4)[1].equal(Mask().allowed(4, 4)[0])
    assert agree(Mask(document_starts=starts), 2, 4, 4)
    assert agree(Mask(document_starts=starts[:1]), 3, 4, 4)
    assert agree(Mask(document_starts=starts, causal=False, window=2), 2, 4, 4)


@st.composite
def masks(draw):
    """A mask over some rows of a sequence, in any order of runs, with documents of the whole sequence."""
    length = draw(st.integers(1, 24))
    some_rows = st.lists(st.integers(0, length - 1), min_size=1, max_size=length)
    q_positions = draw(some_rows.map(sorted) | some_rows)
    k_positions = draw(some_rows.map(sorted) | some_rows.map(lambda rows: sorted(set(rows))))
    batch_size = draw(st.integers(1, 2))
    q_starts = k_starts = None
    if draw(st.booleans()):
        flags = torch.tensor(draw(st.lists(st.booleans(), min_size=batch_size * length, max_size=batch_size * length)))
        flags = flags.view(batch_size, length)
        starts = (torch.arange(length) * flags).cummax(1).values
        q_starts, k_starts = starts[:, q_positions], starts[:, k_positions]
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, length + 1)),
        document_starts=q_starts,
        k_document_starts=k_starts,
        q_positions=torch.tensor(q_positions, dtype=torch.int32),
        k_positions=torch.tensor(k_positions),
    )
    return mask, batch_size, len(q_positions), len(k_positions)


@settings(max_examples=300, deadline=None)
@given(masks())
def test_tiles_say_what_the_definition_says(problem):
    assert agree(*problem)


def test_the_check_above_rejects_other_masks():
    starts = torch.tensor([[0, 0, 0, 3, 3, 3]])
    right = Mask(window=2, document_starts=starts)
    assert agree(right, 1, 6, 6)
    for wrong in (Mask(window=3, document_starts=starts), Mask(window=2), Mask(document_starts=starts)):
        counts = paint(wrong.tiles(6, 6), 1, 6, 6)
        assert not torch.equal(counts, right.allowed(6, 6).int())


def test_runs_are_found():
    mask = Mask(q_positions=torch.tensor([4, 5, 6, 0, 1, 9]))
    q_spans, k_spans = mask.spans(6, 3)
    assert [(span.row_start, span.row_stop, span.position) for span in q_spans] == [(0, 3, 4), (3, 5, 0), (5, 6, 9)]
    assert [(span.row_start, span.row_stop, span.position) for span in k_spans] == [(0, 3, 0)]
    assert mask.spans(6, 0)[1] == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "smallest window is 1"),
        ({"document_starts": torch.zeros(4, dtype=torch.long)}, r"shape \[batch, sequence\]"),
        ({"document_starts": torch.zeros(1, 4)}, "torch.float32"),
        ({"q_positions": torch.zeros(1, 4, dtype=torch.long)}, r"shape \[sequence\]"),
        ({"k_document_starts": torch.zeros(1, 4, dtype=torch.long)}, "needs document_starts"),
    ],
)
def test_what_is_no_mask(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mask(**arguments)


def test_what_does_not_fit_the_rows():
    starts = torch.zeros(2, 4, dtype=torch.long)
    Mask(document_starts=starts).check(2, 4, 4)
    Mask(document_starts=starts[:1]).check(2, 4, 4)
    with pytest.raises(ValueError, match="3 batch rows of 4 queries"):
        Mask(document_starts=starts).check(3, 4, 4)
    with pytest.raises(ValueError, match="4 queries and 6 keys"):
        Mask(q_positions=torch.arange(5)).check(2, 4, 6)
    with pytest.raises(ValueError, match="k_document_starts is needed"):
        Mask(document_starts=starts).check(2, 4, 6)


@pytest.mark.parametrize("wrong", [[0, 0, 3, 3], [0, 1, 0, 0], [-1, -1, 2, 1]])
def test_document_starts_that_contradict_the_positions(wrong):
    with pytest.raises(ValueError, match="says that its document starts at"):
        Mask(document_starts=torch.tensor([wrong])).tiles(4, 4)


def test_global_starts_need_global_positions():
    starts = torch.tensor([[0, 0, 6, 6]])
    with pytest.raises(ValueError, match="global positions"):
        Mask(document_starts=starts).tiles(4, 4)
    positions = torch.tensor([4, 5, 6, 7])
    assert agree(Mask(document_starts=starts, q_positions=positions, k_positions=positions), 1, 4, 4)


def test_documents_on_a_device_are_read_once(monkeypatch):
    """Until they are changed in place; those of another tensor, and those that are read with positions, every time."""
    monkeypatch.setattr(mask_module, "_is_dear", lambda x: True)
    reads = []
    real = Mask._find_documents
    monkeypatch.setattr(Mask, "_find_documents", lambda self, *lengths: reads.append(1) or real(self, *lengths))
    starts = torch.tensor([[0, 0, 2, 2, 2]])
    for _ in range(3):
        assert Mask(document_starts=starts).document_positions(5, 5) == ((0, 2),)
    assert len(reads) == 1
    starts[0, 4] = 4
    assert Mask(document_starts=starts).document_positions(5, 5) == ((0, 2, 4),)
    assert Mask(document_starts=starts.clone()).document_positions(5, 5) == ((0, 2, 4),)
    assert len(reads) == 3
    moved = Mask(document_starts=starts, q_positions=torch.arange(5), k_positions=torch.arange(5))
    assert [moved.document_positions(5, 5) for _ in range(2)] == [((0, 2, 4),)] * 2
    with torch.inference_mode():
        assert Mask(document_starts=starts.clone()).document_positions(5, 5) == ((0, 2, 4),)
    assert len(reads) == 6

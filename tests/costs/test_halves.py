"""Two lots of tiles: nothing lost, nothing twice, and about as much work in both."""

import numpy as np
import pytest

from hydra_dist.costs.halves import halves
from hydra_dist.costs.tiles import Span, Tile, executed_pairs, own_tiles


@pytest.mark.parametrize("kind", ["causal", "full"])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_halves_of_one_tile_have_about_half_of_its_pairs_each(kind, rows):
    tile = Tile(None, 3, 3 + rows, 5, 5 + rows, kind)
    first, rest = halves([tile])
    assert executed_pairs([*first, *rest]) == tile.pairs
    if rows > 2:
        assert abs(executed_pairs(first) / tile.pairs - 0.5) < 0.13
    covered = np.zeros((80, 80), dtype=int)
    for part in [*first, *rest]:
        seen = np.ones((part.q_stop - part.q_start, part.k_stop - part.k_start), dtype=int)
        covered[part.q_start : part.q_stop, part.k_start : part.k_stop] += (
            np.tril(seen) if part.kind == "causal" else seen
        )
    wanted = np.zeros_like(covered)
    block = np.ones((rows, rows), dtype=int)
    wanted[3 : 3 + rows, 5 : 5 + rows] = np.tril(block) if kind == "causal" else block
    assert (covered == wanted).all()


def test_halves_of_many_tiles_keep_them_whole():
    found = own_tiles([Span(0, 48, 0)], causal=True, window=None, documents=[[0, 10, 20, 30, 40]])
    first, rest = halves(found)
    assert [*first, *rest] == list(found)
    assert len(first) == 2
    assert halves([]) == ([], [])

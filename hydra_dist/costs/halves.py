"""Tiles of attention in two lots of about as many pairs: one to work on now, one for while something is on its way."""

from collections.abc import Sequence

from hydra_dist.costs.tiles import Tile


def halves(found: Sequence[Tile]) -> tuple[list[Tile], list[Tile]]:
    """Tiles dealt in two lots of about as many pairs; one that is more than half of them is cut for it."""
    whole = sum(tile.pairs for tile in found)
    parts = [part for tile in found for part in (_quarters(tile) if 2 * tile.pairs > whole else [tile])]
    first: list[Tile] = []
    done = 0
    while parts and 2 * done + parts[0].pairs <= whole:
        done += parts[0].pairs
        first.append(parts.pop(0))
    return first, parts


def _quarters(tile: Tile) -> list[Tile]:
    """A causal tile as the square of its later queries over its earlier keys and what is left; others by queries."""
    batch, rows = tile.batch, (tile.q_stop - tile.q_start) // 2
    if rows == 0 or tile.kind == "masked":
        return [tile]
    q, k = tile.q_start + rows, tile.k_start + rows
    if tile.kind == "causal":
        return [
            Tile(batch, q, tile.q_stop, tile.k_start, k, "full"),
            Tile(batch, tile.q_start, q, tile.k_start, k, "causal"),
            Tile(batch, q, tile.q_stop, k, tile.k_stop, "causal"),
        ]
    return [
        Tile(batch, tile.q_start, q, tile.k_start, tile.k_stop, "full"),
        Tile(batch, q, tile.q_stop, tile.k_start, tile.k_stop, "full"),
    ]

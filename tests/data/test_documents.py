import hashlib
import itertools
from fractions import Fraction

import pytest

from hydra_dist.data.documents import eval_share, is_held_out, shuffle_key
from hydra_dist.errors import ConfigError

NAMES = [f"dir/{n}.py" for n in range(4000)]


def test_default_share_is_the_hash_modulo_32():
    share = eval_share(1 / 32)
    assert share == Fraction(1, 32)
    plain = {n for n in NAMES if int(hashlib.sha256(n.encode()).hexdigest(), 16) % 32 == 0}
    assert {n for n in NAMES if is_held_out(n, share)} == plain
    assert {n for n in NAMES if is_held_out(n, eval_share(1 / 31))} != plain


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.2, 0.5])
def test_share_of_documents_is_about_the_fraction(fraction):
    held = sum(is_held_out(n, eval_share(fraction)) for n in NAMES) / len(NAMES)
    assert abs(held - fraction) <= 4 * (fraction * (1 - fraction) / len(NAMES)) ** 0.5


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan"), 1e-9, 0.99999])
def test_impossible_shares_are_refused(fraction):
    with pytest.raises(ConfigError, match=r"--eval-fraction .*0\.03125"):
        eval_share(fraction)


def test_shuffle_key_depends_on_the_seed_and_is_unrelated_to_the_order_of_names():
    order = sorted(NAMES, key=lambda n: shuffle_key(n, 0))
    assert order != sorted(NAMES, key=lambda n: shuffle_key(n, 1))
    neighbours = sum(abs(int(a[4:-3]) - int(b[4:-3])) == 1 for a, b in itertools.pairwise(order))
    assert neighbours < 12  # two are expected; the sorted order has 3999


def test_names_that_are_no_unicode_have_a_place():
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    assert is_held_out(name, Fraction(1, 1))
    assert len(shuffle_key(name, 0)) == 32

"""What the tests of checkpoints share: a dictionary of tensors in the engine's place, and ranks as threads."""

import threading

import torch

from hydra_dist.config import ModelConfig
from hydra_dist.train import checkpoint

MODEL = ModelConfig(hidden_size=64, head_dim=16, num_query_heads=4, num_key_heads=2, vocab_size=100)
METADATA = {
    "data_step": 7,
    "context_size": 2,
    "precision": "fp32",
    "model": MODEL.model_dump(mode="json"),
    "tokenizer_sha256": "ab" * 32,
    "extra": {"skipped": [3, 4]},
}


class FakeState:
    """Tensors by name, as ``EngineState`` gives them; every rank holds all."""

    stage = 1

    def __init__(self, seed=0, shapes=None, states=("exp_avg", "exp_avg_sq"), state_dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        shapes = shapes or {"a.weight": (5, 3), "a.bias": (3,), "scale": (), "empty": (0, 4), "b.weight": (7, 11)}
        self.tensors = {
            name: {
                key: torch.randn(shape, generator=generator).to(torch.float32 if key == "weight" else state_dtype)
                for key in ("weight", *states)
            }
            for name, shape in shapes.items()
        }
        self.names = list(shapes)
        self.step = 10 + seed
        self.prepared = False
        self.writes = 0

    def shape(self, name):
        return tuple(self.tensors[name]["weight"].shape)

    def keys(self, name):
        return tuple(self.tensors[name])

    def dtype(self, name, key):
        return self.tensors[name][key].dtype

    def read_tensor(self, name, key, wanted=True):
        return self.tensors[name][key].clone() if wanted else None

    def write_tensor(self, name, key, value):
        self.writes += 1
        self.tensors[name][key].copy_(value)

    def prepare_for_loading(self):
        self.prepared = True

    def same_as(self, other):
        return (
            self.step == other.step
            and self.names == other.names
            and all(
                torch.equal(self.tensors[name][key], other.tensors[name][key])
                for name in self.names
                for key in self.keys(name)
            )
        )


class ThreadPeers(checkpoint.Peers):
    """One rank of several threads."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self._barrier, self._board = rank, size, barrier, board

    def share(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values


def on_ranks(size, action):
    """``action(peers)`` on every rank; what each returned or raised."""
    barrier, board, results = threading.Barrier(size, timeout=20), [None] * size, [None] * size

    def work(rank):
        try:
            results[rank] = action(ThreadPeers(rank, size, barrier, board))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def save(root, step, state, keep=2, **settings):
    return checkpoint.save(root, step, state, metadata=METADATA, keep=keep, **settings)


def load_latest(root):
    state = FakeState(seed=99)
    checkpoint.load(checkpoint.latest(root), state, expected_model=MODEL)
    return state


def prepare_two(root):
    """Checkpoints of steps 5 and 10."""
    save(root, 5, FakeState(5))
    save(root, 10, FakeState(10))

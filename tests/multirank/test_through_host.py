"""Several ranks on one GPU send through host memory: the same bits arrive. Tried on the CPU, over two processes."""

from pathlib import Path

import torch

WORKER = Path(__file__).with_name("host_worker.py")
CALLS = ("exchange", "all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def test_what_goes_through_the_host_arrives_bit_for_bit(torchrun, tmp_path):
    finished = torchrun(2, str(WORKER), str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    for rank in range(2):
        kinds = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        straight, hosted, forgetful = kinds["straight"], kinds["through the host"], kinds["never copied back"]
        for found, through_host in ((straight, False), (hosted, True)):
            assert bool(found.pop("which")) is through_host
            assert bool(found.pop("handed over as it is")) is not through_host
        assert straight.keys() == hosted.keys()
        for call in (*CALLS, "ring", "all_gather", "ulysses"):
            assert any(name.startswith(call) for name in straight)
        for name, value in straight.items():
            assert torch.equal(value, hosted[name]), f"rank {rank}: {name}"
            # Rank 0 has no row before its first one.
            assert value.any() or name.endswith("halo"), f"rank {rank}: {name} is all zeros"
        for call in ("exchange", "all_reduce"):  # where nothing else copies what came
            names = [name for name in forgetful if name.startswith(call)]
            assert not all(torch.equal(straight[name], forgetful[name]) for name in names), call

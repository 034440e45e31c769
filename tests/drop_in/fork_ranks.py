"""Run programs for torchrun, each on one and on two processes, without paying for their imports each time.

``fork_ranks.py PROGRAM ...`` writes what a program prints on N processes to PROGRAM.N.txt. Each process is forked from
this one, and finds in its environment what torchrun puts there.
"""

import os
import runpy
import socket
import sys

import torch.distributed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import hydra_dist.drop_in  # noqa: F401


def one_rank(program, rank, world, port, output):
    """Become a rank; never returns."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 1
    try:
        with open(output, "a") as sys.stdout:
            runpy.run_path(program, run_name="__main__")
        code = 0
    finally:
        os._exit(code)


def main():
    for program in sys.argv[1:]:
        for world in (1, 2):
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                port = listener.getsockname()[1]
            children = []
            for rank in range(world):
                children.append(os.fork())
                if children[-1] == 0:
                    one_rank(program, rank, world, port, f"{program}.{world}.txt")
            if any([os.waitpid(child, 0)[1] for child in children]):
                raise SystemExit(f"{program} failed on {world} processes")


if __name__ == "__main__":
    main()

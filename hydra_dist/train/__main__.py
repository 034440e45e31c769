"""What torchrun starts: ``torchrun --nproc-per-node N -m hydra_dist.train CONFIG [section.key=value ...]``."""

import os
import sys
import time

from hydra_dist.errors import ConfigError, UserError
from hydra_dist.train.host_memory import keep_freed_memory
from hydra_dist.train.mesh import choose_device, rank_from_environment, world_size_from_environment

SECONDS_FOR_THE_FIRST_RANK = 5.0
"""How long another rank waits before it speaks: mistakes that all ranks find are told by the first alone."""


def main(arguments: list[str]) -> int:
    """Train as the configuration says; the process's exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        raise ConfigError("usage: python -m hydra_dist.train CONFIG.yaml [section.key=value ...]")
    from hydra_dist.config_file import load_config
    from hydra_dist.train.preflight import preflight

    source = arguments[0]
    config = load_config(source, arguments[1:])
    prepared = preflight(config, source, world_size_from_environment())
    if choose_device(config.train.device).type == "cpu":
        keep_freed_memory()

    import torch.distributed as dist

    from hydra_dist.train.loop import Trainer
    from hydra_dist.train.mesh import build_mesh

    trainer = Trainer(config, prepared, build_mesh(config, source))
    trainer.run()
    dist.barrier()
    trainer.close()
    dist.destroy_process_group()
    return 0


def run() -> int:
    """``main`` with a user's mistakes as one message on the first rank and the exit code that names their kind."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        rank = rank_from_environment()
        if rank:
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        # Other ranks may wait for this one inside a collective; leaving without clean-up is what frees them.
        os._exit(error.exit_code)


if __name__ == "__main__":
    sys.exit(run())

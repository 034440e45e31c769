"""What torchrun starts: ``torchrun --nproc-per-node N -m hydra_dist.train CONFIG [section.key=value ...]``."""

import errno
import os
import sys
import time
from typing import NoReturn

from hydra_dist.errors import ConfigError, RunError, UserError
from hydra_dist.train.host_memory import keep_freed_memory
from hydra_dist.train.mesh import choose_device, rank_from_environment, world_size_from_environment

SECONDS_FOR_THE_FIRST_RANK = 5.0
"""How long another rank waits before it speaks: mistakes that all ranks find are told by the first alone."""
OUTSIDE_CAUSES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}
"""Errors of files that no code of ours causes."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""Words of torch.distributed's errors where the process at the other end is gone."""


def main(arguments: list[str]) -> int:
    """Train as the configuration says; the process's exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        raise ConfigError("usage: python -m hydra_dist.train CONFIG.yaml [section.key=value ...]")
    from hydra_dist.config.file import load_config
    from hydra_dist.train.preflight import preflight

    source = arguments[0]
    config = load_config(source, arguments[1:])
    prepared = preflight(config, source, world_size_from_environment())
    if choose_device(config.train.device, share_gpu=config.train.share_gpu).type == "cpu":
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
        _leave(str(error), error.exit_code)
    except OSError as error:
        if error.errno not in OUTSIDE_CAUSES:
            raise
        _leave(f"{error.filename or 'a file of the run'}: {error.strerror}", RunError.exit_code)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        # The rank that failed speaks for itself, and torchrun then ends this one.
        time.sleep(2 * SECONDS_FOR_THE_FIRST_RANK)
        _leave("another rank of this run is gone; what it said before is the cause", RunError.exit_code)


def _leave(message: str, exit_code: int) -> NoReturn:
    rank = rank_from_environment()
    if rank:
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    print(f"error: {message}" if rank == 0 else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    # Other ranks may wait for this one inside a collective; leaving without clean-up is what frees them.
    os._exit(exit_code)


if __name__ == "__main__":
    sys.exit(run())

"""The language model: transformer, CCGQA and GQA layers, losses, starting values, decoding."""

from hydra_dist.config import ModelConfig
from hydra_dist.model.ccgqa import CCGQA
from hydra_dist.model.ccgqa_reference import ccgqa_reference
from hydra_dist.model.decode import DecodeState, decode
from hydra_dist.model.generate import generate
from hydra_dist.model.gqa import GQA
from hydra_dist.model.initialization import initialize, parameter_groups
from hydra_dist.model.loss import chunked_cross_entropy, chunked_token_nll
from hydra_dist.model.transformer import Transformer

__all__ = [
    "CCGQA",
    "GQA",
    "DecodeState",
    "ModelConfig",
    "Transformer",
    "ccgqa_reference",
    "chunked_cross_entropy",
    "chunked_token_nll",
    "decode",
    "generate",
    "initialize",
    "parameter_groups",
]

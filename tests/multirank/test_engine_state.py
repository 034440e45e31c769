"""Training state by parameter name, through real DeepSpeed engines: both the tests and what each rank runs.

One start of two processes trains and reloads engines of every stage and writes down the losses; one start of a single
process goes on from what the two had saved. The tests compare.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS_BEFORE, STEPS_AFTER = 5, 3
FP32 = ["0", "1", "2", "3"]
BF16 = ["1-bf16", "1-bf16-fp32accumulation", "2-bf16", "3-bf16"]
OFFLOAD = ["1-offload", "2-offload", "3-offload"]
PIECES = ["3-persistent"]  # small parameters stay gathered, and a group is several flat tensors
MUON = ["0-muon", "1-muon", "2-muon"]  # other states in each group
SAME = [(kind, kind) for kind in (*FP32, *BF16, *OFFLOAD, *PIECES, *MUON)]
CROSS = [("1", "3"), ("3", "0"), ("0", "2"), ("2", "1"), ("3-offload", "1"), ("2", "3-persistent")]
CROSS_MUON = [("0-muon", "2-muon")]
CROSS_BF16 = [("3-bf16", "1-bf16"), ("1-bf16-fp32accumulation", "2-bf16")]
FEWER_RANKS = [("2", "2"), ("3", "1")]
WRONG = ["stale working copy", "no momentum", "step not set"]


def launch(folder: Path, processes: int) -> dict:
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    process = subprocess.Popen(
        [*command, __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks; killed, it would leave them behind
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output[-8000:]
    return json.loads((folder / f"ranks-{processes}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine_state")


@pytest.fixture(scope="module")
def two_ranks(folder):
    return launch(folder, 2)


@pytest.fixture(scope="module")
def one_rank(folder, two_ranks):
    return launch(folder, 1)


@pytest.mark.parametrize(("source", "target"), SAME)
def test_the_same_stage_goes_on_bit_for_bit(two_ranks, source, target):
    assert two_ranks["resumed"][f"{source} > {target}"] == two_ranks["uninterrupted"][source]


@pytest.mark.parametrize(("source", "target"), [*CROSS, *CROSS_MUON])
def test_another_stage_goes_on_within_rounding(two_ranks, source, target):
    resumed, expected = two_ranks["resumed"][f"{source} > {target}"], two_ranks["uninterrupted"][source]
    assert resumed == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize(("source", "target"), CROSS_BF16)
def test_another_stage_goes_on_in_bf16_from_the_same_weights(two_ranks, source, target):
    """The first loss depends on weights alone; later ones on how each stage rounds gradients."""
    resumed, expected = two_ranks["resumed"][f"{source} > {target}"], two_ranks["uninterrupted"][source]
    assert resumed[0] == pytest.approx(expected[0], abs=1e-6, rel=0)
    assert resumed == pytest.approx(expected, abs=5e-3, rel=0)


@pytest.mark.parametrize(("source", "target"), FEWER_RANKS)
def test_another_world_size_goes_on_within_rounding(two_ranks, one_rank, source, target):
    resumed, expected = one_rank["resumed"][f"{source} > {target}"], two_ranks["uninterrupted"][source]
    assert resumed == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize("mistake", WRONG)
def test_the_comparison_rejects_a_wrong_load(two_ranks, mistake):
    resumed, expected = two_ranks["wrong"][mistake], two_ranks["uninterrupted"]["1"]
    assert resumed != pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("kind", [*FP32, *BF16, *OFFLOAD, *PIECES, *MUON])
def test_preparing_changes_nothing_that_follows(two_ranks, kind):
    assert two_ranks["prepared"][kind] == two_ranks["fresh"][kind]


@pytest.mark.parametrize("kind", [*FP32, *BF16, *OFFLOAD, *PIECES, *MUON])
def test_every_bit_comes_back(two_ranks, kind):
    assert two_ranks["round_trip"][kind] == []


@pytest.mark.parametrize("kind", ["1", "2", "3"])
def test_what_is_read_is_what_plain_training_holds(two_ranks, kind):
    """Names, shapes and values against stage 0, which keeps the model's own tensors."""
    assert two_ranks["same_names_and_shapes"][kind]
    assert two_ranks["difference_to_plain"][kind] < 1e-6


def test_the_optimizer_counts_its_own_steps(two_ranks):
    assert set(two_ranks["optimizer_steps"].values()) == {STEPS_BEFORE}


def test_state_of_an_unknown_kind_is_refused(two_ranks):
    assert "FP16" in two_ranks["refused"]


# What each rank runs.


def build(kind: str, seed: int):
    """An engine of one kind, on a tiny tied model with odd sizes, a frozen vector and two parameter groups."""
    import deepspeed
    import torch
    from torch import nn

    from hydra_dist.train.optimizer import Muon

    class Head(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight
            self.temperature = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x @ self.weight.T * self.temperature

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 5)
            self.up = nn.Linear(5, 7)
            self.norm = nn.LayerNorm(7)
            self.norm.bias.requires_grad_(False)
            self.down = nn.Linear(7, 5, bias=False)
            self.head = Head(self.embedding.weight)

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.head(x + self.down(torch.tanh(self.norm(self.up(x)))))

    torch.manual_seed(seed)
    model = Tiny()
    with torch.no_grad():
        model.norm.bias.normal_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = {"lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if "muon" in kind:
        matrices = [model.up.weight, model.down.weight]
        groups[0]["params"] = [model.embedding.weight]
        groups.insert(0, {"params": matrices, "momentum": 0.95, "shapes": [tuple(p.shape) for p in matrices]})
        optimizer = Muon(groups, None, **adam)
    else:
        optimizer = torch.optim.AdamW(groups, **adam)
    stage = int(kind[0])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.3,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 0,
        },
        "bf16": {"enabled": "bf16" in kind},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if "fp32accumulation" in kind:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if "persistent" in kind:
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 20, "sub_group_size": 16}
    if "offload" in kind:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def train(engine, first: int, count: int) -> list[float]:
    """``count`` steps; the mean loss over the ranks of each. Data and learning rate depend on the step alone."""
    import torch
    import torch.distributed as dist

    losses = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, 11, (4, 6), generator=generator).chunk(dist.get_world_size())[dist.get_rank()]
        logits = engine(rows[:, :-1]).float()
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 11), rows[:, 1:].reshape(-1))
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        engine.backward(loss)
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.03 / (1 + step)
        engine.step()
    return losses


def resume(folder: Path, source: str, target: str, load) -> list[float]:
    from hydra_dist.train.engine_state import EngineState

    engine = build(target, seed=1)
    load(folder / source / f"step-{STEPS_BEFORE:08d}", EngineState(engine))
    losses = train(engine, STEPS_BEFORE, STEPS_AFTER)
    engine.destroy()
    return losses


def round_trip(state) -> list[str]:
    """Write noise with signed zeros under every name, and list what does not come back bit for bit."""
    import torch

    from hydra_dist.train import engine_state

    generator = torch.Generator().manual_seed(3)
    written = {
        name: {
            key: torch.randn(state.shape(name), generator=generator).to(state.dtype(name, key))
            for key in state.keys(name)
        }
        for name in state.names
    }
    for name, values in written.items():
        for value in values.values():
            value.view(-1)[0] = -0.0
        if name == "norm.bias":  # frozen: kept in the engine's own precision
            values["weight"] = values["weight"].bfloat16().float()
        state.write(name, values)
    wrong = []
    whole = engine_state.ELEMENTS_AT_ONCE
    for pieces in (whole, 8):
        engine_state.ELEMENTS_AT_ONCE = pieces
        for name, values in written.items():
            for key, value in state.read(name).items():
                if not torch.equal(value.view(torch.int32), values[key].view(torch.int32)):
                    wrong.append(f"{name} {key}")
    engine_state.ELEMENTS_AT_ONCE = whole
    return wrong


def run_two_ranks(folder: Path) -> dict:
    import torch

    from hydra_dist.train import checkpoint
    from hydra_dist.train.engine_state import EngineState
    from hydra_dist.train.engine_state_layout import Placement

    names = ("uninterrupted", "resumed", "wrong", "prepared", "fresh", "round_trip", "optimizer_steps")
    results: dict = {name: {} for name in (*names, "same_names_and_shapes", "difference_to_plain")}
    plain = None
    for kind in (*FP32, *BF16, *OFFLOAD, *PIECES, *MUON):
        engine = build(kind, seed=0)
        losses = train(engine, 0, STEPS_BEFORE)
        results["fresh"][kind] = losses
        state = EngineState(engine)
        results["optimizer_steps"][kind] = state.step
        metadata = {"data_step": STEPS_BEFORE, "context_size": 1, "precision": kind, "model": {}}
        checkpoint.save(folder / kind, STEPS_BEFORE, state, metadata=metadata)
        if kind in FP32:
            tensors = {(name, key): value for name in state.names for key, value in state.read(name).items()}
            plain = plain or tensors
            results["same_names_and_shapes"][kind] = [(k, v.shape) for k, v in plain.items()] == [
                (k, v.shape) for k, v in tensors.items()
            ]
            results["difference_to_plain"][kind] = max(
                (tensors[key] - plain[key]).abs().max().item() for key in tensors
            )
        results["uninterrupted"][kind] = train(engine, STEPS_BEFORE, STEPS_AFTER)
        results["round_trip"][kind] = round_trip(state)
        engine.destroy()
        engine = build(kind, seed=0)
        EngineState(engine).prepare_for_loading()
        results["prepared"][kind] = train(engine, 0, STEPS_BEFORE)
        engine.destroy()
    for source, target in (*SAME, *CROSS, *CROSS_MUON, *CROSS_BF16):
        results["resumed"][f"{source} > {target}"] = resume(folder, source, target, checkpoint.load)

    def without_momentum(path, state):
        checkpoint.load(path, state)
        for name in state.names:
            for key in state.keys(name)[1:]:
                state.write_tensor(name, key, torch.zeros(state.shape(name)))

    def without_step(path, state):
        checkpoint.load(path, state)
        state.step = 0

    results["wrong"]["no momentum"] = resume(folder, "1", "1", without_momentum)
    results["wrong"]["step not set"] = resume(folder, "1", "1", without_step)
    right, Placement.write_working_copy = Placement.write_working_copy, lambda *arguments: None
    results["wrong"]["stale working copy"] = resume(folder, "1", "1", checkpoint.load)
    Placement.write_working_copy = right
    try:
        EngineState(build("0-bf16", seed=0))
    except ValueError as error:
        results["refused"] = str(error)
    return results


def run_one_rank(folder: Path) -> dict:
    from hydra_dist.train import checkpoint

    pairs = {f"{s} > {t}": resume(folder, s, t, checkpoint.load) for s, t in FEWER_RANKS}
    return {"resumed": pairs}


def main() -> None:
    import logging

    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.ops import __compatible_ops__

    torch.set_num_threads(1)
    __compatible_ops__["deepspeed_shm_comm"] = False  # takes a compiler and a minute, and training never calls it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    folder = Path(sys.argv[1])
    results = run_two_ranks(folder) if dist.get_world_size() == 2 else run_one_rank(folder)
    if dist.get_rank() == 0:
        (folder / f"ranks-{dist.get_world_size()}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

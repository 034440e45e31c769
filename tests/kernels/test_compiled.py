"""Every kernel variant that is dispatched fits its chips: no spills, enough shared memory, tensor cores where meant."""

import json
import subprocess
import sys

import pytest

import benchmarks.kernels as benchmark
from hydra_dist.kernels.ahead_of_time import Compiled
from hydra_dist.kernels.specialization import CHIPS, Specialization

HEADER = """
import torch, triton, triton.language as tl
from hydra_dist.kernels.specialization import of_launch

def floats(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)
"""
SPILLS = """
@triton.jit
def kernel(x, y, N: tl.constexpr):
    a = tl.arange(0, N)
    block = tl.load(x + a[:, None] * N + a[None, :])
    tl.store(y + a[:, None] * N + a[None, :], block + tl.trans(block) * tl.sum(block))
def specializations():
    arguments = dict(x=floats(4), y=floats(4), N=256)
    return [of_launch("spills", kernel, arguments, num_warps=1, num_stages=1, tensor_cores=False)]
"""
DOT = """
@triton.jit
def kernel(x, y, stride, N: tl.constexpr, PRECISION: tl.constexpr):
    a = tl.arange(0, N)
    block = tl.load(x + a[:, None] * stride + a[None, :])
    tl.store(y + a[:, None] * N + a[None, :], tl.dot(block, tl.trans(block), input_precision=PRECISION))
def specializations():
    arguments = dict(x=floats(4), y=floats(4), stride=64, N=64, PRECISION="WHICH")
    return [of_launch("dot WHICH", kernel, arguments, num_warps=4, num_stages=2, tensor_cores=True)]
"""
NO_ROOM = """
@triton.jit
def kernel(x, y, rounds, N: tl.constexpr):
    a = tl.arange(0, N)
    tile = a[:, None] * N + a[None, :]
    total = tl.zeros((N, N), tl.float32)
    for i in range(rounds):
        left, right = tl.load(x + i * N * N + tile), tl.load(x + (i + 7) * N * N + tile)
        total = tl.dot(left, right, total)
    tl.store(y + tile, total)
def specializations():
    arguments = dict(x=floats(4, dtype=torch.float16), y=floats(4), rounds=9, N=128)
    return [of_launch("no room", kernel, arguments, num_warps=8, num_stages=4, tensor_cores=True)]
"""


def reports(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def routine_variants(compile_kernels):
    return reports(compile_kernels("--routine", "--processes", "2"))


def test_no_dispatched_variant_has_a_fault(routine_variants):
    assert [fault for report in routine_variants for fault in report["faults"]] == []


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_no_variant_at_all_has_a_fault(compile_kernels):
    found = reports(compile_kernels("--processes", "2"))
    assert [fault for report in found for fault in report["faults"]] == []


def test_every_kernel_file_is_compiled_for_every_chip(routine_variants):
    own = {"attention_blocks.py", "attention_forward.py", "attention_backward.py"}
    own |= {"attention_backward_keys.py", "attention_backward_queries.py"}
    by_chip = [{report["file"] for report in routine_variants if report["chip"] == chip} for chip in CHIPS]
    assert all(own <= files == by_chip[0] for files in by_chip)


def test_half_precision_products_use_each_chips_own_instruction(routine_variants):
    widest = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    for report in routine_variants:
        if report["file"].startswith("attention") and report["tensor_cores_claimed"]:
            assert widest[report["chip"]] in report["tensor_core_instructions"], report["name"]


@pytest.mark.parametrize(
    ("body", "chip", "fault"),
    [
        (SPILLS, "sm_90", "spills"),
        (DOT.replace("WHICH", "ieee"), "sm_90", "none of their instructions"),
        (NO_ROOM, "sm_80", "bytes of shared memory"),
    ],
)
def test_the_check_above_sees_a_fault(tmp_path, compile_kernels, body, chip, fault):
    path = tmp_path / "bad_kernel.py"
    path.write_text(HEADER + body)
    done = compile_kernels(str(path), "--chip", chip)
    (report,) = reports(done)
    assert done.returncode == 1
    assert any(fault in text and "bad_kernel.py" in text for text in report["faults"]), report


def test_a_sound_kernel_has_no_fault(tmp_path, compile_kernels):
    path = tmp_path / "kernel.py"
    path.write_text(HEADER + DOT.replace("WHICH", "tf32"))
    done = compile_kernels(str(path), "--chip", "sm_80")
    (report,) = reports(done)
    assert (done.returncode, report["faults"]) == (0, [])
    assert report["tensor_core_instructions"] == ["mma.sync"]


def test_tensor_memory_is_checked_too():
    assert _report(513).faults == ("f.py: n on sm_100: needs 513 columns of tensor memory, and a block has 512",)


def test_a_fault_breaks_the_benchmarks_claim():
    sound = benchmark.summarize([_report(512)])
    assert sound.holds
    assert sound.table.rows == (("n", "sm_100", 4, 2, 128, 0, 1.0, "tcgen05.mma"),)
    broken = benchmark.summarize([_report(512), _report(513)])
    assert not broken.holds
    assert "513 columns" in broken.finding


def _report(columns: int) -> Compiled:
    return Compiled("f.py", "n", "sm_100", 4, 2, 128, 0, 0, 1024, columns, ("tcgen05.mma",), True, 1.0)


def test_a_launch_decides_what_the_compiler_may_assume(tmp_path):
    program = HEADER + DOT.replace("WHICH", "tf32") + "s = specializations()[0]\nprint(s.signature, s.constexprs)"
    program += """
for value in (48, 50, 2**31, 1):
    s = of_launch("n", kernel, dict(x=floats(4), y=None, stride=value, N=64, PRECISION="tf32"), num_warps=4,
                  num_stages=2, tensor_cores=True)
    print(s.signature.get("stride"), s.constexprs.get("stride"), "y" in s.constexprs)
"""
    (tmp_path / "kernel.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "kernel.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["i32:16 None True", "i32 None True", "i64:16 None True", "None 1 True"]


def test_a_specialization_names_each_argument_once():
    class Kernel:
        arg_names = ("x", "n", "N")
        __name__ = "kernel"

    good = {"signature": {"x": "*fp32", "n": "i32"}, "constexprs": {"N": 64}}
    settings = {"kernel": Kernel(), "num_warps": 4, "num_stages": 1, "tensor_cores": False}
    assert Specialization(name="good", **good, **settings).chips == tuple(CHIPS)
    with pytest.raises(ValueError, match="missing: n; unknown: m"):
        Specialization(name="bad", signature={"x": "*fp32", "m": "i32"}, constexprs={"N": 64}, **settings)
    with pytest.raises(ValueError, match="share no name"):
        Specialization(name="bad", signature={"x": "*fp32", "n": "i32", "N": "i32"}, constexprs={"N": 64}, **settings)
    with pytest.raises(ValueError, match=r"sm_75.*known are sm_80"):
        Specialization(name="bad", **good, **settings, chips=("sm_75",))


def test_an_interpreted_kernel_cannot_be_compiled(tmp_path, run_command):
    path = tmp_path / "kernel.py"
    path.write_text(HEADER + DOT.replace("WHICH", "tf32"))
    command = [sys.executable, "-m", "hydra_dist.kernels.ahead_of_time", str(path)]
    done = run_command(command, env={"TRITON_INTERPRET": "1"})
    assert done.returncode != 0
    assert "without TRITON_INTERPRET in the environment it can be compiled" in done.stderr

"""What tools/cuda_budget.py and tools/check_symbols.py read from machine code, on small texts."""

import json
import re
import sys

import pytest

from tools import check_symbols, cuda_budget

NAME = "_ZN3ksm12_GLOBAL__N_111copy_kernelIfLi4EEEvPKfPfl"  # copy_kernel<float, 4>
USAGE = f"""
arch = sm_90
 Function {NAME}:
  REG:40 STACK:16 SHARED:3072 LOCAL:0 CONSTANT[0]:616 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
BOUNDS = f"""
arch = sm_90
.nv.info.{NAME}
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x200 0x1 0x1
"""
# A loop that copies four words at once where they are aligned, or one by one, and does what an
# inner loop and a function do as well.
LINES = """
 0000 LDC R1, c[0x0][0x28]
 0010 ISETP.GE.AND P0, PT, R0, R2, PT
 0020 @P0 BRA 0x90
 0030 LDG.E.128.CONSTANT R4, desc[UR4][R2.64]
 0040 STG.E.128 desc[UR4][R6.64], R4
 0050 BRA 0x110
 0090 LDG.E R4, desc[UR4][R2.64]
 00a0 LDG.E R5, desc[UR4][R2.64+0x4]
 00b0 LDG.E R8, desc[UR4][R2.64+0x8]
 00c0 LDG.E.U16 R9, desc[UR4][R2.64+0xc]
 00d0 LDG.E.U16 R10, desc[UR4][R2.64+0xe]
 0110 HMMA.16816.F32 R12, R4, R8, R12
 0120 BRA.DIV UR6, 0x1f0
 0130 IADD3 R13, R13, 0x1, RZ
 0140 @!P1 BRA 0x130
 0150 CALL.REL.NOINC 0x200
 0160 @!P2 BRA 0x10
 0170 LD.E R4, desc[UR4][R2.64]
 0180 STL [R1], R4
 0190 LDSM.16.M88.4 R4, [R5]
 01a0 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]
 01b0 EXIT
 01c0 BRA 0x1c0
"""
SASS = f"\narch = sm_90\n\t\tFunction : {NAME}\n" + "".join(
    f"        /*{line.split()[0]}*/                   {line.split(maxsplit=1)[1]} ;    /* 0x0 */\n"
    f"                                                                       /* 0x0 */\n"
    for line in LINES.strip().splitlines()
)
NUMBERS = {
    "registers": 40,
    "blocks per SM": 3,  # of 512 threads: 64 K registers hold 1,638 threads
    "shared": 3072,
    "stack": 16,
    "CALL in hot loops": 1,
    "HMMA": 1,
    "LDG.128": 1,
    "STG.128": 1,
    "LDSM": 1,
    "cp.async": 1,
    "generic loads": 1,
    "local": 1,
    # 0x10 to 0x50 and 0x110 to 0x160: eleven instructions, which copy four words.
    "per MMA": 11.0,
    "per word": 2.75,
}


def kernel() -> cuda_budget.Kernel:
    [((name, architecture), found)] = cuda_budget.parse(
        (USAGE + BOUNDS + SASS).splitlines()
    ).items()
    assert (name, architecture, found.threads) == (NAME, "sm_90", 512)
    return found


def test_the_numbers_of_a_kernel_are_those_of_its_machine_code():
    assert cuda_budget.numbers_of(kernel(), "sm_90") == NUMBERS


def test_kernels_are_named_as_in_their_sources():
    assert cuda_budget.short_names([NAME]) == {NAME: "copy_kernel<float, 4>"}


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "architecture", "blocks"),
    [
        (32, 0, 256, "sm_90", 8),  # threads
        (32, 0, 256, "sm_120", 6),
        (33, 0, 256, "sm_90", 6),  # registers come by eights
        (255, 0, 256, "sm_80", 1),
        (16, 48 << 10, 256, "sm_90", 4),  # shared memory, with 1 KiB of the system
        (16, 48 << 10, 256, "sm_120", 2),
        (16, 0, 32, "sm_90", 32),  # blocks
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, threads, architecture, blocks):
    found = cuda_budget.Kernel(threads=threads, registers=registers, shared=shared)
    assert cuda_budget.blocks_of(found, architecture) == blocks


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_changes_is_better_or_worse(number):
    agreed = {"copy_kernel": {"sm_90": NUMBERS}}
    more = {"copy_kernel": {"sm_90": NUMBERS | {number: NUMBERS[number] + 1}}}
    less_is_worse = number in ("blocks per SM", "LDG.128", "STG.128", "LDSM", "cp.async")
    line = f"copy_kernel, sm_90: {number} {NUMBERS[number] + 1}, agreed {NUMBERS[number]}"
    found = cuda_budget.compared(more, agreed)
    assert found == (
        (([], [line]) if less_is_worse else ([line], [])) if number != "HMMA" else ([], [])
    )
    worse, better = cuda_budget.compared(agreed, more)
    assert len(better) == len(found[0]) and len(worse) == len(found[1])


def test_a_kernel_is_in_the_budget_and_in_the_build():
    budget = {"copy_kernel": {"sm_90": NUMBERS}}
    assert cuda_budget.compared(budget, {})[0] == ["copy_kernel, sm_90: only in the build"]
    assert cuda_budget.compared({}, budget)[0] == ["copy_kernel, sm_90: only in the budget"]


def run(monkeypatch, tmp_path, *options, nvcc="13.0.88", numbers=NUMBERS):
    path = tmp_path / "budget.json"
    monkeypatch.setattr(cuda_budget, "BUDGET", path)
    monkeypatch.setattr(cuda_budget, "nvcc_version", lambda: nvcc)
    monkeypatch.setattr(
        cuda_budget, "budget_of", lambda folder: {"copy_kernel": {"sm_90": numbers}}
    )
    monkeypatch.setattr(sys, "argv", ["cuda_budget.py", "build", *options])
    cuda_budget.main()
    return json.loads(path.read_text())


def test_a_cost_that_grows_fails_and_names_it(monkeypatch, tmp_path, capsys):
    written = run(monkeypatch, tmp_path, "--write")
    assert written == {"nvcc": "13.0.88", "kernels": {"copy_kernel": {"sm_90": NUMBERS}}}
    assert run(monkeypatch, tmp_path) == written
    with pytest.raises(SystemExit, match="BUDGET=--write"):
        run(monkeypatch, tmp_path, numbers=NUMBERS | {"local": 9})
    assert "copy_kernel, sm_90: local 9, agreed 1" in capsys.readouterr().out
    run(monkeypatch, tmp_path, numbers=NUMBERS | {"local": 9}, nvcc="13.1.2")
    assert "skipped: the budget is of nvcc 13.0.88, this one is 13.1.2" in capsys.readouterr().out


def test_the_budget_has_every_kernel_on_every_architecture():
    agreed = json.loads(cuda_budget.BUDGET.read_text())["kernels"]
    kernels = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^\n]*\)\s+)?(\w+)\(")
    sources = [path.read_text() for path in cuda_budget.SOURCES[0].parent.glob("*.cu*")]
    named = {name for source in sources for name in kernels.findall(source)}
    assert named == {name.partition("<")[0] for name in agreed}
    for name, numbers in agreed.items():
        assert numbers.keys() == cuda_budget.LIMITS.keys(), name
        for found in numbers.values():
            assert found.get("generic loads", 0) == 0


def test_symbols_are_those_of_torch_or_of_a_version():
    exported = {"torch_list_push_back", "_ZSt3foo@GLIBCXX_3.4"}
    needed = {
        "torch_list_push_back",
        "_ZSt3foo",
        "PyModule_Create2",
        "cudaGetDevice@libcudart.so.13",
    }
    assert check_symbols.missing(needed, exported) == set()
    assert check_symbols.missing(needed | {"torch_new"}, exported) == {"torch_new"}

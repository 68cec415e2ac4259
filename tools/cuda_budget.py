"""What the machine code of every CUDA kernel costs, beside what it may cost; no GPU is needed.

    make cuda-budget                  compare the build with tools/cuda_budget.json
    make cuda-budget BUDGET=--write   write that file anew

The objects of ``make cuda-check`` are disassembled. A number that is worse than in the file is an
error; the machine code of another nvcc is another, and not compared. Numbers of a kernel:

registers, shared, stack   of a thread, bytes of a block but for dynamic memory, bytes of a thread
blocks per SM              that fit by threads, registers and that memory
HMMA .. cp.async           instructions of the whole kernel; spilled registers are among `local`
per MMA, per word, ..      instructions of one pass through the hot loop over what it does in one:
                           products of the tensor cores, and words of 32 bits of global or shared
                           memory that it reads or writes, whichever are more. The hot loop does
                           most outside of inner loops, which count once; of its ways the one that
                           does most, and of these the shortest.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BUDGET = Path(__file__).with_suffix(".json")
SOURCES = sorted((BUDGET.parents[1] / "csrc/cuda").glob("*.cu"))
DISASSEMBLER = ("cuobjdump", "nvdisasm")  # the first calls the second

# Threads, bytes of shared memory and blocks of a multiprocessor; a block takes 1 KiB more.
LIMITS = {
    "sm_80": (2048, 164 << 10, 32),
    "sm_90": (2048, 228 << 10, 32),
    "sm_100": (2048, 228 << 10, 32),
    "sm_120": (1536, 100 << 10, 24),
}
REGISTERS = 64 << 10  # of a multiprocessor, which warps take by 256

COUNTED = {
    "HMMA": r"HMMA",
    "BMMA": r"BMMA",
    "HGMMA": r"HGMMA",
    "LDG.128": r"LDG\..*128",
    "STG.128": r"STG\..*128",
    "LDSM": r"LDSM",
    "cp.async": r"LDGSTS",
    "generic loads": r"LD(\.|$)",
    "local": r"LDL|STL",
}
DONE = {  # what a loop does, and how it is seen: reads, and writes
    "per MMA": (r"[HBIDQ]G?MMA", r"$"),
    "per word": (r"LDG", r"STG"),
    "per shared word": (r"LDS(\.|$)", r"STS"),
}
FEWER_IS_WORSE = {"blocks per SM", "LDG.128", "STG.128", "LDSM", "cp.async"}
NEITHER_IS_WORSE = {"HMMA", "BMMA", "HGMMA"}


class Instruction(NamedTuple):
    address: int
    text: str  # such as "@P0 BRA 0x3b0"

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@")

    @property
    def opcode(self) -> str:
        return self.text.split()[self.predicated]

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.text) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def leaves(self) -> bool:
        """Whether the next instruction is never the one behind it."""
        if re.match(r"EXIT|RET|BRX|JMX", self.opcode):
            return not self.predicated
        conditions = re.search(r"\bU?P\d|\.(DIV|CONV)", self.text)
        return self.opcode.startswith("BRA") and not self.predicated and not conditions

    def does(self, what: str) -> tuple[float, float]:
        """How much of it the instruction reads, and writes."""
        size = 1.0 if what == "per MMA" else words_of(self.opcode)
        reads, writes = (bool(re.match(pattern, self.opcode)) for pattern in DONE[what])
        return size * reads, size * writes


def words_of(opcode: str) -> float:
    """How many words of 32 bits a load or store moves."""
    sizes = {r"\.128": 4.0, r"\.64": 2.0, r"\.[US]16": 0.5, r"\.[US]8": 0.25}
    return next((size for pattern, size in sizes.items() if re.search(pattern, opcode)), 1.0)


@dataclass
class Kernel:
    """A kernel as ``cuobjdump`` prints it."""

    threads: int = 256  # unless its launch bounds say so
    registers: int = 0
    stack: int = 0
    shared: int = 0
    code: list[Instruction] = field(default_factory=list)


def parse(lines: Iterable[str]) -> dict[tuple[str, str], Kernel]:
    """Kernels by name and architecture, from what cuobjdump prints: -res-usage, -elf and -sass."""
    kernels: dict[tuple[str, str], Kernel] = defaultdict(Kernel)
    architecture, key, bounds_follow = "", ("", ""), False
    for line in lines:
        if line.startswith("        /*"):
            if found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line):
                kernels[key].code.append(Instruction(int(found[1], 16), found[2]))
        elif line.startswith("arch = "):
            architecture = line.split()[2]
        elif line.startswith(".nv.info.") or "Function " in line:
            name = re.search(r"^\.nv\.info\.([\w$]+)|Function :? ?([\w$]+)", line)
            key = (name[1] or name[2], architecture) if name else key
        elif "REG:" in line:
            sizes = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)
            kernel = kernels[key]
            kernel.registers, kernel.stack, kernel.shared = map(
                int, sizes.groups() if sizes else ()
            )
        elif "EIATTR_MAX_THREADS" in line:
            bounds_follow = True
        elif bounds_follow and "Value:" in line:
            kernels[key].threads = math.prod(int(x, 16) for x in re.findall(r"0x(\w+)", line)[:3])
            bounds_follow = False
    return {key: kernel for key, kernel in kernels.items() if kernel.code}


@dataclass(frozen=True)
class Loop:
    """The instructions between the target of a backward branch and the branch."""

    code: list[Instruction]

    def holds(self, other: "Loop") -> bool:
        return self is not other and {i.address for i in other.code} < {
            i.address for i in self.code
        }

    def best(self, what: str) -> tuple[float, int]:
        """How much of it the way that does most does, and its least number of instructions."""
        first, last = self.code[0].address, self.code[-1].address
        # By address: read, written, and minus the instructions so far, on the best way.
        reached: dict[int, tuple[float, float, int]] = {first: (0.0, 0.0, 0)}
        rank = lambda way: (max(way[:2]), sum(way[:2]), way[2])  # noqa: E731
        leaders: set[int] = set()  # where a computed branch may lead
        computed: tuple[float, float, int] | None = None
        best = (0.0, 0)
        for number, instruction in enumerate(self.code):
            if instruction.address in leaders and computed:
                reached.setdefault(instruction.address, computed)
            way = reached.get(instruction.address)
            behind = self.code[number + 1].address if instruction.address < last else None
            if instruction.leaves and behind:
                leaders.add(behind)
            if way is None:
                continue
            read, written = instruction.does(what)
            way = (way[0] + read, way[1] + written, way[2] - 1)
            if instruction.opcode.startswith("BRX"):
                computed = way
            target = instruction.target
            if target == first:
                best = max(best, (max(way[:2]), way[2]))
            goals = [target if target and first < target <= last else None]
            goals += [None if instruction.leaves else behind]
            for goal in filter(None, goals):
                if goal > instruction.address and (
                    goal not in reached or rank(way) > rank(reached[goal])
                ):
                    reached[goal] = way
        return best[0], -best[1]


def loops_of(code: list[Instruction]) -> list[Loop]:
    ends: dict[int, int] = {}
    for instruction in code:
        if instruction.target is not None and instruction.target < instruction.address:
            ends[instruction.target] = instruction.address  # the last of one start
    return [
        Loop([instruction for instruction in code if first <= instruction.address <= last])
        for first, last in ends.items()
    ]


def hot_loop(loops: list[Loop], what: str) -> Loop | None:
    """The one that does most of it itself, not in a loop inside."""

    def own(loop: Loop) -> float:
        inner = {i.address for other in loops if loop.holds(other) for i in other.code}
        moved = [i.does(what) for i in loop.code if i.address not in inner]
        return max(sum(read for read, _ in moved), sum(written for _, written in moved))

    hottest = max(loops, key=own, default=None)
    return hottest if hottest and own(hottest) else None


def blocks_of(kernel: Kernel, architecture: str) -> int:
    threads, memory, blocks = LIMITS[architecture]
    warps = -(-kernel.threads // 32)
    per_warp = -(-kernel.registers * 32 // 256) * 256
    by_memory = memory // (kernel.shared + 1024)
    return min(blocks, threads // kernel.threads, REGISTERS // (per_warp * warps), by_memory)


def numbers_of(kernel: Kernel, architecture: str) -> dict[str, float]:
    loops = loops_of(kernel.code)
    hot = {what: loop for what in DONE if (loop := hot_loop(loops, what))}
    in_hot = {instruction for loop in hot.values() for instruction in loop.code}
    numbers: dict[str, float] = {
        "registers": kernel.registers,
        "blocks per SM": blocks_of(kernel, architecture),
        "shared": kernel.shared,
        "stack": kernel.stack,
        "CALL in hot loops": sum(i.opcode.startswith("CALL") for i in in_hot),
    }
    for name, pattern in COUNTED.items():
        numbers[name] = sum(bool(re.match(pattern, i.opcode)) for i in kernel.code)
    for what, loop in hot.items():
        done, instructions = loop.best(what)
        numbers[what] = round(instructions / done, 2)
    return {number: value for number, value in numbers.items() if value}


Budget = dict[str, dict[str, dict[str, float]]]  # numbers by kernel and architecture


def compared(found: Budget, agreed: Budget) -> tuple[list[str], list[str]]:
    """What is worse than agreed, and what is better, in words."""
    worse, better = [], []
    for kernel in sorted(found.keys() | agreed.keys()):
        for architecture in sorted(found.get(kernel, {}).keys() | agreed.get(kernel, {}).keys()):
            now = found.get(kernel, {}).get(architecture)
            before = agreed.get(kernel, {}).get(architecture)
            where = f"{kernel}, {architecture}"
            if now is None or before is None:
                there = "the build" if before is None else "the budget"
                worse.append(f"{where}: only in {there}")
                continue
            for number in before.keys() | now.keys():
                change = now.get(number, 0) - before.get(number, 0)
                if number in FEWER_IS_WORSE:
                    change = -change
                if change and number not in NEITHER_IS_WORSE:
                    line = f"{where}: {number} {now.get(number, 0)}, agreed {before.get(number, 0)}"
                    (worse if change > 0 else better).append(line)
    return worse, better


def find_disassembler() -> Path:
    """The folder of cuobjdump and nvdisasm."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    for package, below in ("nvidia", "cu*/bin"), ("triton", "backends/nvidia/bin"):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or []:
            folders += sorted(Path(root).glob(below))
    for folder in folders:
        if all(os.access(folder / name, os.X_OK) for name in DISASSEMBLER):
            return folder
    sys.exit(
        "cuobjdump and nvdisasm are not on the PATH, in the toolkit or in a package of this "
        "Python. Install them: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    )


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    text = subprocess.run([nvcc or "nvcc", "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"V([\d.]+)", text.stdout)
    return found[1] if found else "unknown"


def dumped(objects: Iterable[Path]) -> Iterator[str]:
    folder = find_disassembler()
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    for path in objects:
        for option in ("-res-usage", "-elf", "-sass"):
            command = [folder / "cuobjdump", option, path]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True, env=environment
            ) as run:
                yield from run.stdout or ()
            if run.returncode:
                sys.exit(f"{folder / 'cuobjdump'} {option} {path} failed")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """By mangled name what people call a kernel, such as add_partials_kernel<float>."""
    names = list(names)
    command = ["c++filt", *names]
    plain = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    prefixes = r"^void |ksm::|\(anonymous namespace\)::"
    bare = (re.sub(prefixes, "", name) for name in plain)
    return {
        name: re.sub(r"\((?![^<]*>).*", "", short) for name, short in zip(names, bare, strict=True)
    }


def budget_of(folder: Path) -> Budget:
    kernels = parse(dumped(next(folder.glob(f"**/cuda/{path.stem}.o")) for path in SOURCES))
    names = short_names({name for name, _ in kernels})
    budget: Budget = defaultdict(dict)
    for (name, architecture), kernel in kernels.items():
        budget[names[name]][architecture] = numbers_of(kernel, architecture)
    return budget


def written(nvcc: str, budget: Budget) -> str:
    """One line for each kernel and architecture."""
    order = sorted(LIMITS, key=lambda architecture: int(architecture[3:]))
    kernels = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(
            f"   {json.dumps(architecture)}: {json.dumps(budget[name][architecture])}"
            for architecture in order
            if architecture in budget[name]
        )
        + "\n  }"
        for name in sorted(budget)
    )
    return f'{{\n "nvcc": {json.dumps(nvcc)},\n "kernels": {{\n{kernels}\n }}\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the objects of a build")
    parser.add_argument("--write", action="store_true", help=f"write {BUDGET.name} anew")
    parser.add_argument("--print", metavar="KERNEL", help="numbers of kernels of such names")
    options = parser.parse_args()
    nvcc = nvcc_version()
    agreed = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"nvcc": nvcc, "kernels": {}}
    if nvcc != agreed["nvcc"] and not options.write and not options.print:
        print(f"skipped: the budget is of nvcc {agreed['nvcc']}, this one is {nvcc}")
        return
    found = budget_of(options.folder)
    if options.print:
        for name in sorted(found):
            for architecture, numbers in found[name].items() if options.print in name else ():
                print(name, architecture, *(f"{key} {value}," for key, value in numbers.items()))
        return
    if options.write:
        BUDGET.write_text(written(nvcc, found))
    worse, better = compared(found, agreed["kernels"])
    for title, lines in ("better", better), ("worse", worse):
        print(f"{len(lines)} numbers {title} than agreed", *lines, sep="\n  ")
    print(f"{len(found)} kernels, {sum(map(len, found.values()))} with their architectures")
    if (worse or not found) and not options.write:
        sys.exit("A kernel costs more. Mend it, or agree: make cuda-budget BUDGET=--write")


if __name__ == "__main__":
    main()

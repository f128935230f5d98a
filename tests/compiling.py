"""Triton kernels as machine code, without a GPU."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# for a test that runs its file once more, under the interpreter; the longer list has a name of its own
WHICH = pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])


def under_the_interpreter(file, which, chosen=""):
    "Run the tests of a file in a process of their own: the interpreter is chosen when Triton is imported."
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "-m", which, "-k", chosen, "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def thinned(cases, quick):
    "Parameters of a test: those at the places of `quick` are run by `make test`, the others by name."
    return [pytest.param(*case, marks=[] if i in quick else pytest.mark.slow) for i, case in enumerate(cases)]


def compiled_kernel(kernel, signature, constants, aligned, capability, options):
    "The kernel for a compute capability; `signature`, `constants` by name, `aligned` numbers of arguments that 16 divides."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    source = ASTSource(
        kernel, signature,
        {(kernel.arg_names.index(n),): v for n, v in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(built, tmp_path):
    "Registers and bytes of stack of a thread."
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists(): pytest.skip("this Triton has no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return tuple(int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", text).groups())

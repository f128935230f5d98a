"""Triton kernels as machine code, without a GPU."""
import re
import subprocess
from pathlib import Path

import pytest


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

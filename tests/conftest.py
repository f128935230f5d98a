import os
import shutil
from importlib.metadata import version

# TRL 1.15's own head has Triton kernels and nothing else (1.16 folds in torch on a CPU): without a GPU, they run in Triton's interpreter.
if version("trl").startswith("1.15.") and not shutil.which("nvidia-smi"): os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--shots", help="folder for the browser tests' screenshots")

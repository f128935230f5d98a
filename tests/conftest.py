import gc
import os
import random
import shutil
import sys
from importlib.metadata import version

import pytest
from hypothesis import HealthCheck, settings

# TRL 1.15's own head has Triton kernels and nothing else (1.16 folds in torch on a CPU): without a GPU, they run in Triton's
# interpreter.
if version("trl").startswith("1.15.") and not shutil.which("nvidia-smi"): os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--shots", help="folder for the browser tests' screenshots")
    parser.addoption(
        "--fresh-draws",
        action="store_true",
        help="draw other examples each time; without it they follow from a test's source alone",
    )


def pytest_configure(config):
    "What is drawn is fixed unless fresh draws are asked for; how long a draw takes never fails a test."
    common = dict(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("fixed", derandomize=True, **common)
    settings.register_profile("fresh", print_blob=True, **common)
    settings.load_profile("fresh" if config.getoption("--fresh-draws") else "fixed")
    # Newer releases of Hypothesis draw some numbers from the source of whatever modules are loaded, which depends on the tests
    # that ran before
    providers = sys.modules.get("hypothesis.internal.conjecture.providers")
    if not config.getoption("--fresh-draws") and hasattr(providers, "is_local_module_file"):
        providers.is_local_module_file = lambda path: False


def pytest_collection_finish(session):
    "What is imported by now stays. Training ends with a full collection, which looked at its million objects for 0.3 s each time."
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "Every test, its fixtures included, starts from the same state, whichever tests ran before it, and sums in one thread."
    random.seed(0)
    if "grpo_nb.ground.events" in sys.modules: sys.modules["grpo_nb.ground.events"].said.clear() # it hears what is said once
    if "numpy" in sys.modules: sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def unpatched(monkeypatch):
    "A test that patches TRL: it hears what is said once, and leaves TRL as it was."
    from grpo_nb.ground import events
    from grpo_nb.trainers.patch import UnpatchFastRL

    monkeypatch.setattr(events, "said", set())
    yield
    UnpatchFastRL()

"""Run by torchrun in two processes: several scripts of this folder one after the other, for the imports take longer than most."""
import json
import random
import runpy
import sys
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

own = {name: vars(Accelerator)[name] for name in ("is_fsdp2", "backward")} # what a script may set


def as_in_a_fresh_process():
    for state in (AcceleratorState, GradientState, PartialState): state._reset_state()
    for name, value in own.items(): setattr(Accelerator, name, value)
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)


for script, *args in json.loads(sys.argv[1]):
    as_in_a_fresh_process()
    sys.argv[1:] = args
    print(f"{script} {' '.join(args)}".strip(), file=sys.stderr, flush=True) # a traceback follows the script's name
    runpy.run_path(str(Path(__file__).with_name(script)), run_name="__main__")
dist.destroy_process_group()

"""Peak memory of merging a model of so many layers, in a process of its own.

Prints in MB: the weights, what was taken beside them, a shard, a layer in 16 bits, and the largest matrix in float32.
What glibc keeps of blocks that were given back is not counted: left to itself it keeps up to 176 MB here, whatever the model's
size, and `malloc_trim` returns all of it.
"""
import ctypes
import os
import sys
import threading
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
import torch
import transformers
from peft import LoraConfig, get_peft_model

from grpo_nb.models.folder import write_weights
from grpo_nb.models.stream import Weights, skeleton

SHARD = 32 # MB


def resident(): # MB of this process that no file stands behind
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


config = transformers.LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=int(sys.argv[2]),
                                  num_attention_heads=16, num_key_value_heads=8, head_dim=64)
model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(
    r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
if sys.platform == "linux": ctypes.CDLL(None).mallopt(-3, 1 << 20) # M_MMAP_THRESHOLD: blocks of 1 MB and more go back at once
before, most, going = resident(), [0.0], [True]


def watch():
    while going[0]:
        most[0] = max(most[0], resident())
        time.sleep(0.01)


thread = threading.Thread(target=watch)
thread.start()
write_weights(Weights(model), skeleton(model, torch.bfloat16), Path(sys.argv[1]), torch.bfloat16, shard_size=SHARD << 20)
going[0] = False
thread.join()
size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora" not in n) / 2**20
assert abs(sum(f.stat().st_size for f in Path(sys.argv[1]).glob("*.safetensors")) / 2**20 - size) < 1
layer = sum(p.numel() * 2 for n, p in model.named_parameters() if ".layers.0." in n and "lora" not in n) / 2**20
largest = max(p.numel() * 4 for p in model.parameters()) / 2**20
print(f"{size:.0f} {most[0] - before:.0f} {SHARD} {layer:.0f} {largest:.0f}")

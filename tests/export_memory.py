"""Peak memory of merging a model, in a process of its own: prints the weights' size and what was taken beside them, in MB."""
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


def resident(): # MB of this process that no file stands behind
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


config = transformers.LlamaConfig(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=14,
                                  num_attention_heads=16, num_key_value_heads=8, head_dim=64)
model = get_peft_model(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LoraConfig(
    r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
before, most, going = resident(), [0.0], [True]


def watch():
    while going[0]:
        most[0] = max(most[0], resident())
        time.sleep(0.01)


thread = threading.Thread(target=watch)
thread.start()
write_weights(Weights(model), skeleton(model, torch.bfloat16), Path(sys.argv[1]), torch.bfloat16, shard_size=32 << 20)
going[0] = False
thread.join()
size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "lora" not in n) / 2**20
assert abs(sum(f.stat().st_size for f in Path(sys.argv[1]).glob("*.safetensors")) / 2**20 - size) < 1
print(f"{size:.0f} {most[0] - before:.0f}")

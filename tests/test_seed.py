"""The example of the README, unchanged but for the model's name, with the imports in both orders."""
import subprocess
import sys

import pytest
from parity import tiny, tokenizer

EXAMPLE = '''
from grpo_nb import FastLanguageModel, PatchFastRL
from trl import GRPOTrainer, GRPOConfig          # before or after patching: both work

model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="Qwen/Qwen2.5-3B-Instruct", max_seq_length=4096, load_in_4bit=True,
    fast_inference=True, gpu_memory_utilization=0.6, max_lora_rank=64)
model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64)
PatchFastRL("grpo", FastLanguageModel)

def correctness_reward(prompts, completions, answer, **kwargs):
    return [1.0 if expected in completion else 0.0 for completion, expected in zip(completions, answer)]

config = GRPOConfig(output_dir="./grpo_output", num_generations=8, max_completion_length=512, beta=0.04,
    per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=5e-6, num_train_epochs=1)
trainer = GRPOTrainer(model=model, reward_funcs=[correctness_reward], args=config, train_dataset=dataset)
trainer.train()
'''

CHECK = '''
from transformers.trainer_utils import TrainOutput
config.logging_steps = 1
result = trainer.train()
assert type(result).__name__ == "TrainOutput", result
logged = {k for row in trainer.state.log_history for k in row}
wanted = {
    "completion_length", "kl", "clip_ratio", "reward", "rewards/correctness_reward/mean", "packing/efficiency",
    "step/tokens_per_second",
}
assert wanted <= logged, sorted(wanted - logged)
assert config.per_device_train_batch_size == 2 and config.unsloth_num_chunks == -1
print("trained", result.global_step, "steps")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A complete model folder: a Qwen3 shape of random weights, a tokenizer with a chat template."
    path = tmp_path_factory.mktemp("model")
    tiny("qwen3", hidden_size=64, intermediate_size=128, max_position_embeddings=4096).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("order", ["trl last", "trl first"])
def test_example_runs_unchanged(folder, tmp_path, order):
    code = EXAMPLE.replace("Qwen/Qwen2.5-3B-Instruct", str(folder))
    if order == "trl first": code = "from trl import GRPOTrainer, GRPOConfig\n" + code
    data = (
        'from datasets import Dataset\n'
        'dataset = Dataset.from_list([{"prompt": f"w{i} w{i + 1}", "answer": f"w{i + 2}"} for i in range(3, 4)])\n'
    )
    # the first call of `train` logs every 10 steps, as TRL's default has it; the second, by the check, every step
    script = tmp_path / "example.py"
    script.write_text(data + code + (CHECK if order == "trl last" else 'print("trained", trainer.state.global_step, "steps")\n'))
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "trained" in done.stdout
    assert done.stdout.count("is read as 2") == 1, done.stdout
    assert "fp32" in done.stdout, done.stdout
    (tmp_path / "out.txt").write_text(done.stdout)
    print(done.stdout)

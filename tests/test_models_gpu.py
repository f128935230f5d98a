"Loading and adapters on a CUDA device."
import pytest
import torch
from test_models import adapter_gradients, bnb, write_model, written_out

from grpo_nb.models.device import best_dtype, why_not_four_bit
from grpo_nb.models.load import FastLanguageModel, settings_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return write_model(tmp_path_factory.mktemp("models") / "digits")


def test_defaults(folder):
    model, _ = FastLanguageModel.from_pretrained(folder)
    assert why_not_four_bit("cuda") == "" and settings_of(model).load_in_4bit
    assert model.device.type == "cuda" and model.dtype == best_dtype()
    assert all(m.compute_dtype == best_dtype() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))


@pytest.mark.parametrize("device_map", ["cpu", "cuda:0", "auto", {"": 0}, 0])
@pytest.mark.parametrize("four_bit", [True, False])
def test_device_maps(folder, device_map, four_bit):
    model, _ = FastLanguageModel.from_pretrained(folder, device_map=device_map, load_in_4bit=four_bit)
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="auto")
    assert model.device.type == ("cpu" if device_map == "cpu" else "cuda")
    assert settings_of(model).gradient_checkpointing == (device_map != "cpu")
    assert settings_of(model).dtype == (torch.float32 if device_map == "cpu" else best_dtype())
    assert adapter_gradients(model, torch.randint(0, 18, (2, 5), device=model.device)).isfinite().all()


def test_4bit_gradients_equal_dequantised_weights(folder):
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=True)
    reference, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    written_out(model, reference)
    both = [FastLanguageModel.get_peft_model(m, r=4) for m in (model, reference)]
    for m in both:
        torch.manual_seed(1)
        for p in m.parameters():
            if p.requires_grad: p.data = torch.randn(p.shape).to(p) * 0.1
    ids = torch.randint(0, 18, (3, 9), device="cuda")
    before, truth = (adapter_gradients(m, ids) for m in both)
    with FastLanguageModel.for_inference(both[0]): both[0].generate(ids, max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(adapter_gradients(both[0], ids), before, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(before, truth, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("four_bit", [True, False])
def test_stock_trainer(folder, tmp_path, four_bit):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, _ = FastLanguageModel.from_pretrained(folder, load_in_4bit=four_bit, fast_inference=True, gpu_memory_utilization=0.6)
    model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=64)
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+{i}="}]} for i in range(8)])
    def digits(completions, **columns):
        return [float(sum(c.isdigit() for c in completion[0]["content"])) for completion in completions]
    digits.__name__ = "digits"
    config = GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, per_device_train_batch_size=8,
        max_completion_length=6, max_steps=3, beta=0.04, bf16=best_dtype() == torch.bfloat16, fp16=False,
        learning_rate=1e-2, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
    )
    trainer = GRPOTrainer(model=model, reward_funcs=digits, args=config, train_dataset=dataset)
    trainer.train()
    assert any(row.get("grad_norm", 0) > 0 for row in trainer.state.log_history)

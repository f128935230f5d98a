"Loading and adapters on a CUDA device."
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
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


# ---- checkpoints in the host's memory

def large(how, layers=4):
    "A model whose layers' inputs are large enough to be moved, with an adapter."
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=layers,
                                         head_dim=64, num_attention_heads=8, num_key_value_heads=2)).to("cuda", torch.bfloat16)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.2, use_gradient_checkpointing=how)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad: p.data.normal_(std=0.1)
    return model


def step(model, ids):
    "Gradients of a step, and the bytes that stood between forward and backward; without kernels that differ from themselves."
    model.zero_grad()
    torch.manual_seed(2)
    with sdpa_kernel(SDPBackend.MATH): # the fast one adds up its gradients in any order
        before = torch.cuda.memory_allocated()
        loss = model.train()(input_ids=ids, labels=ids).loss
        held = torch.cuda.memory_allocated() - before
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad], held


def test_checkpoints_on_the_host_have_the_same_bits(monkeypatch):
    from torch.utils.checkpoint import checkpoint

    import grpo_nb.ops.layer.host as host
    ids = torch.randint(0, 512, (4, 1024), device="cuda")
    put, moved = host.put, []
    def counted(tensor):
        kept = put(tensor)
        moved.append(isinstance(kept, host.Kept))
        return kept
    monkeypatch.setattr(host, "put", counted)
    plain, there = large(True), large("unsloth")
    for around in range(20):
        if around: # as a trainer does around each sampling
            for m in (plain, there):
                m.gradient_checkpointing_disable()
                m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (truth, held), (found, less) = step(plain, ids), step(there, ids)
        assert all(map(torch.equal, truth, found)) and held - less >= 3 * 4 * 1024 * 512 * 2 # all but one layer
    assert moved.count(True) == 80
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(getattr(m, "_gradient_checkpointing_func", None) is None or m._gradient_checkpointing_func.func is checkpoint
               for m in plain.modules())


def test_two_graphs_and_a_second_backward():
    "Several forwards before their backwards, in any order, and one graph twice."
    model, ids = large("unsloth"), [torch.randint(0, 512, (2, 1024), device="cuda") for _ in range(3)]
    alone = [step(model, i)[0] for i in ids]
    for order in (0, 1, 2), (2, 1, 0), (1, 2, 0):
        losses = []
        for i in ids:
            torch.manual_seed(2)
            with sdpa_kernel(SDPBackend.MATH): losses.append(model(input_ids=i, labels=i).loss)
        for k in order:
            model.zero_grad()
            for _ in range(2):
                with sdpa_kernel(SDPBackend.MATH): losses[k].backward(retain_graph=True)
            assert all(torch.equal(p.grad, 2 * g) for p, g in zip((p for p in model.parameters() if p.requires_grad), alone[k]))

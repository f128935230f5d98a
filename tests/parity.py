"""Shared by the parity tests: tiny models of many families, synthetic micro-batches, stock TRL beside ours."""
import copy

import torch
from datasets import Dataset
from transformers import (Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, MixtralConfig, Phi3Config, PreTrainedTokenizerFast,
                          Qwen2Config, Qwen3Config, AutoModelForCausalLM)
from tokenizers import Tokenizer, models, pre_tokenizers

VOCAB = 67


def tokenizer():
    "A word-level tokenizer of made-up words."
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=None)
FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=7),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=7, final_logit_softcapping=3.0, attn_logit_softcapping=5.0,
                                   query_pre_attn_scalar=8, attn_implementation="eager"),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE | dict(num_hidden_layers=3), head_dim=8, sliding_window=7, query_pre_attn_scalar=8,
                                       layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "phi3": lambda: Phi3Config(**SHAPE),
}


def tiny(family="qwen3", seed=0, **changes):
    "A random model of a family, fp32, with weights large enough that log-probs differ."
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for name, value in changes.items(): setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 0.15)
    return model


def micro_batch(rows=8, groups=2, prompt=(1, 9), completion=(0, 12), seed=0, shuffled=True, full_mask_row=True, pad_inside=True):
    "What TRL hands to `compute_loss`: left-padded prompts, right-padded completions, ragged lengths."
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: int(torch.randint(low, high + 1, (1,), generator=g))
    prompts = [torch.randint(3, VOCAB, (pick(*prompt),), generator=g) for _ in range(groups)]
    lengths = [completion[0], max(1, completion[0]), completion[1], *[pick(*completion) for _ in range(rows)]][:rows]
    order = torch.randperm(rows, generator=g).tolist() if shuffled else range(rows)
    owner = [i * groups // rows for i in range(rows)]
    p_ids = torch.zeros(rows, max(map(len, prompts)), dtype=torch.long)
    p_mask = torch.zeros_like(p_ids)
    c_ids = torch.zeros(rows, completion[1], dtype=torch.long)
    c_mask = torch.zeros_like(c_ids)
    for at, i in enumerate(order):
        own = prompts[owner[i]]
        p_ids[at, p_ids.shape[1] - len(own):], p_mask[at, p_ids.shape[1] - len(own):] = own, 1
        c_ids[at, :lengths[i]] = torch.randint(3, VOCAB, (lengths[i],), generator=g)
        c_mask[at, :lengths[i]] = 1
        if pad_inside and lengths[i] > 3: c_ids[at, 2] = 0
    if full_mask_row: c_mask[-1] = 0
    advantages = torch.randn(rows, generator=g)
    advantages[0] = 0.0
    return dict(prompt_ids=p_ids, prompt_mask=p_mask, completion_ids=c_ids, completion_mask=c_mask, advantages=advantages,
                num_items_in_batch=c_mask.sum() * 2)


def grpo_trainer(model, tmp_path, cls=None, **config):
    "A trainer that is never trained: its loss is called on synthetic batches."
    from trl import GRPOConfig, GRPOTrainer

    defaults = dict(output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=12, bf16=False,
                    use_cpu=True, report_to=[], gradient_checkpointing=False, temperature=0.9)
    data = Dataset.from_list([{"prompt": "w3 w4"}] * 8)
    if config.get("beta"): # TRL loads the reference from where the model came from
        model.save_pretrained(f"{tmp_path}/model")
        model.config._name_or_path = f"{tmp_path}/model"
    trainer = (cls or GRPOTrainer)(model=model, reward_funcs=lambda completions, **kw: [0.0] * len(completions), processing_class=tokenizer(),
                                   args=GRPOConfig(**{**defaults, **config}), train_dataset=data)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(trainer, inputs, compute, scale=1.0):
    "Loss, gradients and metrics of one micro-batch under a `_compute_loss`."
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = compute(trainer, trainer.model, copy.copy(inputs))
    (loss * scale).backward()
    return loss.detach(), gradients(trainer.model), {k: list(v) for k, v in trainer._metrics["train"].items()}


def relative(a, b):
    """Largest difference of two gradients over the largest entry, tensor by tensor; the worst of them.

    A tensor whose entries are all below a twentieth of the largest of the model is measured against that twentieth: in fp32 its error
    comes from sums of the others' size. Against fp64, a key projection whose gradient is 0.0007 of the largest is off by 1.7e-7 of
    the largest under stock TRL and by 2.5e-7 under ours; where each query sees one position, the true gradient is 0 and both hold rounding.
    """
    whole = max(v.abs().max().item() for v in b.values()) or 1.0
    zero = lambda d, k, like: d[k] if k in d else torch.zeros_like(like)
    return max((zero(a, k, v) - v).abs().max().item() / max(v.abs().max().item(), whole / 20) for k, v in b.items())

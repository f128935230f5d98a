"""A packed loss is a value: what is done with it, or not done, is what happens to the weights."""
import copy

import pytest
import torch
from datasets import Dataset
from parity import gradients, grpo_trainer, micro_batch, relative, tiny, tokenizer

from transformers.integrations.neftune import activate_neftune

from grpo_nb.patch.core import applied
from grpo_nb.patch.objects import objects
from grpo_nb.trainers import grpo
from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL
from grpo_nb.trainers.tokens import token_stats


pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = grpo_trainer(tiny(), tmp_path_factory.mktemp("value"), loss_type="dapo")
    made.args.max_tokens_per_pack = 22
    return made


def parameters(trainer): return [p for p in trainer.model.parameters() if p.requires_grad]


def packed(trainer, inputs): return grpo.compute_loss(None)(trainer, trainer.model, copy.copy(inputs))


def replayed(trainer, inputs): # TRL's other trainers: log-probs of the batch, and a loss of one's own
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    target = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], 1)
    return token_stats(trainer, trainer.model, ids, mask, target, ()).log_probs.sum(1).pow(2).mean() / 100


@pytest.fixture(params=[packed, replayed], ids=["accumulate", "replay"])
def loss_of(request): return request.param


@pytest.fixture
def wanted(trainer, loss_of):
    "The gradient, by one ordinary backward."
    trainer.model.zero_grad()
    inputs = micro_batch(seed=3, pad_inside=False)
    loss_of(trainer, inputs).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    return inputs, found


def named(trainer, grads): return {n: g for (n, p), g in zip(trainer.model.named_parameters(), grads) if g is not None}


def test_the_first_pack_of_a_model_is_run_as_all_others_are():
    "In 16 bits: the fused layers are attached before the first pack, or a fresh adapter would seem to have left its reference."
    from accelerate import Accelerator
    from peft import LoraConfig, get_peft_model

    from grpo_nb.packs.batch import RolloutBatch
    from grpo_nb.step.packed import PackedStep

    torch.manual_seed(0)
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).to(torch.bfloat16).train()
    step = PackedStep(model, Accelerator(cpu=True))
    packs, seen = step.packs(RolloutBatch.from_inputs(micro_batch(seed=1))), []
    first, again = step.score(packs).log_probs, step.score(packs).log_probs
    step.gradients(packs, lambda i, out: seen.append(out.log_probs.detach()) or out.log_probs.sum())
    assert torch.equal(first, again)
    assert torch.equal(torch.cat(seen), torch.cat([first[pack.row, pack.column] for pack in packs]))


def test_a_loss_that_is_dropped(trainer, loss_of, wanted):
    inputs, _ = wanted
    loss_of(trainer, inputs)
    loss_of(trainer, inputs).detach()
    assert all(p.grad is None for p in parameters(trainer))


def test_autograd_grad(trainer, loss_of, wanted):
    inputs, grads = wanted
    found = torch.autograd.grad(3 * loss_of(trainer, inputs), parameters(trainer), allow_unused=True)
    assert relative(named(trainer, [g / 3 for g in found]), grads) < 1e-6
    assert all(p.grad is None for p in parameters(trainer))


def test_two_losses_and_one_backward(trainer, loss_of, wanted):
    inputs, grads = wanted
    a, b = loss_of(trainer, inputs), loss_of(trainer, inputs)
    (0.25 * a - 2 * b).backward()
    assert relative({n: g / -1.75 for n, g in gradients(trainer.model).items()}, grads) < 1e-5
    trainer.model.zero_grad()


def test_a_second_backward(trainer, loss_of, wanted):
    "Only where the graph was kept, as with any loss of PyTorch's."
    inputs, grads = wanted
    loss = loss_of(trainer, inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative({n: g / 2 for n, g in gradients(trainer.model).items()}, grads) < 1e-5
    with pytest.raises(RuntimeError, match="second time"): loss.backward()
    trainer.model.zero_grad()


def test_an_exception_between_loss_and_backward(trainer, loss_of, wanted):
    inputs, grads = wanted
    with pytest.raises(ZeroDivisionError):
        loss_of(trainer, inputs)
        1 / 0
    loss_of(trainer, inputs).backward()
    assert relative(gradients(trainer.model), grads) < 1e-6
    trainer.model.zero_grad()


def test_an_exception_inside_a_pack(trainer, wanted, loss_of, monkeypatch):
    "What was in `.grad` stands there afterwards, and hooks are back."
    from grpo_nb.step import packed as step

    inputs, grads = wanted
    loss_of(trainer, inputs).backward()
    hook = parameters(trainer)[0].register_hook(lambda g: g)
    calls, run = [], step.run_pack

    def failing(*args):
        calls.append(1)
        if len(calls) == 2: raise MemoryError("in the second pack")
        return run(*args)
    monkeypatch.setattr(step, "run_pack", failing)
    with pytest.raises(MemoryError): loss_of(trainer, inputs).backward()
    assert relative(gradients(trainer.model), grads) < 1e-6 and len(parameters(trainer)[0]._backward_hooks) == 1
    hook.remove()
    trainer.model.zero_grad()


def test_a_hook_on_a_gradient_is_called_once(trainer, loss_of, wanted):
    inputs, grads = wanted
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    calls = []
    handle = weight.register_hook(lambda g: calls.append(1) or 2 * g)
    loss_of(trainer, inputs).backward()
    handle.remove()
    assert len(calls) == 1 and torch.allclose(weight.grad, 2 * grads["model.layers.0.mlp.up_proj.weight"], atol=1e-6)
    trainer.model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(trainer, loss_of, wanted, reentrant):
    inputs, grads = wanted
    model = trainer.model
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant: model.enable_input_require_grads()
    try:
        loss_of(trainer, inputs)
        assert all(p.grad is None for p in parameters(trainer))
        if reentrant and loss_of is replayed: # as with any model: PyTorch refuses autograd.grad through such a layer
            loss_of(trainer, inputs).backward()
            found = [p.grad for p in parameters(trainer)]
        else:
            found = torch.autograd.grad(loss_of(trainer, inputs), parameters(trainer), allow_unused=True)
            assert all(p.grad is None for p in parameters(trainer))
        assert relative(named(trainer, found), grads) < 1e-5
    finally:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if reentrant: model.disable_input_require_grads()


# What reads the rows of a batch

def test_neftune_is_left_to_trl(tmp_path):
    "NEFTune's noise depends on the padded length: the embeddings see rows, in training."
    seen = []
    trainer = grpo_trainer(tiny(), tmp_path, neftune_noise_alpha=5.0)
    activate_neftune(trainer.model, 5.0)
    trainer.model.train()
    trainer.model.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    inputs = micro_batch(seed=5, full_mask_row=False)
    PatchFastRL("grpo")
    trainer._compute_loss(trainer.model, inputs).backward()
    assert seen and all(shape[0] == 8 for shape in seen)


def test_neftune_in_sft(tmp_path):
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": "w3 w4", "completion": " w5 w6 w7"}, {"prompt": "w3", "completion": " w9 w10 w11 w12 w13 w14 w15"}]
    noise = {}
    for patched in (False, True):
        if patched: PatchFastRL("sft")
        torch.manual_seed(0)
        args = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], neftune_noise_alpha=5.0, max_steps=1,
            per_device_train_batch_size=2, gradient_checkpointing=False, learning_rate=0.0, save_strategy="no",
        )
        trainer = SFTTrainer(tiny(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
        sizes, embed = [], trainer.model.get_input_embeddings()
        activate_neftune(trainer.model, 5.0)
        trainer.model.train()
        embed.register_forward_hook(
            lambda m, a, out, sizes=sizes: sizes.append((out - torch.nn.functional.embedding(a[0], m.weight)).abs().max().item())
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        noise[patched] = max(sizes)
    assert noise[True] == pytest.approx(noise[False], rel=0.05)


# Nothing is left behind

def test_nothing_is_left_on_any_object(tmp_path):
    "After a run and UnpatchFastRL no patch is on, no object is changed, and the model's attributes are those it had."
    from grpo_nb import GRPORun
    from trl import GRPOConfig

    model = tiny()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    PatchFastRL("grpo")
    config = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=1,
        use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, save_strategy="no",
    )
    data = Dataset.from_list([{"prompt": "w3 w4"}] * 8)
    run = GRPORun(model, tokenizer(), [lambda completions, **k: [float(len(c)) for c in completions]], data, config)
    run.start(background=False)
    assert run.state == "finished" and {c.by for c in objects()} <= {"step.forward", "ops.layer.fuse"}
    UnpatchFastRL()
    assert objects() == [] and applied() == ()
    left = {name: set(vars(m)) - before[name] for name, m in model.named_modules()}
    assert not {n for names in left.values() for n in names if n.startswith("_grpo_nb")} - {"_grpo_nb_modes"}, left

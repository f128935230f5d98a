"""Whole training runs, stock TRL beside the patched trainer, in situations that users make: weights and logs are the same."""
import pytest
import torch
from datasets import Dataset
from parity import tiny, tokenizer
from transformers import TrainerCallback

from grpo_nb.trainers.patch import PatchFastRL, UnpatchFastRL

NOT_COMPARED = ("time", "runtime", "per_second", "packing/", "completion_length", "clip_ratio_", "flos")


pytestmark = pytest.mark.usefixtures("unpatched")


def reward(completions, **_): return [float(sum(map(ord, c)) % 7) / 7 for c in completions]


def rows(n):
    return Dataset.from_list(
        [{"prompt": " ".join(f"w{3 + (i * 7 + j * (i + 3)) % 60}" for j in range(2 + i % 4))} for i in range(n)]
    )


def trainer_of(ours, folder, model=None, cls=None, callbacks=None, evaluated=False, **config):
    from trl import GRPOConfig, GRPOTrainer

    model = model or tiny()
    if config.get("beta"):
        model.save_pretrained(f"{folder}/model")
        model.config._name_or_path = f"{folder}/model"
    given = (
        dict(
            output_dir=str(folder), report_to=[], logging_steps=1, save_strategy="no", use_cpu=True, seed=1,
            learning_rate=1e-2, optim="sgd", bf16=False, lr_scheduler_type="constant", max_grad_norm=0.0,
            disable_tqdm=True, num_generations=4, max_completion_length=8, max_steps=3, temperature=0.9,
            per_device_train_batch_size=4, gradient_accumulation_steps=2, gradient_checkpointing=False,
        )
        | config
    )
    if ours: given |= dict(engine="hf", max_tokens_per_pack=60)
    more = dict(eval_dataset=rows(4)) if evaluated else {}
    return (cls or GRPOTrainer)(
        model=model, reward_funcs=reward, args=GRPOConfig(**given),
        train_dataset=rows(16), processing_class=tokenizer(), callbacks=callbacks,
        **more,
    )


def logged(trainer):
    kept = [
        {k: v for k, v in r.items() if not any(part in k for part in NOT_COMPARED) and k not in ("clip_ratio", "eval_clip_ratio")}
        for r in trainer.state.log_history
    ]
    return [{k: v for k, v in r.items() if isinstance(v, int | float)} for r in kept]


def same(body, tolerance=1e-5):
    "`body(ours)` trains and returns the trainer; stock's weights and logs are ours."
    found = []
    for ours in (False, True):
        if ours: PatchFastRL("grpo")
        torch.manual_seed(0)
        t = body(ours)
        found.append(({n: p.detach().clone() for n, p in t.model.named_parameters()}, logged(t)))
        UnpatchFastRL()
    (a, theirs), (b, ours) = found
    assert len(theirs) == len(ours) and theirs
    for x, y in zip(theirs, ours):
        assert set(x) == set(y)
        for name in x: assert y[name] == pytest.approx(x[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert max((a[n] - b[n]).abs().max().item() for n in a) < tolerance


def trained(trainer):
    trainer.train()
    return trainer


def test_evaluation_before_the_first_step(tmp_path):
    same(
        lambda ours: trained(
            trainer_of(
                ours, tmp_path, evaluated=True, eval_on_start=True,
                eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4,
            )
        )
    )


def test_a_buffer_of_an_earlier_run_is_not_fresh(tmp_path):
    "The second run trains on the half of the generation batch that the first has left; the weights have moved since."
    def twice(ours):
        t = trainer_of(
            ours, tmp_path, steps_per_generation=4, gradient_accumulation_steps=2, max_steps=1, epsilon=0.02, learning_rate=0.3
        )
        t.train()
        return trained(t)
    same(twice)


def test_a_subclass_of_the_same_name(tmp_path):
    import trl

    class GRPOTrainer(trl.GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return (out[0] * 0.5, *out[1:])
    same(lambda ours: trained(trainer_of(ours, tmp_path, cls=GRPOTrainer)))


def test_a_class_that_was_changed_in_place(tmp_path, monkeypatch):
    import trl

    stock = trl.GRPOTrainer._get_per_token_logps_and_entropies

    def mine(self, *args, **kwargs):
        out = stock(self, *args, **kwargs)
        return (out[0] * 0.5, *out[1:])
    found = []
    for ours in (False, True):
        if ours: PatchFastRL("grpo")
        with monkeypatch.context() as changed:
            changed.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", mine)
            torch.manual_seed(0)
            found.append(trained(trainer_of(ours, tmp_path, max_steps=1)).state.log_history[0]["grad_norm"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class Between(TrainerCallback):
    "Acts between the micro-batches of an optimiser step."
    def __init__(self, act): self.act, self.seen, self.trainer = act, [], None
    def on_substep_end(self, *args, **kwargs): self.act(self)


def zero(callback): callback.trainer.model.zero_grad()
def evaluates(callback): callback.trainer.evaluate()
def rescales(callback): callback.trainer._buffered_inputs[1]["advantages"] = callback.trainer._buffered_inputs[1]["advantages"] * 3
def looks(callback):
    callback.seen.append(sum(p.grad.norm().item() for p in callback.trainer.model.parameters() if p.grad is not None))
def probes(callback): callback.trainer.compute_loss(callback.trainer.model, callback.trainer._buffered_inputs[0])


@pytest.mark.parametrize("act", [zero, evaluates, rescales, looks, probes])
def test_a_callback_between_micro_batches(tmp_path, act):
    seen = []

    def run(ours):
        between = Between(act)
        t = between.trainer = trainer_of(
            ours, tmp_path, callbacks=[between], evaluated=act is evaluates,
            gradient_accumulation_steps=3, per_device_eval_batch_size=4,
        )
        seen.append(between.seen)
        return trained(t)
    same(run)
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_a_tensor_that_is_replaced_between(tmp_path, capsys):
    "Without a callback: by a method of the class, say. It is not trained on silently."
    PatchFastRL("grpo")
    t = trainer_of(True, tmp_path, gradient_accumulation_steps=2, max_steps=1)
    step = t.callback_handler.on_substep_end

    def replacing(*args):
        t._buffered_inputs[1]["advantages"] = t._buffered_inputs[1]["advantages"] * 3
        return step(*args)
    t.callback_handler.on_substep_end = replacing
    with pytest.raises(RuntimeError, match="Micro-batch 2 of 2 was changed"): t.train()


def test_a_backward_that_skips_a_loss(tmp_path):
    def run(ours):
        t = trainer_of(ours, tmp_path, gradient_accumulation_steps=3, max_steps=2)
        inner, calls = t.accelerator.backward, []

        def backward(loss, **kwargs):
            calls.append(1)
            if len(calls) % 3: inner(loss, **kwargs) # the last of each step is dropped
        t.accelerator.backward = backward
        return trained(t)
    same(run)


def with_hook(kind):
    model = tiny()
    embed = model.get_input_embeddings()
    if kind == "second row": embed.register_forward_hook(lambda m, a, out: out + 0.1 * torch.arange(len(out))[:, None, None])
    if kind == "by group":
        embed.register_forward_hook(
            lambda m, a, out: (out.view(-1, 4, *out.shape[1:]) * torch.tensor([1.0, 2, 1, 1])[None, :, None, None]).view_as(out)
        )
    if kind == "under grad":
        embed.register_forward_hook(
            lambda m, a, out: out + 0.1 * torch.arange(len(out))[:, None, None] if torch.is_grad_enabled() else out
        )
    if kind == "backward":
        model.model.layers[0].register_full_backward_hook(
            lambda m, gi, go: tuple(g if g is None else g / (1 + g.norm()) for g in gi)
        )
    if kind == "steering":
        vector = torch.nn.Parameter(0.1 * torch.randn(32, generator=torch.Generator().manual_seed(0)))
        model.model.layers[0].register_forward_hook(
            lambda m, a, out: out + vector if isinstance(out, torch.Tensor) else (out[0] + vector, *out[1:])
        )
        model.__dict__["vector"] = vector
    return model


@pytest.mark.parametrize("kind", ["second row", "by group", "under grad", "backward", "steering"])
def test_what_hangs_on_the_model(tmp_path, kind):
    grads = []

    def run(ours):
        t = trained(trainer_of(ours, tmp_path, model=with_hook(kind), max_steps=2))
        if kind == "steering": grads.append(t.model.__dict__["vector"].grad)
        return t
    same(run)
    if kind == "steering": assert torch.allclose(grads[0], grads[1], atol=1e-5) and grads[1].abs().max() > 0


def test_a_hook_that_comes_between_two_runs(tmp_path):
    "A harmless hook is asked once; another one in its place is asked anew."
    def run(ours):
        t = trainer_of(ours, tmp_path, max_steps=1)
        handle = t.model.get_input_embeddings().register_forward_hook(lambda m, a, out: None)
        t.train()
        handle.remove()
        t.model.get_input_embeddings().register_forward_hook(lambda m, a, out: out + 0.1 * torch.arange(len(out))[:, None, None])
        return trained(t)
    same(run)


def test_a_second_derivative_is_refused(tmp_path):
    PatchFastRL("grpo")
    t = trainer_of(True, tmp_path, max_steps=1)
    t.train()
    inputs = t._buffered_inputs[0]
    found = torch.autograd.grad(t.compute_loss(t.model, inputs), list(t.model.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError): sum(g.pow(2).sum() for g in found if g is not None).backward()


def test_jitter_in_a_router_takes_rows():
    from grpo_nb.step.layout import Layout, choose

    assert choose(tiny("mixtral", router_jitter_noise=0.3).train()).layout is Layout.ROWS
    assert choose(tiny("mixtral", router_jitter_noise=0.3).eval()).layout is Layout.SHARED

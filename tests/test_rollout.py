"""An engine in TRL's trainers: the same completions where the old ones were, tools, and a way back."""
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from parity import VOCAB, tiny, tokenizer

from grpo_nb.engines.base import EngineError, Sampling
from grpo_nb.engines.inplace.engine import InPlace
from grpo_nb.ground.events import said
from grpo_nb.patch.core import PatchSet
from grpo_nb.patch.objects import objects
from grpo_nb.trainers import sampling as rollout
from grpo_nb.trainers.state import state_of
from grpo_nb.trainers.sampling import check_engine, engine_patches, leave_when, why_elsewhere

PATHS = {"grpo": "trl.trainer.grpo_trainer:GRPOTrainer", "rloo": "trl.trainer.rloo_trainer:RLOOTrainer"}


def trainer_of(algorithm, tmp_path, model=None, engine="auto", tok=None, prompts="w3 w4|w5 w6 w7|w8|w9 w10", reward=None, **more):
    import trl

    config = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=10, bf16=False, use_cpu=True, report_to=[],
        gradient_checkpointing=False, max_steps=2, save_strategy="no", learning_rate=1e-2,
        logging_steps=1, beta=0.0,
    )
    kinds = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[algorithm]
    args = kinds[0](**{**config, **{k: v for k, v in more.items() if k != "tools"}})
    args.engine = engine
    data = Dataset.from_list([{"prompt": p} for p in prompts.split("|")] if isinstance(prompts, str) else prompts)
    reward = reward or (lambda completions, **_: [float(len(set(c.split()))) for c in completions])
    extra = {"tools": more["tools"]} if "tools" in more else {}
    return kinds[1](
        model=model or tiny(), reward_funcs=reward, args=args, train_dataset=data, processing_class=tok or tokenizer(), **extra
    )


def turn(trainer, prompts):
    "One call as TRL itself makes it, which differs between versions."
    method = type(trainer)._generate_single_turn
    code = getattr(method, "__wrapped__", method).__code__
    names = code.co_varnames[:code.co_argcount]
    return trainer._generate_single_turn(prompts, None, {}, *([4] if "num_generations" in names else []))


@pytest.fixture(params=PATHS)
def patched(request):
    with PatchSet(engine_patches(PATHS[request.param])): yield request.param


def test_the_same_completions_in_the_same_places(patched, tmp_path):
    "Equal prompts anywhere in the batch, greedy, against TRL's own path."
    trainer = trainer_of(patched, tmp_path, generation_kwargs=dict(do_sample=False))
    prompts = [[3, 4], [5, 6, 7], [3, 4], [9], [5, 6, 7], [9], [9], [3, 4]]
    ours = turn(trainer, prompts)
    trainer.args.engine = "hf"
    assert turn(trainer, prompts) == ours
    assert len(state_of(trainer).rollouts.prompts) == 3


@pytest.mark.parametrize("engine", ["auto", "inplace"])
def test_training(patched, engine, tmp_path, monkeypatch):
    "The weights that a step has changed are those of the next sampling."
    trainer, states = trainer_of(patched, tmp_path, engine=engine), []
    real = InPlace.generate

    def generate(self, *args):
        states.append(self.model.lm_head.weight.detach().clone())
        return real(self, *args)

    monkeypatch.setattr(InPlace, "generate", generate)
    trainer.train()
    assert len(states) == 2 and not torch.equal(*states) and trainer.model.training
    assert not state_of(trainer).engine._interrupted.is_set()


def test_evaluation(patched, tmp_path):
    trainer = trainer_of(patched, tmp_path, per_device_eval_batch_size=4)
    trainer.eval_dataset = trainer.train_dataset
    assert "eval_loss" in trainer.evaluate() and state_of(trainer).rollouts.tokens


def test_unknown_models_are_sampled_by_their_own_layers(patched, tmp_path, capsys):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    said.clear()
    other = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=32,
            num_hidden_layers=1, num_attention_heads=4, eos_token_id=1,
            bos_token_id=None,
        )
    )
    trainer_of(patched, tmp_path, model=other).train()
    assert capsys.readouterr().out.count("from the weights that are trained, by the layers of GPTNeoXForCausalLM itself;") == 1


def test_settings_that_are_not_known_are_left_to_trl(tmp_path, capsys):
    said.clear()
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of("grpo", tmp_path, generation_kwargs=dict(suppress_tokens=[5]))
        assert "suppress_tokens" in why_elsewhere(trainer, None).words
        found, _ = turn(trainer, [[3, 4]] * 8)
    assert not any(5 in c for c in found) and state_of(trainer).rollouts is None


def test_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of(
            "grpo", tmp_path,
            model=get_peft_model(tiny(), LoraConfig(r=4, target_modules="all-linear")),
            generation_kwargs=dict(do_sample=False),
        )
        trainer.train()
        ours = turn(trainer, [[3, 4], [5]] * 4)[0]
        trainer.args.engine = "hf"
        assert turn(trainer, [[3, 4], [5]] * 4)[0] == ours


def test_a_cache_that_is_too_small(tmp_path, monkeypatch, capsys):
    "An error where the engine was asked for by name; else TRL's path, said once."
    from grpo_nb.engines.inplace import engine as inplace
    monkeypatch.setattr(inplace, "free_bytes", lambda device: 2000)
    said.clear()
    with PatchSet(engine_patches(PATHS["grpo"])):
        with pytest.raises(EngineError, match="cache_tokens"): trainer_of("grpo", tmp_path, engine="inplace").train()
        trainer_of("grpo", tmp_path).train()
    assert capsys.readouterr().out.count("TRL's own path: its cache may not hold") == 1


# What the user changed

def only_low(trainer):
    "`generate` that draws tokens below 20 alone, as a user writes it."
    from transformers import LogitsProcessorList
    def low(ids, scores): return scores.index_fill(1, torch.arange(20, scores.shape[1]), -torch.inf)
    return lambda inner: lambda *a, **k: inner(*a, **{**k, "logits_processor": LogitsProcessorList([low])})


def wrap_instance(trainer, patcher): patcher.setattr(trainer.model, "generate", only_low(trainer)(trainer.model.generate))


def wrap_beneath_a_question(trainer, patcher):
    "A wrapper that stands under the one with which a run may leave sampling."
    wrap_instance(trainer, patcher)
    stack = leave_when(trainer, lambda: False)
    stack.__enter__()


def wrap_class(trainer, patcher):
    base, inner = trainer.accelerator.unwrap_model(trainer.model), type(trainer.model).generate
    patcher.setattr(type(base), "generate", lambda self, *a, **k: only_low(trainer)(lambda *a, **k: inner(self, *a, **k))(*a, **k))


def wrap_processors(trainer, patcher):
    from transformers import GenerationMixin, LogitsProcessorList
    def low(ids, scores): return scores.index_fill(1, torch.arange(20, scores.shape[1]), -torch.inf)
    inner = GenerationMixin._get_logits_processor
    patcher.setattr(GenerationMixin, "_get_logits_processor", lambda *a, **k: LogitsProcessorList([*inner(*a, **k), low]))


def wrap_sample(trainer, patcher):
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    def _sample(self, ids, **k): return torch.cat([ids, torch.full((len(ids), 3), 7), torch.ones(len(ids), 1, dtype=torch.long)], 1)
    patcher.setattr(type(base), "_sample", _sample) # transformers asks the class


CHANGED = dict(instance=(wrap_instance, "its own generate"), beneath=(wrap_beneath_a_question, "its own generate"),
               type=(wrap_class, "its own generate"), processors=(wrap_processors, "its own _get_logits_processor"),
               sample=(wrap_sample, "its own _sample"))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("change", CHANGED)
def test_a_generate_of_the_users_own_is_called(change, lora, tmp_path, monkeypatch, capsys):
    "On the model, on its class, on the mixin, under an adapter; by name it is an error that says so."
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"])) if lora else tiny()
    said.clear()
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of("grpo", tmp_path, model=model)
        CHANGED[change][0](trainer, monkeypatch)
        found = [turn(trainer, [[3, 4]] * 8)[0] for _ in range(2)][1]
        assert max(max(ids) for ids in found) < 20 and state_of(trainer).rollouts is None
        words = f"completions are sampled by TRL's own path: Qwen3ForCausalLM has {CHANGED[change][1]} "
        trainer.args.engine = "inplace"
        with pytest.raises(EngineError, match=f"engine='inplace' was chosen.*has {CHANGED[change][1]}"): turn(trainer, [[3, 4]] * 8)
    assert capsys.readouterr().out.count(words) == 1 or (change == "type" and lora)


@pytest.mark.parametrize("setting", [
    dict(num_beams=2, do_sample=False), dict(num_return_sequences=2), dict(guidance_scale=1.5), dict(typical_p=0.5),
    dict(watermarking_config=dict(bias=2.0, seeding_scheme="lefthash")), dict(no_repeat_ngram_size=2), dict(max_time=9.0),
    dict(cache_implementation="quantized"), dict(custom_generate="somebody/something"), dict(prompt_lookup_num_tokens=2),
], ids=lambda s: next(iter(s)))
def test_settings_that_the_engine_has_no_place_for(setting, tmp_path):
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of("grpo", tmp_path, generation_kwargs=setting)
        why = why_elsewhere(trainer, None, [[3]])
    assert next(iter(setting)).partition("_impl")[0].replace("cache", "quantized cache") in why.words


def test_a_trainer_with_its_own_turn(tmp_path, capsys):
    "What stands around the engine runs around it; what stands in its place is left to TRL unless the engine is named."
    import trl
    said.clear()

    class Mine(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids, *a, **k):
            return super()._generate_single_turn([p[:1] for p in prompt_ids], *a, **k)

    class Around(trl.GRPOTrainer):
        def _generate(self, *a, **k):
            self.around = True
            return super()._generate(*a, **k)

    with PatchSet(engine_patches(PATHS["grpo"])):
        for cls, engine, in_place in ((Mine, "auto", False), (Mine, "inplace", True), (Around, "auto", True)):
            trainer = trainer_of("grpo", tmp_path, engine=engine, max_steps=1)
            trainer.__class__ = cls
            trainer.train()
            assert (state_of(trainer).rollouts is not None) == in_place and getattr(trainer, "around", cls is Mine)
            if in_place and cls is Mine: assert all(len(p) == 1 for p in state_of(trainer).rollouts.prompts)
    assert capsys.readouterr().out.count("Mine has its own _generate_single_turn; engine='inplace'") == 1


def test_hooks_on_the_whole_model_are_called(tmp_path):
    "Also one that comes after the engine was made and compared: the model's own layers are called then."
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer, seen = trainer_of("grpo", tmp_path), []
        turn(trainer, [[3, 4]] * 8)
        assert state_of(trainer).turns == 1
        trainer.model.register_forward_hook(lambda *_: seen.append(1))
        turn(trainer, [[3, 4]] * 8)
    assert seen and state_of(trainer).turns == 2


@pytest.mark.parametrize("engine", ["auto", "inplace"])
def test_an_empty_prompt(patched, engine, tmp_path, capsys):
    said.clear()
    trainer = trainer_of(patched, tmp_path, engine=engine)
    if engine == "inplace":
        with pytest.raises(EngineError, match="a prompt is empty"): turn(trainer, [[3], []] * 4)
        return
    found = turn(trainer, [[3], []] * 4)
    assert len(found[0] if patched == "grpo" else found) == 8
    assert capsys.readouterr().out.count("TRL's own path: a prompt is empty") == 1


def test_angles_that_change_with_the_length(tmp_path, capsys):
    "In place up to the limit, by TRL's path beyond it."
    said.clear()
    model = tiny("llama", max_position_embeddings=16)
    model.config.rope_parameters = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of("grpo", tmp_path, model=model)
        turn(trainer, [[3, 4]] * 8)
        assert state_of(trainer).turns == 1
        for n in (12, 13): turn(trainer, [[3] * n] * 8)
    assert state_of(trainer).turns == 1 and capsys.readouterr().out.count("dynamic rotary") == 1


def test_a_wrapper_that_fails_in_any_way(tmp_path, monkeypatch, capsys):
    "While the engine reads the model; a lack of memory is no answer."
    said.clear()
    error = [AttributeError("no such attribute")]
    def decoder(*_): raise error[0]
    monkeypatch.setattr("grpo_nb.engines.inplace.engine.Decoder", decoder)
    with PatchSet(engine_patches(PATHS["grpo"])):
        turn(trainer_of("grpo", tmp_path), [[3, 4]] * 8)
        with pytest.raises(EngineError, match="engine='inplace' was chosen.*AttributeError: no such attribute"):
            turn(trainer_of("grpo", tmp_path, engine="inplace"), [[3, 4]] * 8)
        error[0] = MemoryError("none left")
        with pytest.raises(EngineError, match="no memory left"): turn(trainer_of("grpo", tmp_path), [[3, 4]] * 8)
    assert capsys.readouterr().out.count("it fails with AttributeError: no such attribute") == 1


def test_trained_tokens_with_a_tied_head(tmp_path):
    "PEFT's wrapper of such a head has no number of outputs; the engine samples what the model says."
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(tiny("qwen2"), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4, 5]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "trainable_tokens" in n: p.copy_(torch.randn_like(p))
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trainer_of("grpo", tmp_path, model=model, generation_kwargs=dict(do_sample=False))
        ours = turn(trainer, [[3, 4], [5]] * 4)[0]
        assert state_of(trainer).turns == 1
        trainer.args.engine = "hf"
        assert turn(trainer, [[3, 4], [5]] * 4)[0] == ours


# Where a completion ends

class Spelling:
    "A tokenizer whose words stand beside each other without a space, so that a stop string may be of several."
    def __new__(cls):
        from tokenizers.decoders import Fuse
        tok = tokenizer()
        tok.backend_tokenizer.decoder = Fuse()
        return tok


OWN_ENDS = [dict(eos_token_id=list(range(5, 40))), dict(stop_strings=["w3", "w2"])]


@pytest.mark.parametrize("how", OWN_ENDS, ids=lambda h: next(iter(h)))
def test_an_end_of_the_users_own_is_no_truncation(patched, how, tmp_path):
    "In TRL's metrics and in its mask: a completion that ended is trained on, one that was cut is not."
    seen = []
    def reward(completion_ids, **_):
        seen.extend(completion_ids)
        return [float(i % 3) for i in range(len(completion_ids))]
    trainer = trainer_of(
        patched, tmp_path, reward=reward, max_completion_length=4, generation_kwargs=how, mask_truncated_completions=True,
        max_steps=1, tok=Spelling(),
    )
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    done, log = state_of(trainer).rollouts, trainer.state.log_history[0]
    cut = [why == "length" for why in done.finished]
    assert 0 < sum(cut) < 8 and log["completions/clipped_ratio"] == sum(cut) / 8
    ended = [len(ids) for ids, c in zip(done.completions, cut) if not c]
    assert log["completions/mean_terminated_length"] == pytest.approx(sum(ended) / len(ended))
    assert not torch.equal(before, trainer.model.lm_head.weight)
    assert sorted(map(tuple, seen)) == sorted(map(tuple, done.completions))


def test_an_end_is_a_number_like_any_other():
    import copy
    import json
    import pickle
    end = rollout.Ended(17, (1, 2))
    assert 17 == end == 2 and 1 == end and end != 3 and hash(end) == hash(17) and end + 1 == 18
    assert json.dumps([end]) == "[17]" and torch.tensor([end]).item() == 17
    assert tokenizer().decode([end], skip_special_tokens=True) == "w17"
    for other in (pickle.loads(pickle.dumps(end)), copy.deepcopy(end)):
        assert other in [2] and int(other) == 17 and other not in [3]


def test_the_field_is_checked():
    for good in (
        dict(engine="auto"),
        dict(engine="auto", use_vllm=True),
        dict(engine="vllm", use_vllm=True),
        dict(engine="vllm-server", use_vllm=True, vllm_mode="server"),
    ):
        check_engine(**good)
    for bad, words in (
        (dict(engine="vlm"), "Did you mean 'vllm'"),
        (dict(engine="inplace", use_vllm=True), "contradict"),
        (dict(engine="vllm-server", use_vllm=True), "contradict"),
        (dict(engine="vllm", use_vllm=True, vllm_mode="server"), "contradict"),
    ):
        with pytest.raises(ValueError, match=words): check_engine(**bad)


class Server:
    "In the place of TRL's client: a server that keeps the weights it is sent, and continues greedily."
    made = []

    def __init__(self, base_url=None, **_):
        self.model, self.fingerprints, self.resets = tiny().eval(), [], 0
        Server.made.append((base_url, self))

    def init_communicator(self, device=None): pass
    def get_server_info(self): return {"model_config": {"logprobs_mode": "processed_logprobs"}}
    def reset_prefix_cache(self): self.resets += 1

    @torch.no_grad()
    def update_named_params(self, metadata, named):
        mine, sent = dict(self.model.named_parameters()), {name: weight.detach().clone() for name, weight in named}
        assert set(sent) >= set(mine) - {"lm_head.weight"} and [m[0] for m in metadata] == list(sent)
        for name, weight in sent.items(): mine[name].copy_(weight)
        self.fingerprints.append(sent)

    @torch.no_grad()
    def generate(self, prompts, n, max_tokens, **_):
        whole, logps = [], []
        for prompt in prompts:
            ids, found = list(prompt), []
            for _ in range(max_tokens):
                at = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(at.argmax()))
                found.append([float(at.max())])
            whole += [ids[len(prompt):]] * n
            logps += [found] * n
        return dict(
            prompt_ids=[list(p) for p in prompts], completion_ids=whole,
            logprobs=logps, logprob_token_ids=[[[t] for t in ids] for ids in whole],
        )


@pytest.mark.skipif(Version(version("trl")) < Version("1.16"), reason="the client of an older TRL has other methods")
@pytest.mark.parametrize("lora", [False, True])
def test_a_server_samples(lora, tmp_path, monkeypatch, capsys):
    "engine='vllm-server' is TRL's server mode: completions, weights and losses of stock TRL, sampled with the weights of then."
    from peft import LoraConfig, get_peft_model
    from trl.generation import vllm_generation

    from grpo_nb.trainers.colocate import choice_patch, colocate_patches

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", Server)
    Server.made.clear()
    said.clear()

    def losses(tries, **how):
        torch.manual_seed(0)
        model = tiny()
        if lora: model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        def spread(completions, **_): return [float(i) for i in range(len(completions))] # greedy completions of a group are equal
        trainer = trainer_of(
            "grpo", tmp_path / tries, model=model, reward=spread, max_steps=3,
            shuffle_dataset=False, vllm_server_base_url="http://127.0.0.1:1", **how,
        )
        trainer.train()
        assert trainer.use_vllm and trainer.vllm_generation.mode == "server"
        server = Server.made[-1][1]
        assert len(server.fingerprints) == server.resets == 3
        return (
            [x["loss"] for x in trainer.state.log_history if "loss" in x],
            server.fingerprints,
            trainer.state.log_history[-2]["sampling/sampling_logp_difference/max"],
        )

    stock, theirs, _ = losses("stock", use_vllm=True, vllm_mode="server")
    with PatchSet([*engine_patches(PATHS["grpo"]), *colocate_patches(), choice_patch(PATHS["grpo"])]):
        ours, mine, apart = losses("ours", engine="vllm-server")
    assert "engine='vllm-server' means use_vllm=True and vllm_mode='server'" in capsys.readouterr().out
    assert ours == stock and [a for a, _ in Server.made] == ["http://127.0.0.1:1"] * 2 and apart < 1e-4
    for a, b in zip(mine, theirs): assert all(torch.equal(a[n], b[n]) for n in b)
    assert any(not torch.equal(mine[0][n], mine[2][n]) for n in mine[0])


TOOL_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] or '' }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson }} {% endfor %}"
    "{% endfor %}"
)


def test_tools(tmp_path, monkeypatch):
    "Each completion calls a tool once, and is sampled on with the answer in its prompt."
    import trl.trainer.grpo_trainer as theirs

    if not hasattr(theirs, "parse_response"): pytest.skip("this TRL has its parser elsewhere")
    turns, calls = [], []

    def double(number: int) -> int:
        """Double a number.

        Args:
            number: the number
        """
        calls.append(number)
        return 2 * number

    def parse(tok, ids, **_):
        turns.append(1)
        call = {"type": "function", "function": {"name": "double", "arguments": {"number": 3}}}
        return {"role": "assistant", "content": "w3", **({"tool_calls": [call]} if len(turns) <= 8 else {})}

    real = InPlace.generate
    sizes = []
    monkeypatch.setattr(theirs, "parse_response", parse)
    monkeypatch.setattr(
        InPlace, "generate", lambda self, prompts, n, s: sizes.append((len(prompts), sum(n))) or real(self, prompts, n, s)
    )
    tok = tokenizer()
    tok.chat_template, tok.response_schema = TOOL_TEMPLATE, {"type": "object"}
    with PatchSet(engine_patches(PATHS["grpo"])):
        monkeypatch.setattr(theirs.GRPOTrainer, "_get_tool_suffix_ids", lambda self, messages: [4, 5])
        trainer = trainer_of(
            "grpo", tmp_path, tok=tok, tools=[double],
            prompts=[{"prompt": [{"role": "user", "content": f"w{i} w5"}]} for i in (6, 7)], max_steps=1,
            reward=lambda completions, **_: [float(i) for i in range(len(completions))], max_completion_length=24,
        )
        trainer.train()
    assert calls == [3] * 8 and sizes[0] == (2, 8) and len(sizes) == 2 and sizes[1][1] >= 1


# A model that has learnt to call a tool: twice, each time with what the last answer was

TALK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = {"defaults": {"role": "assistant"}, "start_anchor": "<|im_start|>assistant\n",
          "fields": {"tool_calls": {"open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True, "content": "json",
                                    "transform": {"type": "function", "function": "{content}"}},
                     "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"}}}
NUMBERS = (1, 2)


def call(number):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "double", "arguments": {"number": number}}}],
    }
def told(number): return {"role": "tool", "name": "double", "content": str(number)}
def conversation(n):
    return [
        {"role": "user", "content": str(n)}, call(n), told(2 * n), call(2 * n),
        told(4 * n), {"role": "assistant", "content": str(4 * n)},
    ]


@pytest.fixture(scope="module")
def caller():
    "The model, and a tokenizer whose template renders tools and whose answers are parsed."
    from grpo_nb.tasks.tiny import make_model, make_tokenizer
    tok = make_tokenizer(["1 2"])
    tok.add_tokens(["<tool_call>", "</tool_call>", '{"name": "double", "arguments": {"number": ', '}}'])
    tok.chat_template, tok.response_template = TALK, ANSWER
    model = make_model(tok, hidden_size=64, layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [tok.apply_chat_template(conversation(n), tokenize=True, return_dict=False) for n in NUMBERS]
    ids = torch.tensor([r + [tok.pad_token_id] * (max(map(len, rows)) - len(r)) for r in rows])
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        for _ in range(80):
            model(input_ids=ids, labels=ids.masked_fill(ids == tok.pad_token_id, -100)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model, tok


def doubling(calls): # -> the tool as a function, and an environment that has it
    def double(number: int) -> int:
        """Double a number.

        Args:
            number: the number
        """
        calls.append(number)
        return 2 * number

    class Doubling:
        "An environment with one tool."
        def reset(self, **_): return None
        def double(self, number: int) -> int:
            """Double a number.

            Args:
                number: the number
            """
            return double(number)
    return double, Doubling


def three_turns(engine, how, folder, caller): # -> calls, completions with their ids, how often a tool was called
    import trl
    calls, seen = [], []
    double, environment = doubling(calls)

    def reward(completions, completion_ids, **_):
        seen.extend(zip(completions, completion_ids))
        return [float(i) for i in range(len(completions))]

    args = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=80,
        bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, max_steps=1, save_strategy="no",
        learning_rate=0.0, logging_steps=1, generation_kwargs=dict(do_sample=False),
    )
    args.engine = engine
    extra = dict(tools=[double]) if how == "tools" else dict(environment_factory=environment)
    with PatchSet(engine_patches(PATHS["grpo"])):
        trainer = trl.GRPOTrainer(model=caller[0], reward_funcs=reward, args=args, processing_class=caller[1], **extra,
                                  train_dataset=Dataset.from_list([{"prompt": conversation(n)[:1]} for n in NUMBERS]))
        trainer.train()
        assert (state_of(trainer).rollouts is not None) == (engine == "inplace")
    frequency = [log["tools/call_frequency"] for log in trainer.state.log_history if "tools/call_frequency" in log]
    return sorted(calls), seen, frequency


@pytest.mark.parametrize("how", ["tools", "environment"])
def test_a_tool_calling_loop(tmp_path, caller, how):
    "Three turns: the calls that the model makes, what it is told, and what comes of it, with each engine."
    import trl
    if Version(trl.__version__) < Version("1.16"): pytest.skip("this TRL parses answers in another way")
    found = {engine: three_turns(engine, how, tmp_path, caller) for engine in ("hf", "inplace")}
    assert found["hf"] == found["inplace"]
    calls, seen, frequency = found["inplace"]
    assert calls == [1] * 4 + [2] * 8 + [4] * 4 and frequency == [2.0]
    whole = [conversation(n)[1:] for n in NUMBERS]
    assert [sum(messages == one for messages, _ in seen) for one in whole] == [4, 4]


# No end token

@pytest.mark.parametrize("greedy", [True, False])
def test_without_stop_tokens_every_engine_goes_on_to_the_length(greedy):
    "Whatever ends the model's own generation config names."
    from grpo_nb.engines.hf import HuggingFace
    model = tiny()
    model.generation_config.eos_token_id = list(range(1, VOCAB))
    found = [
        engine.generate([[3, 4], [5]], 2, Sampling(max_tokens=7, greedy=greedy, seed=0))
        for engine in (HuggingFace(model), InPlace(model))
    ]
    assert all(f.finished == ["length"] * 4 and f.tokens == 28 for f in found)
    assert not greedy or found[0].completions == found[1].completions
    stopped = [
        engine.generate([[3, 4], [5]], 2, Sampling(max_tokens=7, greedy=greedy, stop_token_ids=range(VOCAB)))
        for engine in (HuggingFace(model), InPlace(model))
    ]
    assert all(f.finished == ["eos"] * 4 for f in stopped)


# Leaving, and what fails

@pytest.mark.parametrize("engine", ["hf", "inplace"])
def test_a_trainer_that_is_left(patched, tmp_path, engine):
    "Outside a run as well; the same trainer trains afterwards."
    asked = []
    trainer = trainer_of(patched, tmp_path, engine=engine)
    with leave_when(trainer, lambda: asked.append(1) or len(asked) in (5, 6)):
        with pytest.raises(rollout.LeftSampling): trainer.train()
    assert len(asked) == 6 and not trainer.state.global_step and trainer.model.training and "generate" not in vars(trainer.model)
    assert not any(m._forward_pre_hooks for m in trainer.model.modules()) and not objects(trainer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_ctrl_c_is_no_request(patched, tmp_path, monkeypatch):
    "A `KeyboardInterrupt` that nobody asked for stays one."
    monkeypatch.setattr(InPlace, "generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("by hand")))
    trainer = trainer_of(patched, tmp_path)
    with leave_when(trainer, lambda: False), pytest.raises(KeyboardInterrupt, match="by hand") as caught: trainer.train()
    assert type(caught.value) is KeyboardInterrupt


@pytest.mark.parametrize("error, lost", [
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: out of memory"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("shapes differ"), False),
    (ValueError("out of memory"), False),
])
def test_what_counts_as_out_of_memory(error, lost): assert rollout.out_of_memory(error) == lost

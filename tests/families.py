"""Every causal language model that transformers has, small and random: our step beside stock TRL's, and the in-place engine.

`python tests/families.py --jobs 16 --out nbs/explanations/families.json` runs all types, each in a process of its own; `--only
llama,mamba` runs some. A type is built from its own configuration, shrunk: by rules over the names of fields, and by what stands
in EXCEPTIONS. One GRPO micro-batch (8 rows, 2 prompts, ragged, padded on the left, off policy, fp32) gives loss and gradients of
stock TRL and of ours; where one of the two ways in place takes the model, its greedy completions are compared with `generate`'s."""
import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
here = Path(__file__).resolve().parent
sys.path[:0] = [str(here), str(here.parent)]

VOCAB, TOLERANCE, LIMIT = 67, 1e-5, 120

# ---- a small configuration: the first rule whose pattern is a field's whole name

RULES = [
    (r"vocab_size|.*_vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers", 2),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|model_dim|embedding_size|lru_width|emb_dim", 32),
    (r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads|attention_heads", 4),
    (r"num_key_value_heads|n_kv_heads?|num_kv_heads|num_global_key_value_heads|swa_num_key_value_heads|multi_query_group_num", 2),
    (r"head_dim|attention_head_size|(global|swa|v|qk_nope|qk_rope)_head_dim|kv_channels|rotary_dim|dim_head|d_head", 8),
    (r"qk_head_dim", 16),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*lora_rank|.*lora_dim", 16),
    (r"intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|.*_ffn_dim|feed_forward_size|block_ff_dim|dff|dim_ff|d_inner", 48),
    (r".*(moe|expert|shared).*(intermediate|ffn).*(size|dim)", 16),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|num_selected_experts|experts_per_token|topk|moe_k", 2),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|routed_experts|num_routed_experts", 4),
    (r"n_group|topk_group|n_groups|mamba_n_groups|num_expert_groups|n_expert_groups", 1),
    (r"n_shared_experts|num_shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_null_experts", 1),
    (r".*max_position_embeddings|n_positions|max_sequence_length|max_seq_len|n_ctx|seq_length|max_seq_length", 256),
    (r"sliding_window|attention_window_size|window_size|attention_window|sliding_window_size", 7),
    (r"(mamba_|ssm_|linear_)?(d_state|state_size|ssm_state_size)|mamba_d_state", 8),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 16),
    (r"(mamba_)?chunk_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"linear_num_key_heads|linear_num_value_heads|linear_n_heads", 2),
    (r"linear_key_head_dim|linear_value_head_dim|linear_head_dim", 8),
    (r"index_topk", 4), (r"index_n_heads", 2), (r"index_head_dim", 16),
    (r"hidden_size_per_layer_input", 8),
    (r"laurel_rank", 4),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers", 0),
    (r"pad_token_id", 0), (r"eos_token_id", 1), (r"bos_token_id", 2),
    (r".*(dropout|pdrop|drop).*(prob|rate|p)?|.*jitter.*", 0.0),
    (r".*aux_loss_coef", 0.0),
]
# for a field that is there and None
MISSING = dict(head_dim=8, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2)
PATTERNS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "hybrid_override_pattern", "indexer_types",
            "attn_type_list", "hybrid_layer_pattern") # lists with an entry a layer
EXCEPTIONS = dict(
    bamba=dict(attn_layer_indices=[1]),
    dbrx=dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8),
              ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    cohere_compass_text=dict(rope_parameters={n: dict(rope_type="default", rope_theta=1e4)
                                              for n in ("full_attention", "sliding_attention")}),
    granitemoehybrid=dict(num_hidden_layers=2, layer_types=["mamba", "attention"]),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    lfm2_moe=dict(layer_types=["conv", "full_attention"]),
    qwen4_exp=dict(indexer_budget=8, indexer_compress_ratio=4),
    qwen4_exp_text=dict(indexer_budget=8, indexer_compress_ratio=4),
    mamba2=dict(num_heads=4, head_dim=16, n_groups=1),
    reformer=dict(axial_pos_embds=False),
    recurrent_gemma=dict(num_hidden_layers=3, block_types=["recurrent", "recurrent", "attention"]),
    xmod=dict(default_language="en_XX"),
)


def rule_for(name, value):
    "What a field becomes; `...` where it stays."
    if value is None: return MISSING.get(name, ...)
    found = next((new for pattern, new in RULES if re.fullmatch(pattern, name)), ...)
    if found is ... or isinstance(value, bool) or not isinstance(value, int | float): return ...
    return type(value)(found) if isinstance(found, float) or value > found else ...


def shrunk(config) -> dict:
    "What a configuration's own fields become by the rules; its parts are shrunk too."
    fields = {n: v for n, v in vars(config).items() if not n.startswith("_")}
    found = {n: new for n, v in fields.items() if (new := rule_for(n, v)) is not ...}
    found |= {n: new for n, new in dict(pad_token_id=0, eos_token_id=1, bos_token_id=2).items() if n in fields}
    if "kv_lora_rank" in fields: found["num_key_value_heads"] = 4 # latent attention has as many keys as queries
    if fields.get("is_decoder") is False: found["is_decoder"] = True
    parts = {n: fields.get(n) for n in getattr(config, "sub_configs", {})}
    return found | {n: type(c)(**shrunk(c)) for n, c in parts.items() if hasattr(c, "to_dict")}


def by_layer(config, found:dict) -> dict:
    "One layer of each kind that the lists with an entry a layer name, or two."
    lists = {n: v for n in PATTERNS if isinstance(v := vars(config).get(n), list | tuple) and len(v)}
    if not lists: return found
    rows = list(zip(*lists.values()))
    first = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())[:4] # where each kind stands first
    first = first if len(first) > 1 else [0, min(1, len(rows) - 1)]
    count = next((n for n in ("num_hidden_layers", "n_layer", "num_layers") if n in found), "num_hidden_layers")
    return found | {n: [v[i] for i in first] for n, v in lists.items()} | {count: len(first)}


def small_config(kind:str):
    "A small configuration of a type: its text part where it has several."
    from transformers import AutoConfig
    config = AutoConfig.for_model(kind)
    own = EXCEPTIONS.get(kind, {})
    text = config.get_text_config()
    if text is config: return type(config)(**by_layer(config, shrunk(config)) | own)
    names = "text_config", "llm_config", "language_config", *config.sub_configs
    part = next(n for n in names if getattr(config, n, None) is text)
    inner = type(text)(**by_layer(text, shrunk(text)) | own)
    return type(config)(**{**shrunk(config), part: inner})


def small_model(kind:str):
    "A random model with weights large enough that log-probs differ, norms included."
    import torch
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind)).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "A_log" not in name: p.normal_(0, 0.15)
            else: p.add_(0.2 * torch.randn_like(p))
    return model


# ---- one type

def failed(what, error) -> dict:
    "A note in place of an answer."
    where = traceback.extract_tb(error.__traceback__)[-1]
    words = next(iter(str(error).strip().splitlines()), "")[:200]
    return {"note": f"{what}: {type(error).__name__}: {words} ({Path(where.filename).name}:{where.lineno})"}


def off_policy(trainer, inputs, logps_of):
    "Old log-probs near the policy's own."
    import torch
    g = torch.Generator().manual_seed(1)
    ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad(): logps, *_ = logps_of(trainer, trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    inputs["old_per_token_logps"] = logps + 0.3 * torch.randn(logps.shape, generator=g) * inputs["completion_mask"]
    return inputs


def step_row(model, folder) -> dict:
    "Loss and gradients of one micro-batch, stock TRL's and ours."
    import torch
    from parity import grpo_trainer, loss_and_gradients, micro_batch, relative
    from trl import GRPOTrainer

    from grpo_nb.trainers import grpo
    from grpo_nb.trainers.state import state_of
    loss_of, logps_of = GRPOTrainer._compute_loss, GRPOTrainer._get_per_token_logps_and_entropies
    trainer = grpo_trainer(model, folder, loss_type="dapo")
    try:
        inputs = off_policy(trainer, micro_batch(seed=3), logps_of)
        torch.manual_seed(0)
        theirs = loss_and_gradients(trainer, inputs, loss_of)
    except Exception as error: return failed("stock TRL", error) # noqa: BLE001 whatever the model raises
    torch.manual_seed(0)
    again = loss_and_gradients(trainer, inputs, loss_of)
    torch.manual_seed(0)
    ours = loss_and_gradients(trainer, inputs, grpo.compute_loss(loss_of))
    chosen = state_of(trainer).layout[1]
    said = dict(layout=chosen.layout.value, why=str(chosen.why or ""))
    if not torch.isfinite(theirs[0]): return said | dict(note="stock loss is not finite")
    error = max(relative(ours[1], theirs[1]), abs(float(ours[0] - theirs[0])) / max(1.0, abs(float(theirs[0]))))
    said |= dict(error=error, itself=relative(again[1], theirs[1]))
    if TOLERANCE < error < 1e-3: said["near"] = is_near(trainer, inputs, ours, theirs, loss_of)
    return said


def is_near(trainer, inputs, ours, theirs, loss_of) -> bool:
    "Whether what is beyond the tolerance is as near the truth in fp64 as stock TRL's own fp32 is."
    from parity import assert_same, loss_and_gradients
    try: assert_same(ours, theirs, lambda change: loss_and_gradients(trainer, change(inputs), loss_of), trainer.model)
    except AssertionError: return False
    return True


def engine_row(model) -> dict:
    "Which way a model is sampled in place, and whether its greedy completions are `generate`'s."
    from grpo_nb.engines.base import EngineError, Sampling
    from grpo_nb.engines.hf import HuggingFace
    from grpo_nb.engines.inplace.engine import InPlace
    from grpo_nb.engines.inplace.ways import in_place
    try: engine = in_place(model)
    except EngineError as error: return dict(engine="generate", why_engine=str(error).partition(": ")[2][:200])
    how, prompts = Sampling(max_tokens=(12, 5) * 3, greedy=True), [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14, 15]]
    ours, theirs = engine.generate(prompts, 2, how).completions, HuggingFace(model).generate(prompts, 2, how).completions
    way = "in place" if isinstance(engine, InPlace) else "own layers"
    return dict(engine=way, same=ours == theirs)


def row_of(kind:str) -> dict:
    "Everything about one type; what cannot be built or run says why."
    warnings.simplefilter("ignore")
    started, row = time.perf_counter(), dict(type=kind)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), tempfile.TemporaryDirectory() as folder:
        try: model = small_model(kind)
        except Exception as error: return row | failed("not built small", error) # noqa: BLE001 whatever a type raises
        row["parameters"] = sum(p.numel() for p in model.parameters())
        try: row |= engine_row(model)
        except Exception as error: row |= failed("the engine", error) # noqa: BLE001
        try: row |= step_row(model, folder)
        except Exception as error: row |= failed("the step", error) # noqa: BLE001
    return row | dict(seconds=round(time.perf_counter() - started, 1))


# ---- all types

def kinds() -> list:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def send(pipe, kind): pipe.send(row_of(kind))


forking = threading.Lock() # one at a time: a library may hold a file descriptor in another thread


def in_own_process(kind:str, limit:float=LIMIT) -> dict:
    "A type's row; a crash or a hang is one too. The process is a fork: what it needs is imported once, in the parent."
    ctx = multiprocessing.get_context("fork")
    mine, theirs = ctx.Pipe(duplex=False)
    process = ctx.Process(target=send, args=(theirs, kind))
    with forking: process.start()
    theirs.close()
    try:
        if mine.poll(limit): return mine.recv()
        return dict(type=kind, note=f"no answer within {limit:g} s")
    except EOFError:
        process.join(5)
        return dict(type=kind, note=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def all_rows(names, jobs:int=1, limit:float=LIMIT, heard=None) -> list:
    "Rows of many types, in the order of their names; several run at a time."
    import parity  # noqa: F401 what every child needs, before it is forked
    import torch
    import trl  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401

    from grpo_nb.engines.inplace import ways  # noqa: F401
    from grpo_nb.trainers import grpo  # noqa: F401
    torch.set_num_threads(1)
    def one(name):
        row = in_own_process(name, limit)
        if heard: heard(row)
        return row
    with ThreadPoolExecutor(jobs) as pool: return list(pool.map(one, names))


def is_wrong(row) -> bool:
    "Whether a row shows a fault: another gradient than stock TRL's, or other tokens than `generate`'s."
    error = row.get("error", 0.0)
    return not (error <= max(TOLERANCE, 3 * row.get("itself", 0)) or row.get("near")) or row.get("same") is False


def table(found:dict) -> str:
    "The rows as a table in Markdown."
    lines = ["| type | layout | worst error | sampled | remark |", "|---|---|---|---|---|"]
    for r in found["rows"]:
        error = f"{r['error']:.1e}" if "error" in r else ""
        remark = r.get("note") or r.get("why") or ""
        if r.get("near"): remark = f"as near fp64 as stock TRL. {remark}"
        if r.get("itself"): remark = f"draws at random: {r['itself']:.1e} from itself. {remark}"
        equal = {True: ", equal", False: ", **not equal**"}.get(r.get("same"), "")
        sampled = f"{r.get('engine', '')}{equal}"
        lines.append(f"| {r['type']} | {r.get('layout', '')} | {error} | {sampled} | {remark.replace('|', '/')} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--only", default="", help="names of types, with commas")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a type may take")
    parser.add_argument("--out", help="a file: .json for the rows, .md for the table")
    args = parser.parse_args()
    names = [n for n in kinds() if not args.only or n in args.only.split(",")]
    started = time.perf_counter()
    rows = all_rows(names, args.jobs, args.limit, lambda row: print(json.dumps(row), flush=True))
    from importlib.metadata import version
    versions = {n: version(n) for n in ("torch", "transformers", "trl")}
    found = dict(versions=versions, seconds=round(time.perf_counter() - started), rows=rows)
    if args.out: Path(args.out).write_text(table(found) + "\n" if args.out.endswith(".md") else json.dumps(found, indent=1) + "\n")
    wrong = [row["type"] for row in rows if is_wrong(row)]
    print(f"{len(rows)} types, {sum('error' in r for r in rows)} compared, {len(wrong)} wrong: {', '.join(wrong) or 'none'}; "
          f"{found['seconds']} s")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())

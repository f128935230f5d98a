"""A judge as a reward, against a stand-in server that is well, slow, broken, hostile or gone."""
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from grpo_nb import PatchFastRL
from grpo_nb.recipe.value import recipe_of
from grpo_nb.recipe.code import to_code
from grpo_nb.run.run import GRPORun
from grpo_nb.tasks.evaluate import call_reward
from grpo_nb.tasks.guard import RewardError
from grpo_nb.tasks.judge import judge, score_in
from grpo_nb.tasks.library import get
from grpo_nb.tasks.tiny import tiny_model

TASK = get("sort_digits", n_train=32, n_test=8)
KEY = "sk-a-very-secret-key"


def said(text):
    return dict(id="1", object="chat.completion", created=0, model="m", system_fingerprint="",
                usage=dict(prompt_tokens=90, completion_tokens=10,
                total_tokens=100), choices=[dict(index=0, finish_reason="stop", message=dict(role="assistant", content=text))])


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.now, self.most, self.lock = None, [], 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self): return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def reply(self, text, status=200, kind="application/json", **headers):
        body = text.encode()
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)),
                            **headers}.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        with server.lock:
            server.requests.append((sent, dict(self.headers)))
            server.now, n = server.now + 1, len(server.requests)
            server.most = max(server.most, server.now)
        try: (server.behave or well)(self, sent, n)
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with server.lock: server.now -= 1


def well(handler, sent, n): handler.reply(json.dumps(said(f"Fine.\nScore: {score_of(sent)}")))
def score_of(sent): return len(sent["messages"][1]["content"].partition("<answer>\n")[2].partition("\n</answer>")[0]) % 11


@pytest.fixture
def server():
    made = Server()
    yield made
    made.shutdown()
    made.server_close()


def asked(server, texts=("a", "bb", "ccc"), log=None, **more):
    given = dict(api_key=KEY, cache=False, pause=0.01, timeout=5, retries=2)
    reward = judge("Be short.", "stand-in", server.url, **{**given, **more})
    columns = {name: ["x"] * len(texts) for name in ("answer",)}
    return call_reward(reward, dict(prompts=["q"] * len(texts), completions=list(texts), log_metric=log, **columns))


def test_scores_are_shares_and_the_key_is_sent_and_nowhere_said(server, capsys):
    assert asked(server) == [0.1, 0.2, 0.3]
    sent, headers = server.requests[0]
    headers = {name.lower(): value for name, value in headers.items()}
    assert headers["authorization"] == f"Bearer {KEY}" and sent["model"] == "stand-in"
    assert sent["messages"][0]["content"].startswith("You are a strict judge. Be short.") and KEY not in json.dumps(sent)
    reward = judge("Be short.", "m", "http://user:pass@host:1/v1?key=s", api_key=lambda: KEY, cache=False)
    for text in repr(reward), repr(reward.judge), reward.written: assert not [w for w in (KEY, "pass", "key=s") if w in text]
    assert KEY not in capsys.readouterr().out


def test_without_a_key_the_hubs_token_is_not_sent(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_somebodys")
    asked(server, api_key=None)
    assert "hf_somebodys" not in json.dumps([headers for _, headers in server.requests])


def test_calls_overlap_and_no_more_than_at_once(server):
    def slow(handler, sent, n):
        time.sleep(0.2)
        well(handler, sent, n)
    server.behave = slow
    began = time.monotonic()
    assert len(asked(server, [f"answer {i}" for i in range(12)], at_once=4)) == 12
    assert server.most == 4 and time.monotonic() - began < 12 * 0.2


def test_equal_completions_are_asked_once_and_nothing_twice(server, tmp_path):
    file, logged = tmp_path / "scores.sqlite", []
    def log(name, value): logged.append((name, value))
    texts = ["a", "a", "zz"]
    first = asked(server, texts, log, cache=file, price=(1.0, 2.0))
    assert first == [0.1, 0.1, 0.2] and len(server.requests) == 2
    found = dict(logged)
    assert found["judge/asked"] == 2 and found["judge/tokens"] == 200 and found["judge/cost"] == pytest.approx((180 + 40) / 1e6)
    assert found["judge/seconds"] > 0 and found["judge/cached"] == 0
    logged.clear()
    assert asked(server, texts, log, cache=file) == first and len(server.requests) == 2 and dict(logged)["judge/cached"] == 1
    asked(server, texts, cache=file, scale=(0, 20)) # another question
    assert len(server.requests) == 4
    assert b"zz" not in file.read_bytes() and KEY.encode() not in file.read_bytes()
    file.write_bytes(b"no database")
    assert asked(server, texts, cache=file) == first


def html(handler, sent, n): handler.reply("<!DOCTYPE html><title>Bad gateway</title>", kind="text/html")
def close(handler, sent, n): handler.connection.close()
def drip(handler, sent, n):
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)
def hang(handler, sent, n): time.sleep(1.5)
def status(code, text="no"): return lambda handler, sent, n: handler.reply(text, code)
def words(text): return lambda handler, sent, n: handler.reply(json.dumps(said(text)))
def shape(value): return lambda handler, sent, n: handler.reply(json.dumps(value))


BAD = [(html, "no JSON", 3), (close, "could not be reached", 3), (hang, "did not answer within 0.3 s", 3),
       (drip, "did not answer within 0.3 s", 3),
       (status(500), "error 500", 3), (status(429), "error 429", 3),
       (status(401, f"wrong key {KEY}"), "error 401: 'wrong key ***'", 1),
       (status(404), "error 404", 1), (status(400), "error 400", 1), (words("Very good!"), "without a score", 3),
       (words(""), "without a score", 3),
       (words(None), "without a score", 3), (words("Score: 11"), "score 11, and the scale goes from 0 to 10", 3),
       (words("Score: -1"), "score -1", 3),
       (words("<html>oops</html>"), "web page", 3), (shape([]), "another form", 3), (shape({}), "another form", 3),
       (shape({"choices": []}), "another form", 3), (shape(7), "another form", 3)]


@pytest.mark.parametrize("behave, told, tries", BAD, ids=[f"{i} {b[1]}" for i, b in enumerate(BAD)])
def test_what_goes_wrong_is_one_sentence(behave, told, tries, server):
    server.behave = behave
    late = behave in (hang, drip)
    with pytest.raises(RewardError) as error: asked(server, ["a"], timeout=0.3 if late else 5)
    text, sentence = str(error.value), error.value.reason
    assert told in text and "stand-in" in text and "\n" not in sentence and KEY not in text and sentence.endswith("."), text
    assert len(server.requests) == tries or late and len(server.requests) <= tries # a busy machine may be late itself


def test_what_goes_wrong_once_is_tried_again(server):
    server.behave = lambda handler, sent, n: (html, close, status(503), well)[min(n - 1, 3)](handler, sent, n)
    logged = []
    assert asked(server, ["a"], lambda *pair: logged.append(pair), retries=3) == [0.1] and dict(logged)["judge/retries"] == 3


def test_a_server_says_when_to_come_back(server):
    def busy(handler, sent, n):
        if n == 1: return handler.reply("wait", 429, retry_after="1")
        well(handler, sent, n)
    server.behave, began = busy, time.monotonic()
    assert asked(server, ["a"]) == [0.1] and time.monotonic() - began >= 1


def test_some_may_fail(server):
    server.behave = lambda handler, sent, n: (html if "bad" in sent["messages"][1]["content"] else well)(handler, sent, n)
    assert asked(server, ["a", "bad", "ccc"], may_fail=0.4) == [0.1, None, 0.3]
    with pytest.raises(RewardError, match="sample 1.*no JSON"): asked(server, ["a", "bad", "ccc"], may_fail=0.3)


def test_a_dead_server_is_not_asked_by_every_completion(server):
    server.behave = status(500)
    with pytest.raises(RewardError, match="completions have no score"): asked(server, [f"{i}" for i in range(40)], at_once=2)
    assert len(server.requests) <= 8


def test_a_score_is_the_last_one_and_no_range():
    assert score_in("On a scale, Score: 0 to 10.\nScore: 4", 0, 10) == 4 and score_in("SCORE = 3.5", 0, 10) == 3.5
    assert score_in("final score:\n\n9", 0, 10) == 9 and score_in("-2", -5, 5) == -2


@pytest.mark.parametrize("more, words", [
    (dict(rubric=""), "rubric=''"), (dict(model=3), "model=3"), (dict(base_url="api.openai.com"), "base_url"),
    (dict(base_url=None), "base_url"),
    (dict(scale=(10, 0)), "scale=(10, 0)"), (dict(scale=5), "scale"), (dict(at_once=0), "at_once=0"),
    (dict(timeout=0), "timeout=0"), (dict(retries=-1), "retries=-1"),
    (dict(may_fail=2), "may_fail=2"), (dict(price=3), "price=3"), (dict(name="a judge"), "name='a judge'"),
    (dict(api_key=5), "api_key"), (dict(temprature=1), "temprature")],
    ids=str)
def test_wrong_arguments_are_one_sentence(more, words):
    with pytest.raises((ValueError, TypeError)) as error: judge(**{**dict(rubric="Short.", model="m",
                                                                          base_url="http://localhost/v1", cache=False), **more})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["", "two\nlines", 5])
def test_a_key_that_cannot_be_sent(given, server):
    with pytest.raises(ValueError) as error: asked(server, api_key=lambda: given)
    assert "api_key()" in str(error.value) and str(given or "?x") not in str(error.value)


# ---- in a run

@pytest.fixture(scope="module", autouse=True)
def patched(): PatchFastRL("grpo")


def run_of(folder, reward, **config):
    model, tokenizer = tiny_model(TASK, steps=0, hidden_size=64, layers=1)
    given = dict(output_dir=str(folder), max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=4,
                 save_steps=50,
                 gradient_checkpointing=False, learning_rate=1e-2, self_check=False, lr_scheduler_type="constant", use_cpu=True)
    return GRPORun(model, tokenizer, reward, TASK.train, {**given, **config})


def test_a_run_is_judged_and_what_it_took_is_logged(server, tmp_path):
    reward = judge("Be short.", "stand-in", server.url, api_key=KEY, cache=tmp_path / "c.sqlite", price=(1, 1))
    run = run_of(tmp_path / "run", reward, max_steps=2).start()
    metrics = run.logs[-1]["metrics"]
    assert {"judge/asked", "judge/cached", "judge/tokens", "judge/retries", "judge/seconds", "judge/cost"} <= set(metrics)
    everything = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert KEY.encode() not in everything
    written = "".join(p.read_text() for p in run.record.folder.glob("*.*") if p.suffix in (".yaml", ".py"))
    assert "judge = make_judge(" in written and "stand-in" in written
    code = to_code(recipe_of("a/model", [reward], {}, definitions=reward.written))
    compile(code, "recipe", "exec")
    assert KEY not in code and "judge" in code


def test_a_judge_that_dies_costs_no_step(server, tmp_path):
    "The failure is the guard's sentence; a checkpoint of the step before is left; what goes on equals what was never stopped."
    def reward(): return judge("Be short.", "stand-in", server.url, cache=tmp_path / "c.sqlite", retries=0, pause=0)
    whole = run_of(tmp_path / "whole", reward()).start()
    calls = []
    def dies(handler, sent, n):
        calls.append(n)
        (status(500) if alive[0] <= 0 else well)(handler, sent, n)
    alive, server.behave = [1], dies
    run = run_of(tmp_path / "run", judge("Be short.", "stand-in", server.url, cache=False, retries=0))
    def after(event):
        if event.step == 2: alive[0] = 0
    end = run.events.subscribe(after)
    with pytest.raises(RewardError) as error: run.start()
    assert "reward 'judge'" in str(error.value) and "error 500" in str(error.value)
    assert run.state == "failed" and run.checkpoint.endswith("checkpoint-2")
    end()
    alive[0] = 1
    run.start(resume=True)
    assert run.state == "finished" and run.step == 3
    pairs = zip(run.trainer.model.parameters(), whole.trainer.model.parameters())
    for a, b in pairs: torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_stop_leaves_a_judge_that_hangs(server, tmp_path):
    server.behave = lambda handler, sent, n: time.sleep(20)
    run = run_of(tmp_path, judge("Be short.", "stand-in", server.url, cache=False, timeout=60))
    run.start(background=True)
    end = time.monotonic() + 120
    while not server.requests and time.monotonic() < end: time.sleep(0.02)
    began = time.monotonic()
    run.stop(now=True).wait(60)
    assert run.state == "stopped" and time.monotonic() - began < 15

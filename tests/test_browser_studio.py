"""The studio in JupyterLab and Notebook 7: choose, examine, start, pause, change, resume, reload, read, probe, stop, go on."""
import re
from pathlib import Path

import pytest
from browser import JupyterLab, available, fronts

pytestmark = [
    pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(available()), reason=available() or "a browser is there"),
]

SETUP = '''from pathlib import Path
from grpo_nb import FastLanguageModel, PatchFastRL, studio, tasks
task, folder = tasks.get("sort_digits", n_train=256, n_test=32), Path("files")
tasks.tiny_model(task, steps=120, hidden_size=64, layers=2, path=folder / "tiny", measure=False)
model, tokenizer = FastLanguageModel.from_pretrained(str(folder / "tiny"), max_seq_length=64, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
PatchFastRL("grpo", FastLanguageModel)

def short(completions, **kwargs):
    "1 for an answer of at most four characters."
    return [float(len(c[0]["content"]) <= 4) for c in completions]'''
STUDIO = '''settings = dict(output_dir=str(folder / "run"), max_steps=2000, learning_rate=1e-3, per_device_train_batch_size=32,
    num_generations=8, max_completion_length=8, beta=0.02, gradient_checkpointing=False, save_strategy="no")
s = studio(model, tokenizer, task.train, {task.reward: 1.0, short: 0.2}, settings)
s'''
POINTS = "() => (document.querySelector('.grpo-nb-plot')?.data ?? []).at(-1)?.x.length ?? 0"


class Page:
    "What a user does."
    def __init__(self, page, shots): self.page, self.shots = page, shots
    def go(self, name):
        self.page.locator(".gnb-nav button", has_text=name).first.click()
        self.page.wait_for_timeout(700)
    def press(self, name): self.page.locator(".gnb-studio button:visible", has_text=re.compile(f"^{name}$")).first.click()
    def type(self, label, value):
        box = self.page.locator(
            ".gnb-studio .widget-text:visible", has=self.page.locator("label", has_text=re.compile(f"^{label}$"))
        ).locator("input")
        box.fill(value)
        box.press("Tab")
    def state(self): return self.page.inner_text(".gnb-status .gnb-state")
    def wait_state(self, name):
        self.page.wait_for_function(
            "n => document.querySelector('.gnb-status .gnb-state')?.textContent === n", arg=name, timeout=240_000
        )
    def step(self): return int(re.search(r"step ([\d,]+)", self.page.inner_text(".gnb-status"))[1].replace(",", ""))
    def wait_step(self, n):
        self.page.wait_for_function(
            "n => +(/step ([\\d,]+)/.exec(document.querySelector('.gnb-status')?.textContent)?.[1] ?? '0').replace(',', '') >= n",
            arg=n,
            timeout=120_000,
        )
    def shot(self, name):
        self.page.evaluate("document.querySelector('.gnb-studio').scrollIntoView({block: 'start'})")
        self.page.wait_for_timeout(400)
        self.page.screenshot(path=self.shots / f"studio_{name}.png")
    def fits(self):
        return self.page.evaluate(
            "(() => { const e = document.querySelector('.gnb-studio'); return e.scrollWidth <= e.clientWidth + 1 })()"
        )


def choose_a_reward(page, u):
    "A reward that has options shows them."
    page.locator(".gnb-reward", has_text="repetition_penalty").locator("input[type=checkbox]").click()
    page.wait_for_selector(".gnb-options:visible", timeout=120_000)
    u.shot("rewards")


def set_what_is_advised(page, u):
    "Advice beside a setting is taken with a button, what is no number is refused, and all of it is text in the end."
    u.go("Settings")
    page.wait_for_selector(".gnb-stack", timeout=120_000)
    page.locator(".gnb-bar-row button", has_text="Sampling").first.click()
    u.type("num_generations", "6")
    page.wait_for_selector(".gnb-advice button:visible", timeout=120_000)
    u.shot("settings")
    page.locator(".gnb-advice button:visible").first.click()
    u.type("num_generations", "8")
    u.type("temperature", "hot")
    page.wait_for_selector("text=temperature: 'hot' is not a number.", timeout=120_000)
    u.type("temperature", "1")
    page.locator(".gnb-bar-row button", has_text="Optimisation").first.click()
    u.type("per_device_train_batch_size", "32")
    page.locator(".gnb-bar-row button", has_text="As text").first.click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.gnb-studio textarea')].some(t => t.value.includes('def short('))", timeout=120_000
    )
    u.shot("code")


def examine(page, u):
    "The doctor finds nothing wrong."
    u.go("Doctor")
    u.press("Examine")
    page.wait_for_selector(".gnb-advice.gnb-good:visible", timeout=150_000)
    u.shot("doctor")


def train_pause_and_change(page, u):
    "A run is started, paused, changed and resumed, and the next one's settings are checked while it trains."
    u.go("Run")
    u.press("Start")
    u.wait_state("running")
    u.wait_step(12)
    page.wait_for_function(POINTS + " > 8", timeout=240_000)
    first = page.evaluate(POINTS)
    page.wait_for_function(POINTS + f" > {first}", timeout=240_000)
    u.shot("running")
    u.press("Pause")
    u.wait_state("paused")
    at = u.step()
    u.type("learning_rate", "5e-4")
    page.wait_for_selector("text=learning_rate 0.001 → 0.0005", timeout=120_000)
    u.type("temperature", "0")
    page.wait_for_selector("text=/temperature=0.* must be a finite number above 0/", timeout=120_000)
    assert u.step() == at
    u.shot("paused")
    u.press("Resume")
    u.wait_step(at + 5)
    u.go("Settings") # the next run's settings are checked while this one trains
    page.locator(".gnb-bar-row button", has_text="Optimisation").first.click()
    u.type("max_steps", "2100")
    page.wait_for_timeout(1500)
    at = u.step()
    u.wait_step(at + 3)
    u.go("Run")


def reload_the_page(page, u):
    "The page that comes again is the run's, and goes on."
    page.reload()
    page.wait_for_selector(".gnb-studio .gnb-state", timeout=240_000)
    page.wait_for_function(POINTS + " > 8", timeout=240_000)
    assert page.locator(".gnb-studio").count() == 1 and u.state() == "running"
    at = u.step()
    u.wait_step(at + 3)


def read_and_probe(page, u):
    "Completions and the lab, while it trains."
    u.go("Completions")
    page.wait_for_selector(".gnb-card:visible", timeout=120_000)
    u.shot("completions")
    u.go("Lab")
    u.press("Probe")
    page.wait_for_selector("text=/that are fine/", timeout=240_000)
    u.shot("lab")


def save_stop_and_go_on(page, u):
    "A checkpoint, an end, and a run that goes on from it."
    u.go("Run")
    at = u.step()
    u.press("Save")
    page.wait_for_selector("text=/checkpoint in files.run.checkpoint-/", timeout=240_000)
    u.press("Stop")
    u.wait_state("stopped")
    assert u.step() >= at
    u.shot("stopped")
    at = u.step()
    u.press("Go on")
    u.wait_step(at + 2)
    u.press("Stop")
    u.wait_state("stopped")


@pytest.mark.parametrize("front", fronts())
def test_a_session_in_the_studio(tmp_path, request, front):
    shots = Path(request.config.getoption("--shots") or tmp_path)
    with front(tmp_path) as lab, lab.browser(width=1280, height=1000) as page:
        errors, u = lab.errors(page), Page(page, shots)
        lab.write("studio.ipynb", [SETUP, STUDIO])
        lab.open(page, "studio.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".gnb-studio", timeout=300_000)
        page.wait_for_timeout(1500)
        assert u.state() == "no run yet" and not page.locator(".gnb-copy").first.is_visible()
        choose_a_reward(page, u)
        set_what_is_advised(page, u)
        examine(page, u)
        train_pause_and_change(page, u)
        lab.save(page)
        reload_the_page(page, u)
        read_and_probe(page, u)
        save_stop_and_go_on(page, u)
        assert errors == []


@pytest.mark.parametrize("dark, width", [(True, 1280), (False, 640), (True, 640)])
def test_themes_and_widths(tmp_path, request, dark, width):
    shots = Path(request.config.getoption("--shots") or tmp_path)
    tag = f"{'dark' if dark else 'light'}_{width}"
    with JupyterLab(tmp_path, dark=dark) as lab, lab.browser(width=width, height=1000) as page:
        u = Page(page, shots)
        lab.write("studio.ipynb", [SETUP.replace("steps=120", "steps=10"), STUDIO])
        lab.open(page, "studio.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".gnb-studio", timeout=300_000)
        page.wait_for_timeout(1500)
        for name in ("Rewards", "Settings", "Doctor"):
            u.go(name)
            if name == "Settings":
                page.locator(".gnb-bar-row button", has_text="Loss").first.click()
                page.locator(".gnb-row select").first.select_option(label="dr_grpo")
                page.wait_for_selector(".gnb-advice:visible", timeout=120_000)
            if name == "Doctor":
                u.press("Examine")
                page.wait_for_selector(".gnb-advice.gnb-good:visible", timeout=150_000)
            assert u.fits(), name
            u.shot(f"{name.lower()}_{tag}")
        u.go("Run")
        u.press("Start")
        u.wait_step(15)
        u.press("Pause")
        u.wait_state("paused")
        assert u.fits()
        u.shot(f"run_{tag}")
        u.go("Completions")
        page.wait_for_selector(".gnb-card:visible", timeout=120_000)
        assert u.fits()
        u.shot(f"completions_{tag}")
        u.go("Lab")
        u.press("Probe")
        page.wait_for_selector("text=/that are fine/", timeout=240_000)
        assert u.fits()
        u.shot(f"lab_{tag}")

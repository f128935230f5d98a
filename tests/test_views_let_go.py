"""What is shown of a run does not keep it, nor its model and optimizer, in memory."""
import gc
import weakref

import pytest
import torch

from grpo_nb import GRPORun, tasks
from grpo_nb.advice.live import watch
from grpo_nb.tasks.tiny import tiny_model
from grpo_nb.ui.charts.charts import LiveCharts
from grpo_nb.ui.completions.completions import CompletionBrowser
from grpo_nb.ui.lab.lab import RewardLab
from grpo_nb.ui.studio.studio import PAGES, studio

torch.set_num_threads(1)
CONFIG = dict(max_completion_length=2, per_device_train_batch_size=4, num_generations=4, max_steps=1, save_strategy="no")


def shown_in_a_studio(model, tokenizer, task, config, view):
    made = studio(model, tokenizer, task.train, task.reward, config)
    for page in PAGES: made.open(page)
    made.start(background=False)
    with pytest.raises(RuntimeError, match="closed"): made.close() or made.start()
    return made.completions, made.text()


def shown_beside(model, tokenizer, task, config, view):
    run = GRPORun(model, tokenizer, task.reward, task.train, config)
    made = {"browser": lambda: CompletionBrowser(run), "charts": lambda: LiveCharts().attach(run),
            "lab": lambda: RewardLab(task.reward, task.train, source=run)}[view]()
    made.widget
    watch(run)
    run.start(background=False)
    return made, made.text()


@pytest.mark.parametrize("view", ["browser", "charts", "lab", "studio"])
def test_a_run_that_is_dropped_is_gone(tmp_path, view):
    task = tasks.get("sort_digits", n_train=8, n_test=2)
    dropped, kept = [], []
    for _ in range(2):
        model, tokenizer = tiny_model(task, steps=1, measure=False, hidden_size=64, layers=1)
        dropped.append(weakref.ref(model))
        show = shown_in_a_studio if view == "studio" else shown_beside
        kept.append(show(model, tokenizer, task, {**CONFIG, "output_dir": str(tmp_path)}, view))
        del model
    gc.collect()
    assert [ref() is not None for ref in dropped] == [False, False]
    assert all(view_.text() for view_, _ in kept) # the views themselves go on

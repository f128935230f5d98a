"""How much the live charts send and how far they lag, in a real JupyterLab with Chromium.

    PYTHONPATH=tests python benchmarks/charts.py [--charts 6] [--rate 10] [--seconds 12] [--lengths 100,1000,10000]

Appends rows at a fixed rate to charts that already hold so many, and prints a table: bytes of an update on the wire (the whole
websocket frame), updates a second, and the lag, which is the time from `append` in the kernel to the animation frame in which all
charts of the page hold that row. Kernel and page are on one machine and share its clock.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from browser import JupyterLab, available

SHOW = """import contextvars, json, math, random, threading, time
from grpo_nb.ui.charts.chart import CHARTS
from grpo_nb.ui.charts.charts import LiveCharts
rng = random.Random(0)
def metrics(c): return [*c.main[:1], c.band, *(l[0] for l in c.lines if "*" not in l[0]), *c.share[:1]]
names = [n for c in list(CHARTS.values())[:{charts}] for n in metrics(c) if n] + ["rewards/a/mean", "rewards/b/mean"]
def row(): return {{n: rng.random() for n in names}}
charts = LiveCharts(list(CHARTS)[:{charts}]).show()
for step in range(1, {length} + 1): charts.append(step, row())"""
RUN = """at = {{}}
def work():
    start = time.perf_counter()
    for i in range(1, int({rate} * {seconds}) + 1):
        time.sleep(max(0, start + i / {rate} - time.perf_counter()))
        charts.append({length} + i, row()); at[{length} + i] = time.time() * 1000
    json.dump(at, open("times.json", "w")); charts.flush()
thread = threading.Thread(target=contextvars.copy_context().run, args=(work,)); thread.start()"""
WATCH = """() => { // notes for every step the first frame in which all charts hold it
  window.seen = []; let last = -1;
  const look = () => {
    const plots = [...document.querySelectorAll('.grpo-nb-plot')].filter(p => !p.hidden && p.data?.length);
    const step = Math.min(...plots.map(p => p.data.at(-1).x.at(-1)));
    if (Number.isFinite(step) && step > last) { window.seen.push([step, Date.now()]); last = step; }
    requestAnimationFrame(look);
  };
  look(); }"""


def measure(charts, rate, seconds, length):
    "One row of the table."
    sizes = []
    def heard(frame):
        text = frame if isinstance(frame, bytes) else frame.encode()
        if b'"comm_msg"' in text and (b'"kind": "add"' in text or b'"kind":"add"' in text): sizes.append(len(text))
    with tempfile.TemporaryDirectory() as folder, JupyterLab(folder) as lab, lab.browser(width=1280, height=1000) as page:
        page.on("websocket", lambda ws: ws.on("framereceived", heard))
        given = dict(charts=charts, rate=rate, seconds=seconds, length=length)
        lab.write("bench.ipynb", [SHOW.format(**given), RUN.format(**given)])
        lab.open(page, "bench.ipynb")
        page.keyboard.press("Escape")
        page.locator(".jp-Cell").first.click()
        lab.menu(page, "Run", "Run Selected Cell")
        page.wait_for_selector(".grpo-nb .main-svg", timeout=60_000)
        page.wait_for_timeout(3000)
        page.evaluate(WATCH)
        sizes.clear()
        page.locator(".jp-CodeCell").nth(1).locator(".jp-InputArea-editor").click()
        lab.menu(page, "Run", "Run Selected Cell")
        page.wait_for_timeout((seconds + 3) * 1000)
        seen, times = page.evaluate("window.seen"), Path(folder, "times.json")
        at = {int(k): v for k, v in json.loads(times.read_text()).items()}
    drawn, lags = iter(sorted(seen)), []
    step, when = next(drawn)
    for s in sorted(at):
        while step < s:
            step, when = next(drawn)
        lags.append((when - at[s]) / 1000)
    lags = lags[len(lags) // 10:] # the first second is the start
    lags.sort()
    return dict(
        rows=length, charts=charts, rate=rate, updates_per_s=round(len(sizes) / seconds, 1),
        bytes_mean=round(statistics.mean(sizes)), bytes_max=max(sizes), lag_median_s=round(statistics.median(lags), 3),
        lag_p95_s=round(lags[int(0.95 * len(lags))], 3), lag_max_s=round(lags[-1], 3),
        frames_per_s=round(len(seen) / seconds, 1),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, kind, default in (("charts", int, 6), ("rate", float, 10), ("seconds", int, 12), ("lengths", str, "100,1000,10000")):
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args()
    if available(): sys.exit(f"charts.py: {available()}")
    found = []
    for n in map(int, given.lengths.split(",")):
        found.append(measure(given.charts, given.rate, given.seconds, n))
        print(json.dumps(found[-1]), flush=True)
    print("| " + " | ".join(found[0]) + " |\n|" + "---|" * len(found[0]))
    for one in found: print("| " + " | ".join(map(str, one.values())) + " |")

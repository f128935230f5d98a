// All charts of one run or several in one widget. The kernel sends rows of a run (step, minutes, tokens, and a float32 per column) with
// the offset at which they belong; rows that do not fit are answered by a request for everything. Left out on purpose: arithmetic
// on metrics. What is drawn is what was logged, and a smoothing line.
const LIMIT = 2000, CHANGE = "#b07d00", SAME = 1e-5;
const SHARED = Symbol.for("grpo_nb.plotly");
const WORDS = { steps: "step", tokens: "tokens", minutes: "minutes" };

// ---- plotly, unpacked once per page ------------------------------------------------------------------------------------
function bytesOf(view) { return new Uint8Array(view.buffer, view.byteOffset, view.byteLength); }

async function unpackPlotly(packed) {
  const stream = new Blob([bytesOf(packed)]).stream().pipeThrough(new DecompressionStream("gzip"));
  const source = await new Response(stream).text();
  const before = Object.getOwnPropertyDescriptor(globalThis, "Plotly");
  const wrapped = `const module = {exports: {}}, exports = module.exports;\n${source}\nexport default module.exports;`;
  const url = URL.createObjectURL(new Blob([wrapped], { type: "text/javascript" }));
  try { return (await import(/* webpackIgnore: true */ url)).default; }
  finally {
    URL.revokeObjectURL(url);
    if (before) Object.defineProperty(globalThis, "Plotly", before); else delete globalThis.Plotly; // leave the page as it was
  }
}

function plotly(model) {
  globalThis[SHARED] ??= unpackPlotly(model.get("_plotly")).catch(error => { globalThis[SHARED] = undefined; throw error; });
  return globalThis[SHARED];
}

// ---- the rows ----------------------------------------------------------------------------------------------------------
// A step towards the new value: equal values stay equal to the last bit, which w * s + (1 - w) * v does not give.
function smoothed(state, v, weight) { // state: [mean, weight ** count]
  if (!Number.isFinite(v)) return NaN;
  state[1] *= weight;
  state[0] = state[1] === weight ? v : state[0] + (v - state[0]) * (1 - weight) / (1 - state[1]);
  return weight ? state[0] : v;
}

class Run {
  constructor(spec, columns) {
    this.name = spec.name; this.colour = spec.colour; this.dash = spec.dash; this.marks = [...spec.marks]; this.at = 0;
    this.steps = []; this.minutes = []; this.tokens = [];
    this.y = columns.map(() => []); this.s = columns.map(() => []); this.ema = columns.map(() => [0, 1]);
  }
  push(view, weight) {
    const width = this.y.length + 3;
    const rows = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    for (let r = 0; r + width <= rows.length; r += width) {
      this.steps.push(rows[r]); this.minutes.push(rows[r + 1]); this.tokens.push(rows[r + 2]);
      for (let c = 0; c < this.y.length; c++) {
        const v = rows[r + 3 + c];
        this.y[c].push(v); this.s[c].push(smoothed(this.ema[c], v, weight));
      }
    }
  }
  resmooth(weight) { this.y.forEach((y, c) => { const state = this.ema[c] = [0, 1]; this.s[c] = y.map(v => smoothed(state, v, weight)); }); }
}

class Store {
  constructor() { this.listeners = new Set(); this.weight = 0.9; this.reset({ version: -1, columns: [], charts: [], runs: [], said: { waiting: "", possible: [null, null], runs: [], others: [] } }); }
  reset(meta) { this.meta = meta; this.said = meta.said; this.runs = meta.runs.map(r => new Run(r, meta.columns)); this.generation = (this.generation ?? 0) + 1; }
  get length() { return this.runs.reduce((n, run) => n + run.steps.length, 0); }
  smooth(weight) { if (weight === this.weight) return; this.weight = weight; this.runs.forEach(run => run.resmooth(weight)); this.generation++; }
  // false: it does not fit, ask for everything
  receive(message, buffers) {
    const run = this.runs[message.r];
    if (message.kind === "all") {
      this.reset(message.meta);
      this.runs.forEach((r, i) => { r.push(buffers[i], this.weight); r.at = message.at[i]; });
    } else if (message.kind === "add") {
      if (message.v !== this.meta.version || !run || message.at > run.at) return false;
      if (message.at + message.n <= run.at) return true;
      if (message.at < run.at) return false;
      run.push(buffers[0], this.weight); run.at += message.n;
    } else if (message.kind === "mark") {
      if (!run || message.i > run.marks.length) return false;
      if (message.i < run.marks.length) return true;
      run.marks.push(message.mark);
    } else if (message.kind === "say") this.said = message.said;
    this.listeners.forEach(listener => listener());
    return true;
  }
}

// ---- small helpers -----------------------------------------------------------------------------------------------------
function make(tag, name, text) {
  const el = document.createElement(tag);
  if (name) el.className = `grpo-nb-${name}`;
  if (text !== undefined) el.textContent = text;
  return el;
}
function button(name, text, hint, act) {
  const el = make("button", name, text);
  el.type = "button"; el.setAttribute("aria-label", hint); el.title = hint; el.addEventListener("click", act);
  return el;
}
function number(v) {
  if (!Number.isFinite(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  for (const [limit, unit, sign] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (size >= limit) return `${Number((v / unit).toPrecision(3))}${sign}`;
  if (size < 1e-3) return v.toExponential(1).replace(/\.0e/, "e");
  return String(Number(v.toPrecision(size >= 1000 ? 4 : 3)));
}
const rgb = colour => [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
function faded(colour, opacity) { return `rgba(${rgb(colour).join(",")},${opacity})`; } // "#rrggbb" -> rgba
function mixed(a, b, part) { const other = rgb(b); return "#" + rgb(a).map((v, i) => Math.round(v + (other[i] - v) * part).toString(16).padStart(2, "0")).join(""); }
function luminance(colour) {
  const [r, g, b] = rgb(colour).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(a, b) { const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y); return (high + 0.05) / (low + 0.05); }
// Towards the ink until it can be seen well; what was logged is the same colour towards the paper, as long as it can be seen at all.
const known = new Map(); // a colour is asked for with every draw
function once(key, work) { if (!known.has(key)) known.set(key, work()); return known.get(key); }
function strong(colour, ink, paper) { return once(`${colour}${ink}${paper}`, () => strengthened(colour, ink, paper)); }
function soft(colour, paper) { return once(`${colour}${paper}`, () => softened(colour, paper)); }
function strengthened(colour, ink, paper) { let part = 0; while (part < 1 && contrast(mixed(colour, ink, part), paper) < 4.5) part += 0.05; return mixed(colour, ink, Math.min(part, 1)); }
function softened(colour, paper) { let part = 0.8; while (part > 0 && contrast(mixed(colour, paper, part), paper) < 3.1) part -= 0.05; return mixed(colour, paper, Math.max(part, 0)); }
function within(v, [least, most], centre) {
  if (least !== null && least !== undefined) v = Math.max(v, Math.min(least, centre));
  if (most !== null && most !== undefined) v = Math.min(v, Math.max(most, centre));
  return v;
}
// The finite points of rows [from, end) of a column, thinned to the extremes of equal stretches where they are too many.
function points(x, y, from, log, limit) {
  const found = [];
  for (let i = from; i < y.length; i++) if (Number.isFinite(y[i]) && Number.isFinite(x[i]) && (!log || y[i] > 0)) found.push(i);
  if (found.length <= limit) return found;
  const keep = new Set([0, found.length - 1]), buckets = limit / 2 - 1;
  for (let b = 0; b < buckets; b++) {
    const start = Math.floor(b * found.length / buckets), end = Math.floor((b + 1) * found.length / buckets);
    let low = start, high = start;
    for (let i = start; i < end; i++) { if (y[found[i]] < y[found[low]]) low = i; if (y[found[i]] > y[found[high]]) high = i; }
    keep.add(low); keep.add(high);
  }
  return [...keep].sort((a, b) => a - b).map(i => found[i]);
}
function nearest(x, y, value) { // the row with a number in `y` that lies nearest on an ascending axis
  let low = 0, high = x.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (x[middle] < value) low = middle + 1; else high = middle; }
  for (let d = 0; d <= x.length; d++) {
    const found = [low - d, low + d].filter(i => i >= 0 && i < x.length && Number.isFinite(y[i]) && Number.isFinite(x[i]));
    if (found.length) return found.reduce((a, b) => Math.abs(x[a] - value) <= Math.abs(x[b] - value) ? a : b);
  }
  return -1;
}

// ---- one chart ---------------------------------------------------------------------------------------------------------
class Card {
  constructor(view, key) {
    this.view = view; this.key = key; this.generation = -1; this.drawn = []; this.size = "";
    this.el = make("div", "card"); this.el.setAttribute("role", "group");
    this.title = make("span", "title"); this.value = make("span", "value");
    const head = make("div", "head"), tools = make("span", "tools");
    this.larger = button("tool", "⤢", "", () => this.enlarge());
    this.away = button("tool", "×", "", () => view.model.send({ kind: "remove", name: this.key }));
    tools.append(this.larger); if (view.live) tools.append(this.away);
    head.append(this.title, this.value, tools);
    this.legend = make("div", "legend"); this.plot = make("div", "plot"); this.empty = make("div", "empty"); this.flags = make("div", "flags");
    this.unit = make("div", "unit"); this.along = make("div", "along"); this.rule = make("div", "rule"); this.tip = make("div", "hover");
    this.plot.setAttribute("role", "img"); this.rule.hidden = this.tip.hidden = true;
    for (const el of [this.unit, this.along, this.rule, this.tip]) el.setAttribute("aria-hidden", "true"); // the picture's name says it
    this.body = make("div", "body"); this.body.append(this.plot, this.unit, this.along, this.rule, this.flags, this.empty, this.tip);
    this.el.append(head, this.legend, this.body);
    this.body.addEventListener("mousemove", event => this.pointed(event));
    this.body.addEventListener("mouseleave", () => view.hover(null));
  }
  get spec() { return this.view.store.meta.charts.find(c => c.key === this.key); }
  get log() { return this.view.options.log || this.spec.log; }
  get smooth() { return this.view.options.smooth > 0 && !this.spec.raw; }
  get limits() { return this.spec.reward ? this.view.store.said.possible : [this.spec.least, this.spec.most]; }
  get raw() { return this.view.options.raw ?? !this.several; } // among several runs what was logged hides what is compared
  get limit() { return Math.max(300, LIMIT / (1 + this.view.store.runs.length)); } // points of a line: more lines, fewer points of each
  get several() { return this.view.store.runs.length > 1; }

  enlarge() {
    const large = this.el.classList.toggle("grpo-nb-large");
    this.larger.setAttribute("aria-pressed", large); this.view.arrange(); this.resize();
    if (large) this.el.scrollIntoView({ block: "nearest" });
  }
  off(s, band) { // whether the reader has turned a line off
    const { hidden, store } = this.view;
    if (this.several && hidden.has(`run ${store.runs[s.run].name}`)) return true;
    return hidden.has(this.several ? `${this.key}|${s.role === "eval"}` : `${this.key}|${s.metric}${band ? "|band" : ""}`);
  }
  traces() { // what each plotly trace takes from the rows
    const { store, options, ink, paper } = this.view, smooth = this.smooth, out = [];
    for (const s of this.spec.series) {
      if (this.off(s)) continue;
      const run = store.runs[s.run], colour = strong(s.colour, ink, paper), x = run[options.x], y = run.y[s.column];
      const values = i => y[i], even = i => run.s[s.column][i], main = smooth ? even : values;
      const add = (of, style) => out.push({ s, run, x, y, of, style });
      if (s.role === "main") {
        if (s.band >= 0 && !this.off(s, true)) {
          const half = i => Number.isFinite(run.y[s.band][i]) ? run.y[s.band][i] : 0, edge = { mode: "lines", line: { width: 0 }, band: true };
          const under = i => Math.max(within(main(i) - half(i), this.limits, main(i)), this.log ? main(i) / 10 : -Infinity);
          add(under, edge);
          add(i => within(main(i) + half(i), this.limits, main(i)), { ...edge, fill: "tonexty", fillcolor: faded(colour, 0.16) });
        }
        if (smooth && this.raw) add(values, { mode: "lines", line: { color: soft(colour, paper), width: 1 } });
        add(main, { mode: "lines", line: { color: colour, width: 2.2, dash: s.dash || "solid" }, bold: true });
      } else if (s.role === "eval") add(values, { mode: "lines+markers", line: { color: colour, width: 1.4, dash: "dot" }, marker: { size: 5, color: colour } });
      else {
        const style = { mode: "lines", line: { color: colour, width: 1.4, dash: s.dash || "solid" } };
        if (s.role === "share") style.yaxis = "y2";
        add(main, style);
      }
    }
    return out;
  }
  range(data) { // the axis of values: around a constant a range of ours, else plotly's, with what it must hold and where it ends
    let low = Infinity, high = -Infinity;
    for (const d of data) if (d.yaxis !== "y2") for (const v of d.y) if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
    this.low = Math.min(this.low, low); this.high = Math.max(this.high, high);
    if (!Number.isFinite(this.low)) return {};
    const [least, most] = this.limits, middle = Number(((this.low + this.high) / 2).toPrecision(5)), out = {};
    const bounded = least !== null && most !== null && least !== undefined && most !== undefined;
    this.constant = this.high - this.low <= SAME * Math.max(Math.abs(this.low), Math.abs(this.high));
    if (this.constant) {
      const air = Math.abs(middle) * 0.1 || 0.5, floor = this.low >= 0 ? 0 : -Infinity;
      if (this.log) return { autorange: false, range: [Math.log10(middle * 0.8), Math.log10(middle * 1.25)] };
      if (this.spec.zero && middle > 0) return { autorange: false, range: [0, middle * 1.25] };
      return { autorange: false, range: bounded ? [least - 0.01 * (most - least), most + 0.01 * (most - least)] : [Math.max(middle - air, floor), middle + air] };
    }
    if (this.spec.zero && !this.log) out.include = [0];
    if (this.log) return { autorange: true, autorangeoptions: {} };
    if (this.low >= 0) out.clipmin = 0;
    if (Number.isFinite(least) && least !== null && this.low >= least) out.clipmin = Math.max(out.clipmin ?? least, least);
    if (Number.isFinite(most) && most !== null && this.high <= most) out.clipmax = most;
    return { autorange: true, autorangeoptions: out };
  }
  layout(parts, data) {
    const { ink, paper, options } = this.view, grid = faded(ink, 0.12), share = parts.some(p => p.s.role === "share");
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 10, color: faded(ink, 0.8) }, fixedrange: false, automargin: false };
    const range = this.range(data), peak = Math.max(Math.abs(this.low), Math.abs(this.high));
    const form = peak >= 1e4 ? "~s" : this.log && this.low >= 1e-3 ? "~g" : "";
    return {
      shapes: this.shapes(), margin: { l: 42, r: share ? 36 : 10, t: 18, b: 28 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { size: 11, color: ink }, hovermode: false, dragmode: "zoom", uirevision: "keep",
      xaxis: { ...axis, showgrid: false, nticks: 5, tickformat: options.x === "minutes" ? "" : "~s", uirevision: options.x },
      yaxis: { ...axis, nticks: 5, type: this.log ? "log" : "linear", tickformat: form, exponentformat: "e", ...range, ...(this.log && this.dtick ? { dtick: this.dtick } : {}), uirevision: `${this.log}` },
      ...(share ? { yaxis2: { ...axis, overlaying: "y", side: "right", range: [0, 1.02], tickvals: [0, 0.5, 1], tickformat: ".0%", showgrid: false, fixedrange: true } } : {}),
    };
  }
  marks() { // of a run alone: [where, step, text, kind]
    const { store, options } = this.view;
    if (store.runs.length !== 1) return [];
    const run = store.runs[0], x = run[options.x], first = run.steps[0], last = run.steps[run.steps.length - 1];
    return run.marks.filter(m => m[0] >= first - 1 && m[0] <= last + 1).map(([step, text, kind]) => {
      const i = nearest(run.steps, x, Math.min(Math.max(step, first), last));
      return [options.x === "steps" ? Math.min(Math.max(step, first), last) : x[i], step, text, kind];
    }).filter(m => Number.isFinite(m[0]));
  }
  shapes() { // a line over the whole height for a change, a tick at the foot for a pause or a checkpoint
    return this.marks().map(([at, , , kind]) => {
      const change = kind === "change";
      return { type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: change ? 1 : 0.05, layer: "below",
               line: { color: change ? CHANGE : faded(this.view.ink, 0.7), width: change ? 1 : 1.5, dash: change ? "3px,2px" : "solid" } };
    });
  }
  place() { // the flags: where the pointer finds out what a mark is
    const layout = this.plot._fullLayout, axis = layout?.xaxis;
    if (!axis || this.plot.hidden) { this.flags.replaceChildren(); return; }
    const { range } = layout.yaxis, decades = Math.abs(range[1] - range[0]), dtick = decades < 0.6 ? null : decades < 2.5 ? "D2" : Math.ceil(decades / 6);
    if (this.log && this.dtick !== dtick) { this.dtick = dtick; this.view.Plotly.relayout(this.plot, { "yaxis.dtick": dtick, "yaxis.tickmode": dtick === null ? "auto" : "linear" }); }
    const seen = this.marks();
    while (this.flags.children.length > seen.length) this.flags.lastChild.remove();
    while (this.flags.children.length < seen.length) {
      const flag = make("div", "flag"); flag.tabIndex = 0; flag.setAttribute("role", "img"); flag.append(make("span", "tip")); this.flags.append(flag);
    }
    seen.forEach(([at, step, text, kind], i) => {
      const flag = this.flags.children[i], left = axis.l2p(at);
      flag.hidden = left < -1 || left > axis._length + 1;
      flag.style.left = `${layout._size.l + left}px`;
      flag.style.top = kind === "change" ? "6px" : `${layout._size.t + layout._size.h - 8}px`;
      flag.dataset.kind = kind; flag.dataset.side = left > axis._length / 2 ? "left" : "right";
      flag.firstChild.textContent = `step ${step.toLocaleString("en")}: ${text}`; flag.setAttribute("aria-label", flag.firstChild.textContent);
    });
  }
  last(s) { // the latest row of a line with a number
    const y = this.view.store.runs[s.run].y[s.column];
    for (let i = y.length - 1; i >= 0; i--) if (Number.isFinite(y[i])) return i;
    return -1;
  }
  heading() {
    const { store } = this.view, spec = this.spec, main = spec.series.find(s => s.role === "main") ?? spec.series[0];
    this.title.textContent = spec.title; this.el.setAttribute("aria-label", spec.title);
    this.larger.title = `Open ${spec.title} large`; this.larger.setAttribute("aria-label", this.larger.title);
    this.larger.setAttribute("aria-pressed", this.el.classList.contains("grpo-nb-large"));
    this.away.title = `Remove ${spec.title}`; this.away.setAttribute("aria-label", this.away.title);
    const i = main && !this.several ? this.last(main) : -1;
    this.now = i >= 0 ? number(store.runs[0].y[main.column][i]) : "";
    if (this.rule.hidden) this.value.textContent = this.now;
    const told = spec.series.filter(s => !this.off(s)).reverse().map(s => {
      const run = store.runs[s.run], at = this.last(s);
      if (at < 0) return "";
      const even = this.smooth && s.role === "main" ? `, smoothed ${number(run.s[s.column][at])}` : "";
      return `${s.label} ${number(run.y[s.column][at])}${s.role === "share" || !spec.unit ? "" : ` ${spec.unit}`}${even} at step ${run.steps[at].toLocaleString("en")}`;
    }).filter(Boolean);
    this.plot.setAttribute("aria-label", `${spec.title}: ${told.join("; ") || "no number yet"}.`);
  }
  labels() {
    const { ink, paper, hidden } = this.view;
    const entry = (key, text, colour, dash, kind, hint) => {
      const item = button("entry", undefined, `${text}: show or hide`, () => { if (!hidden.delete(key)) hidden.add(key); this.view.later(true); });
      const swatch = make("i", kind), name = make("span", "name", text);
      if (kind === "band") swatch.style.background = colour; else swatch.style.borderTopColor = colour;
      swatch.style.borderTopStyle = { dash: "dashed", dot: "dotted", dashdot: "dashed" }[dash] ?? "solid"; swatch.style.color = colour;
      item.title = hint; item.setAttribute("aria-pressed", !hidden.has(key)); item.append(swatch, name);
      return item;
    };
    const focused = [...this.legend.children].indexOf(document.activeElement), out = [];
    const order = [...this.spec.series].sort((a, b) => (b.role === "main") - (a.role === "main"));
    if (this.several) {
      if (order.some(s => s.role === "eval")) out.push(entry(`${this.key}|true`, "evaluation", this.view.ink, "dot", "dots", "evaluations of the runs"));
    } else for (const s of order) {
      const colour = strong(s.colour, ink, paper);
      out.push(entry(`${this.key}|${s.metric}`, s.label, colour, s.dash, s.role === "eval" ? "dots" : "", s.metric));
      if (s.role === "main" && s.band >= 0) out.push(entry(`${this.key}|${s.metric}|band`, s.band_label, colour, "", "band", this.view.store.meta.columns[s.band]));
    }
    this.legend.replaceChildren(...out);
    if (focused >= 0) this.legend.children[focused]?.focus();
  }
  async draw(force) {
    const { store, Plotly, options } = this.view, rows = store.runs.map(r => r.steps.length);
    this.heading();
    const has = test => this.spec.series.some(s => { const run = store.runs[s.run], x = run[options.x]; return run.y[s.column].some((v, i) => test(v, x[i])); });
    const logged = has(Number.isFinite), there = has((v, x) => Number.isFinite(v) && Number.isFinite(x)), parts = this.traces();
    const any = there && (!this.log || has((v, x) => v > 0 && Number.isFinite(x)));
    this.plot.hidden = this.unit.hidden = this.along.hidden = !any; this.empty.hidden = any;
    if (!any) { this.legend.replaceChildren(); this.flags.replaceChildren(); this.empty.textContent = logged && !there ? `no ${options.x} were logged` : logged ? "nothing above 0, which a log scale needs" : store.length ? this.spec.empty : store.said.waiting; this.generation = -1; return; }
    this.unit.textContent = [this.spec.unit, this.log ? "log scale" : ""].filter(Boolean).join(", "); this.along.textContent = WORDS[options.x];
    this.stale ||= force;
    if (!Plotly || !this.plot.clientWidth || !this.plot.clientHeight) return; // not laid out, as in a tab behind: the resize observer calls again
    const drawn = p => this.log ? i => { const v = p.of(i); return v > 0 ? v : null; } : p.of; // an average of both signs has gaps
    const limits = `${this.limits}`, marked = store.runs[0].marks.length;
    if (this.stale || this.generation !== store.generation || this.points > 2 * this.limit || limits !== this.limited || parts.length !== this.parts) {
      this.stale = false;
      this.labels();
      const data = parts.map(p => {
        const kept = points(p.x, p.y, 0, this.log, this.limit), { bold, band, ...style } = p.style;
        return { type: "scatter", ...style, x: kept.map(i => p.x[i]), y: kept.map(drawn(p)) };
      });
      this.points = Math.max(0, ...data.map(d => d.x.length)); this.drawn = rows; this.low = Infinity; this.high = -Infinity;
      this.generation = store.generation; this.limited = limits; this.parts = parts.length; this.single = false;
      data.forEach(d => { if (d.marker && d.x.length > 60) { d.mode = "lines"; delete d.marker; } }); // dots that touch are a thick line
      data.forEach((d, i) => { if (d.x.length === 1 && !parts[i].style.band && d.mode === "lines") { this.single = true; d.mode = "lines+markers"; d.marker = { size: 5, color: d.line.color }; } });
      await Plotly.react(this.plot, data, this.layout(parts, data), { displayModeBar: false, responsive: false, displaylogo: false, doubleClick: "reset" });
      if (!this.listening) { this.listening = true; this.plot.on("plotly_afterplot", () => this.place()); } // zoomed, resized or redrawn
      this.marked = marked; this.place();
    } else if (rows.some((n, r) => n > this.drawn[r])) {
      if (this.single) { this.generation = -1; return this.draw(true); } // a single point had a marker
      const x = [], y = [], which = [];
      parts.forEach((p, t) => {
        const fresh = points(p.x, p.y, this.drawn[p.s.run], this.log, this.limit);
        if (fresh.length) { x.push(fresh.map(i => p.x[i])); y.push(fresh.map(drawn(p))); which.push(t); }
      });
      this.points += Math.max(0, ...x.map(v => v.length)); this.drawn = rows;
      const constant = this.constant, range = this.range(y.map((values, k) => ({ y: values, yaxis: parts[which[k]].style.yaxis })));
      if (constant !== this.constant) { this.generation = -1; return this.draw(true); }
      if (!constant) this.plot.layout.yaxis.autorangeoptions = range.autorangeoptions;
      if (which.length) await Plotly.extendTraces(this.plot, { x, y }, which);
    }
    if (this.marked !== marked) { this.marked = marked; await Plotly.relayout(this.plot, { shapes: this.shapes() }); }
  }
  get behind() {
    if (this.generation < 0) return false;
    const { runs } = this.view.store;
    return runs.some((r, i) => r.steps.length > (this.drawn[i] ?? 0)) || this.marked !== runs[0].marks.length;
  }
  resize() {
    const size = `${this.plot.clientWidth}x${this.plot.clientHeight}`;
    if (size === this.size || this.plot.hidden || !this.plot.clientWidth || this.generation < 0) return;
    this.size = size; this.view.Plotly.Plots.resize(this.plot);
  }
  pointed(event) {
    const layout = this.plot._fullLayout, axis = layout?.xaxis;
    if (!axis || this.plot.hidden || event.target.closest(".grpo-nb-flag")) return this.view.hover(null);
    const left = event.clientX - this.plot.getBoundingClientRect().left - layout._size.l;
    if (left < 0 || left > axis._length) return this.view.hover(null);
    this.view.hover(this, axis.p2l(left));
  }
  show(value, full) { // the numbers at one place of the horizontal axis
    const layout = this.plot._fullLayout, axis = layout?.xaxis, { store, options, ink, paper } = this.view;
    this.rule.hidden = this.tip.hidden = true; this.value.textContent = this.now ?? "";
    if (value === null || !axis || this.plot.hidden || this.generation < 0) return;
    const spread = Math.abs(axis.range[1] - axis.range[0]), lines = [];
    for (const s of this.several ? this.spec.series : [...this.spec.series].reverse()) {
      if (this.off(s)) continue;
      const run = store.runs[s.run], x = run[options.x], i = nearest(x, run.y[s.column], value);
      if (i >= 0 && Math.abs(x[i] - value) <= spread * (s.role === "eval" ? 0.02 : 0.1)) lines.push({ s, run, i, x: x[i] });
    }
    if (!lines.length) return;
    const at = lines.reduce((a, b) => Math.abs(a.x - value) <= Math.abs(b.x - value) ? a : b).x, left = axis.l2p(at);
    this.rule.hidden = false; this.rule.style.left = `${layout._size.l + left}px`;
    this.rule.style.top = `${layout._size.t}px`; this.rule.style.height = `${layout._size.h}px`;
    const text = (l, v) => l.s.role === "share" ? `${Math.round(v * 100)} %` : number(v), even = this.smooth;
    const main = lines.find(l => l.s.role === "main");
    if (!full) { if (main && !this.several) this.value.textContent = text(main, even ? main.run.s[main.s.column][main.i] : main.run.y[main.s.column][main.i]); return; }
    const table = make("table"), row = (tag, ...cells) => { const tr = make("tr"); cells.forEach(c => tr.append(c instanceof Node ? c : make(tag, "", c))); table.append(tr); };
    const where = options.x === "minutes" ? `${at.toFixed(1)} minutes` : options.x === "tokens" ? `${number(at)} tokens` : `step ${at.toLocaleString("en")}`;
    const tried = l => lines.find(e => e.s.role === "eval" && e.s.of === l.s.metric && e.run === l.run); // stands in its metric's row
    const shown = lines.filter(l => l.s.role !== "eval" || !lines.some(other => tried(other) === l)), evaluated = shown.some(tried);
    row("th", where, ...(even ? ["smoothed", "logged"] : ["logged"]), ...(evaluated ? ["evaluated"] : []));
    for (const l of shown.slice(0, 10)) {
      const name = make("td", "", l.s.label), swatch = make("i"); swatch.style.borderTopColor = strong(l.s.colour, ink, paper); name.prepend(swatch);
      const value_ = text(l, l.run.y[l.s.column][l.i]), calm = l.s.role === "eval" ? "" : text(l, l.run.s[l.s.column][l.i]);
      const eval_ = tried(l);
      row("td", name, ...(even ? [calm, value_] : [value_]), ...(evaluated ? [eval_ ? text(eval_, eval_.run.y[eval_.s.column][eval_.i]) : ""] : []));
      if (l.s.role === "main" && l.s.band >= 0 && !this.off(l.s, true)) row("td", l.s.band_label, ...(even ? [""] : []), number(l.run.y[l.s.band][l.i]));
    }
    if (shown.length > 10) row("td", `and ${shown.length - 10} more`);
    this.tip.replaceChildren(table); this.tip.hidden = false;
    const right = left > axis._length / 2;
    this.tip.style.left = right ? "auto" : `${layout._size.l + left + 10}px`;
    this.tip.style.maxWidth = `${this.body.clientWidth}px`;
    this.tip.style.right = right ? `${this.body.clientWidth - layout._size.l - left + 10}px` : "auto";
    const over = this.tip.offsetLeft + this.tip.offsetWidth - this.body.clientWidth;
    if (over > 0) this.tip.style.left = `${this.tip.offsetLeft - over}px`;
    if (this.tip.offsetLeft < 0) { this.tip.style.right = "auto"; this.tip.style.left = "0"; }
  }
}

// ---- files -------------------------------------------------------------------------------------------------------------
function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob); link.download = name;
  document.body.append(link); link.click(); link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
function toCsv(store) { // float32, so seven digits
  const cell = v => Number.isFinite(v) ? String(Number(v.toPrecision(7))) : "", quoted = v => /[",\n]/.test(v) ? `"${v.replaceAll('"', '""')}"` : v;
  const several = store.runs.length > 1, lines = [[...(several ? ["run"] : []), "step", ...store.meta.columns.map(quoted)].join(",")];
  for (const run of store.runs) run.steps.forEach((step, i) => lines.push([...(several ? [quoted(run.name)] : []), step, ...run.y.map(y => cell(y[i]))].join(",")));
  return new Blob([lines.join("\n") + "\n"], { type: "text/csv" });
}
function headline(store) { // which run, and how far it is
  return store.runs.map((run, i) => {
    const [state, total] = store.said.runs[i] ?? ["", 0], far = run.steps.length ? `step ${run.steps[run.steps.length - 1].toLocaleString("en")}${total ? ` of ${total.toLocaleString("en")}` : ""}` : "no step yet";
    return `${run.name ? `${run.name}: ` : ""}${far}${["failed", "stopped", "paused", "killed", "finished"].includes(state) ? `, ${state}` : ""}`;
  }).join(" · ");
}
function footnotes(view) { // what the strokes mean
  const { store, options } = view, out = [], kinds = new Set(store.runs.length === 1 ? store.runs[0].marks.map(m => m[2]) : []);
  if (options.smooth && (options.raw ?? store.runs.length === 1)) out.push(`Bold lines are smoothed (${options.smooth}), the thin ones behind them are as logged.`);
  if (kinds.has("change")) out.push("A dashed upright line: a setting was changed. " + store.runs[0].marks.filter(m => m[2] === "change").slice(-4).map(m => `After step ${m[0].toLocaleString("en")}: ${m[1]}`).join("; ") + ".");
  if (kinds.has("pause") || kinds.has("saved")) out.push("A tick at the foot: a pause, or a checkpoint.");
  return out;
}
function wrapped(pen, text, room) {
  const lines = [""];
  for (const word of text.split(" ")) if (pen.measureText(`${lines[lines.length - 1]} ${word}`).width > room && lines[lines.length - 1]) lines.push(word); else lines[lines.length - 1] = `${lines[lines.length - 1]} ${word}`.trim();
  return lines;
}
async function toPng(view) {
  const { Plotly, cards, root, store } = view, box = root.getBoundingClientRect(), scale = 2, pad = 16, family = getComputedStyle(root).fontFamily;
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d"), grid = view.grid.getBoundingClientRect(), top = grid.top;
  pen.font = `600 15px ${family}`;
  const heads = wrapped(pen, [view.model.get("_title"), headline(store)].filter(Boolean).join(" · "), box.width);
  pen.font = `11px ${family}`;
  const feet = footnotes(view).flatMap(text => wrapped(pen, text, box.width)), runs = store.runs.length > 1 ? 20 : 0, head = 20 * heads.length + runs + 8;
  canvas.width = (box.width + 2 * pad) * scale; canvas.height = (grid.height + 2 * pad + head + 16 * feet.length) * scale;
  pen.scale(scale, scale); pen.fillStyle = view.paper; pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.textBaseline = "middle"; pen.fillStyle = view.ink; pen.font = `600 15px ${family}`;
  heads.forEach((line, i) => pen.fillText(line, pad, pad + 8 + 20 * i));
  pen.font = `11px ${family}`;
  feet.forEach((line, i) => pen.fillText(line, pad, grid.height + pad + head + 12 + 16 * i));
  if (runs) {
    let at = pad;
    for (const run of store.runs) {
      pen.strokeStyle = strong(run.colour, view.ink, view.paper); pen.lineWidth = 2; pen.setLineDash({ dash: [5, 3], dot: [2, 2], dashdot: [5, 2, 2, 2] }[run.dash] ?? []);
      const middle = pad + 20 * heads.length + 8; pen.beginPath(); pen.moveTo(at, middle); pen.lineTo(at + 16, middle); pen.stroke(); pen.setLineDash([]);
      pen.fillText(run.name, at + 21, middle); at += 36 + pen.measureText(run.name).width;
    }
  }
  pen.translate(pad - box.left, pad + head - top);
  for (const card of cards) {
    for (const el of card.el.querySelectorAll(".grpo-nb-title, .grpo-nb-value, .grpo-nb-legend i, .grpo-nb-name, .grpo-nb-empty, .grpo-nb-unit, .grpo-nb-along")) {
      if (el.hidden || el.closest("[aria-pressed=false].grpo-nb-entry")) continue;
      const at = el.getBoundingClientRect(), style = getComputedStyle(el), middle = at.top + at.height / 2, empty = el === card.empty;
      if (el.tagName === "I") { // a swatch
        pen.globalAlpha = Number(style.opacity);
        pen.fillStyle = pen.strokeStyle = el.classList.contains("grpo-nb-band") ? style.backgroundColor : style.borderTopColor;
        if (el.classList.contains("grpo-nb-band")) pen.fillRect(at.left, at.top, at.width, at.height);
        else { pen.lineWidth = 2; pen.setLineDash({ dotted: [2, 2], dashed: [4, 2] }[style.borderTopStyle] ?? []); pen.beginPath(); pen.moveTo(at.left, middle); pen.lineTo(at.right, middle); pen.stroke(); }
        pen.globalAlpha = 1; pen.setLineDash([]); continue;
      }
      pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`; pen.fillStyle = view.ink; pen.textAlign = empty ? "center" : "left";
      pen.fillText(el.textContent, empty ? at.left + at.width / 2 : at.left, middle);
    }
    if (card.generation < 0) continue;
    const at = card.plot.getBoundingClientRect(), image = new Image();
    image.src = await Plotly.toImage(card.plot, { format: "png", width: at.width, height: at.height, scale });
    await image.decode();
    pen.drawImage(image, at.left, at.top, at.width, at.height);
  }
  return new Promise(done => canvas.toBlob(done, "image/png"));
}
function toPage(view, template) {
  const { store, model } = view;
  const base64 = bytes => { let text = ""; for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192)); return btoa(text); };
  const rows = store.runs.map(run => {
    const width = run.y.length + 3, out = new Float32Array(run.steps.length * width);
    run.steps.forEach((step, i) => { out.set([step, run.minutes[i], run.tokens[i], ...run.y.map(y => y[i])], i * width); });
    return base64(new Uint8Array(out.buffer));
  });
  const runs = store.meta.runs.map((r, i) => ({ ...r, marks: store.runs[i].marks }));
  const data = { meta: { ...store.meta, runs, said: store.said }, at: store.runs.map(r => r.at), rows, plotly: base64(bytesOf(model.get("_plotly"))), options: view.options, title: headline(store) };
  const parts = { title: "Training run", css: model.get("_css"), js: model.get("_esm"), data: JSON.stringify(data).replaceAll("<", "\\u003c"), static: "These charts need JavaScript." };
  return new Blob([template.split(/\$(title|css|js|data|static)\b/).map((part, i) => i % 2 ? parts[part] : part).join("")], { type: "text/html" });
}

// ---- the view ----------------------------------------------------------------------------------------------------------
class View {
  constructor(el, model, store) {
    this.store = store; this.model = model; this.cards = []; this.hidden = new Set(); this.live = Boolean(model.get("_page"));
    this.options = { smooth: 0.9, log: false, x: "steps", raw: null, ...(model.get("_options") ?? {}) };
    store.smooth(this.options.smooth);
    this.root = make("div"); this.root.className = "grpo-nb";
    this.bar = make("div", "bar"); this.step = make("span", "step"); this.state = make("span", "state"); this.state.setAttribute("role", "status");
    this.runs = make("div", "runs"); this.grid = make("div", "grid");
    this.bar.append(this.step, this.state, this.across(), this.strength(), this.toggle("raw", "as logged"), this.toggle("log", "log scale"), ...(this.live ? [this.more()] : []), this.files());
    this.root.append(this.bar, this.runs, this.grid); el.append(this.root); this.later();
    this.listener = () => this.later(); store.listeners.add(this.listener);
    this.sizes = new ResizeObserver(() => this.arrange()); this.sizes.observe(this.root);
    const themed = () => { if (!this.closed && this.theme()) this.later(true); };
    this.themes = new MutationObserver(() => { themed(); for (const ms of [300, 1500, 5000]) setTimeout(themed, ms); }); // the colours come after the theme's name
    for (const node of [document.documentElement, document.body])
      this.themes.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind", "theme", "data-bs-theme"] });
    plotly(model).then(Plotly => { this.Plotly = Plotly; this.theme(); this.arrange(); this.later(true); })
      .catch(error => { this.step.textContent = `The charts could not be drawn: ${error}`; });
  }
  choose(name, value) { // the page keeps it, the kernel's picture follows, and a reload finds it
    this.options = { ...this.options, [name]: value };
    if (name === "smooth") this.store.smooth(value);
    if (this.live) { this.model.set("_options", this.options); this.model.save_changes(); }
    this.later(true);
  }
  labelled(text, control) { const label = make("label"); label.append(document.createTextNode(text), control); return label; }
  toggle(name, text) {
    const label = make("label"), box = make("input");
    box.type = "checkbox"; box.checked = this.options[name] ?? this.store.runs.length === 1;
    box.addEventListener("change", () => this.choose(name, box.checked));
    label.append(box, document.createTextNode(text));
    return label;
  }
  across() {
    const select = make("select");
    for (const name of Object.keys(WORDS)) select.append(new Option(name, name, false, name === this.options.x));
    select.addEventListener("change", () => this.choose("x", select.value));
    return this.labelled("over ", select);
  }
  strength() {
    const slider = make("input"), shown = make("output", "", String(this.options.smooth));
    Object.assign(slider, { type: "range", min: 0, max: 0.99, step: 0.01, value: this.options.smooth });
    slider.addEventListener("input", () => { shown.textContent = slider.value; clearTimeout(this.sliding); this.sliding = setTimeout(() => this.choose("smooth", Number(slider.value)), 60); });
    const label = this.labelled("smoothing ", slider); label.append(shown);
    return label;
  }
  more() {
    this.others = make("select"); this.others.setAttribute("aria-label", "Add a chart");
    this.others.addEventListener("change", () => { if (this.others.value) this.model.send({ kind: "add", name: this.others.value }); this.others.value = ""; });
    return this.others;
  }
  offer() { // what can be added
    const names = this.store.said.others ?? [], text = names.join("\n");
    if (!this.others || text === this.offered || document.activeElement === this.others) return;
    this.offered = text; this.others.replaceChildren(new Option("add a chart…", ""), ...names.map(n => new Option(n, n)));
    this.others.hidden = !names.length;
  }
  files() {
    const group = make("span", "files"), page = this.model.get("_page");
    const kinds = [["PNG", "the charts as a picture", () => toPng(this)], ["CSV", "the numbers that these charts show", () => toCsv(this.store)],
                   ...(page ? [["HTML", "the charts as a page that needs nothing else", () => toPage(this, page)]] : [])];
    for (const [name, hint, make_] of kinds) {
      const el = make("button", "", name);
      el.type = "button"; el.title = `Save ${hint}`;
      el.addEventListener("click", async () => {
        el.disabled = true;
        try { save(await make_(), `charts-step-${Math.max(0, ...this.store.runs.map(r => r.steps.at(-1) ?? 0))}.${name.toLowerCase()}`); }
        catch (error) { this.step.textContent = `${name} could not be saved: ${error}`; }
        el.disabled = false;
      });
      group.append(el);
    }
    this.saving = group;
    return group;
  }
  theme() { // true where the colours have changed
    const canvas = document.createElement("canvas").getContext("2d");
    const hex = css => { canvas.fillStyle = "#000000"; canvas.fillStyle = css; return canvas.fillStyle.startsWith("#") ? canvas.fillStyle : null; };
    let node = this.root, paper = null;
    while (node && !paper) {
      const css = getComputedStyle(node).backgroundColor;
      if (!/^rgba\(.*, ?0\)$|^transparent$/.test(css)) paper = hex(css);
      node = node.parentElement;
    }
    this.paper = paper ?? "#ffffff";
    const css = getComputedStyle(this.root).color.match(/[\d.]+/g)?.map(Number), ground = rgb(this.paper), old = this.ink + this.was; // rgba over the paper
    this.ink = css?.length >= 3 ? "#" + css.slice(0, 3).map((v, i) => Math.round(v * (css[3] ?? 1) + ground[i] * (1 - (css[3] ?? 1))).toString(16).padStart(2, "0")).join("") : "#333333";
    this.was = this.paper;
    return old !== this.ink + this.paper;
  }
  arrange() {
    const width = this.root.clientWidth, n = this.store.meta.charts.length || 1;
    const columns = width >= 780 && n !== 4 ? Math.min(n, 3) : width >= 520 && n % 2 === 0 ? 2 : 1;
    this.root.style.setProperty("--grpo-nb-columns", columns);
    if (!this.Plotly || !width) return;
    if (this.theme()) this.later(true); // made outside the page, as in a tab, it had no colours to read
    this.cards.forEach(card => card.resize());
    if (this.cards.some(card => card.generation < 0 || card.stale)) this.later();
  }
  later(force) { // at most eight redraws a second, and a third of the time is left to the rest of the page
    this.force ||= force;
    if (this.timer || this.closed) return;
    const pause = Math.min(Math.max(1.5 * (this.took ?? 0), 120), 1000);
    const wait = force ? 0 : Math.max(0, (this.last ?? 0) + pause - performance.now());
    this.timer = setTimeout(() => requestAnimationFrame(() => this.draw()), wait);
  }
  legend() { // of the runs, where there are several
    const { runs } = this.store, key = `${this.ink}${this.paper}${runs.map(r => r.name)}|${[...this.hidden]}`;
    this.runs.hidden = runs.length < 2;
    if (key === this.legended || runs.length < 2) return;
    this.legended = key;
    const focused = [...this.runs.children].indexOf(document.activeElement);
    this.runs.replaceChildren(...runs.map(run => {
      const hidden = `run ${run.name}`, swatch = make("i");
      const item = button("entry", undefined, `${run.name}: show or hide`, () => { if (!this.hidden.delete(hidden)) this.hidden.add(hidden); this.later(true); });
      swatch.style.borderTopColor = strong(run.colour, this.ink, this.paper); swatch.style.borderTopStyle = { dash: "dashed", dot: "dotted", dashdot: "dashed" }[run.dash] ?? "solid";
      item.setAttribute("aria-pressed", !this.hidden.has(hidden)); item.append(swatch, make("span", "name", run.name));
      return item;
    }));
    if (focused >= 0) this.runs.children[focused]?.focus();
  }
  order() { // the cards as the kernel wants them; those that stay keep their zoom
    const keys = this.store.meta.charts.map(c => c.key), old = new Map(this.cards.map(c => [c.key, c]));
    if (keys.join("\n") === this.cards.map(c => c.key).join("\n")) return;
    for (const card of this.cards) if (!keys.includes(card.key)) { if (card.generation >= 0) this.Plotly?.purge(card.plot); card.el.remove(); }
    this.cards = keys.map(key => old.get(key) ?? new Card(this, key));
    this.cards.forEach((card, i) => { if (this.grid.children[i] !== card.el) this.grid.insertBefore(card.el, this.grid.children[i] ?? null); });
    this.arrange();
  }
  async draw() {
    const force = this.force; this.force = false; this.last = performance.now();
    try {
      const { runs, said } = this.store, states = runs.map((run, i) => [run.name, said.runs[i]?.[0] ?? ""]).filter(([, state]) => ["failed", "stopped", "paused", "killed", "finished"].includes(state));
      const far = runs.length === 1 && runs[0].steps.length ? runs[0].steps[runs[0].steps.length - 1] : Math.max(0, ...runs.map(r => r.steps.at(-1) ?? 0));
      this.step.textContent = this.store.length ? `step ${far.toLocaleString("en")}` : "";
      const same = states.length === runs.length && new Set(states.map(([, s]) => s)).size === 1;
      const state = same ? states[0][1] : states.map(([name, s]) => `${name} ${s}`).join(", ");
      if (this.state.textContent !== state) this.state.textContent = state;
      this.offer(); this.order(); if (this.ink) this.legend(); // what waits says so before plotly is unpacked
      if (!this.ink) this.theme();
      for (const card of this.cards) await card.draw(force);
    } catch (error) { console.error("grpo_nb charts:", error); }
    this.timer = undefined; this.took = performance.now() - this.last;
    if (this.force || this.cards.some(card => card.behind)) this.later(this.force);
  }
  hover(from, value = null) { // the same place in every chart; the numbers beside the pointer
    if (!from && !this.hovering) return;
    this.hovering = Boolean(from);
    for (const card of this.cards) card.show(from ? value : null, card === from);
  }
  close() {
    this.closed = true; this.store.listeners.delete(this.listener); this.sizes.disconnect(); this.themes.disconnect(); clearTimeout(this.timer);
    for (const card of this.cards) if (card.generation >= 0) this.Plotly?.purge(card.plot);
    this.root.remove();
  }
}

export default () => {
  const store = new Store(); // one for the model: every view of it draws the same rows
  return {
    initialize({ model }) {
      let asked = 0;
      const first = model.get("_snapshot");
      store.weight = model.get("_options")?.smooth ?? store.weight;
      if (first?.meta) store.receive({ kind: "all", meta: first.meta, at: first.at }, first.rows);
      const heard = (message, buffers) => {
        if (store.receive(message, buffers)) return;
        if (performance.now() - asked < 1000 && asked) return; // one request at a time
        asked = performance.now(); model.send({ kind: "sync" });
      };
      model.on("msg:custom", heard);
      model.send({ kind: "ready" });
      return () => model.off("msg:custom", heard);
    },
    render({ model, el }) {
      const view = new View(el, model, store);
      return () => view.close();
    },
  };
};

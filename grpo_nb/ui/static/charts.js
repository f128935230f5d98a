// All charts of a run in one widget. The kernel sends rows (a step and one float32 per column) with the offset at which they
// belong; rows that do not fit are answered by a request for everything. Left out on purpose: arithmetic on metrics. What is
// drawn is what was logged, and a smoothing line.
const LIMIT = 2000, WEIGHT = 0.9, CHANGE = "#c9962e";
const SHARED = Symbol.for("grpo_nb.plotly");

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
class Store {
  constructor() { this.listeners = new Set(); this.reset({ version: -1, columns: [], charts: [] }, 0); }
  reset(meta, at) {
    this.meta = meta; this.at = at; this.x = []; this.y = meta.columns.map(() => []); this.s = meta.columns.map(() => []);
    this.marks = [...(meta.marks ?? [])];
    this.ema = meta.columns.map(() => [0, 0]); this.generation = (this.generation ?? 0) + 1;
  }
  push(view) {
    const width = this.y.length + 1;
    const rows = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    for (let r = 0; r + width <= rows.length; r += width) {
      this.x.push(rows[r]);
      for (let c = 0; c < this.y.length; c++) {
        const v = rows[r + 1 + c], e = this.ema[c];
        this.y[c].push(v);
        if (!Number.isFinite(v)) { this.s[c].push(NaN); continue; }
        e[0] = WEIGHT * e[0] + (1 - WEIGHT) * v; e[1] += 1;
        this.s[c].push(e[0] / (1 - WEIGHT ** e[1]));
      }
    }
  }
  // false: it does not fit, ask for everything
  receive(message, view) {
    if (message.kind === "all") { this.reset(message.meta, message.at); this.push(view); }
    else if (message.kind === "add") {
      if (message.v !== this.meta.version || message.at > this.at) return false;
      if (message.at + message.n <= this.at) return true;
      if (message.at < this.at) return false;
      this.push(view); this.at += message.n;
    } else if (message.kind === "mark") {
      if (message.i > this.marks.length) return false;
      if (message.i < this.marks.length) return true;
      this.marks.push(message.mark);
    }
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
function number(v) {
  if (!Number.isFinite(v)) return "–";
  const size = Math.abs(v);
  if (size === 0) return "0";
  for (const [limit, unit, sign] of [[1e9, 1e9, "G"], [1e6, 1e6, "M"], [1e4, 1e3, "k"]])
    if (size >= limit) return `${Number((v / unit).toPrecision(3))}${sign}`;
  if (size < 1e-3) return v.toExponential(1).replace(/\.0e/, "e");
  return String(Number(v.toPrecision(size >= 1000 ? 4 : 3)));
}
function faded(colour, opacity) { // "#rrggbb" -> rgba
  const [r, g, b] = [1, 3, 5].map(i => parseInt(colour.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${opacity})`;
}
function plain(text) { return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); }
// The finite points of rows [from, to) of a column, thinned to the extremes of equal stretches where they are too many.
function points(store, column, from, log, limit) {
  const y = store.y[column], found = [];
  for (let i = from; i < y.length; i++) if (Number.isFinite(y[i]) && (!log || y[i] > 0)) found.push(i);
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

// ---- one chart ---------------------------------------------------------------------------------------------------------
class Card {
  constructor(view, index) {
    this.view = view; this.index = index; this.generation = -1; this.drawn = 0; this.size = "";
    this.el = make("div", "card");
    this.title = make("span"); this.value = make("span", "value");
    const head = make("div", "head"); head.append(this.title, this.value);
    this.legend = make("div", "legend"); this.plot = make("div", "plot"); this.empty = make("div", "empty"); this.flags = make("div", "flags");
    const body = make("div", "body"); body.append(this.plot, this.flags, this.empty);
    this.el.append(head, this.legend, body);
  }
  get spec() { return this.view.store.meta.charts[this.index]; }
  get log() { return this.view.options.log || this.spec.log; }
  get smooth() { return this.view.options.smooth && !this.spec.raw; }

  traces() { // what each plotly trace takes from the rows
    const { store } = this.view, smooth = this.smooth, out = [];
    for (const s of this.spec.series) {
      const values = i => store.y[s.column][i], smoothed = i => store.s[s.column][i];
      if (s.role === "main") {
        if (s.band >= 0) {
          const half = i => Number.isFinite(store.y[s.band][i]) ? store.y[s.band][i] : 0, mid = smooth ? smoothed : values;
          const edge = { mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
          out.push({ s, of: i => mid(i) - half(i), style: edge });
          out.push({ s, of: i => mid(i) + half(i), style: { ...edge, fill: "tonexty", fillcolor: faded(s.colour, 0.13) } });
        }
        const solid = { mode: "lines", line: { color: s.colour, width: 2 }, name: plain(s.label) };
        if (!smooth) out.push({ s, of: values, style: solid });
        else {
          out.push({ s, of: values, style: { mode: "lines", line: { color: faded(s.colour, 0.3), width: 1 }, name: plain(s.label) } });
          out.push({ s, of: smoothed, style: { ...solid, name: "smoothed", hoverinfo: "skip" } });
        }
      } else {
        const style = { mode: "lines", line: { color: s.colour, width: 1.1, dash: s.role === "share" ? "dot" : "solid" }, name: plain(s.label) };
        if (s.role === "share") style.yaxis = "y2";
        out.push({ s, of: smooth ? smoothed : values, style });
      }
    }
    return out;
  }
  layout(parts) {
    const ink = this.view.ink, grid = faded(ink, 0.1), share = parts.some(p => p.s.role === "share");
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickfont: { size: 10, color: faded(ink, 0.7) }, fixedrange: false, automargin: false };
    return {
      shapes: this.shapes(), margin: { l: 38, r: share ? 34 : 8, t: 12, b: 22 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      font: { size: 11, color: ink }, hovermode: "x unified", hoverdistance: 40, dragmode: "zoom", uirevision: "keep",
      hoverlabel: { bgcolor: this.view.paper, bordercolor: faded(ink, 0.25), font: { size: 11, color: ink }, namelength: -1 },
      xaxis: { ...axis, showgrid: false, spikecolor: faded(ink, 0.45), spikethickness: -2, spikedash: "solid", nticks: 5, tickformat: "~s", hoverformat: ",d", unifiedhovertitle: { text: "step %{x:,d}" } },
      yaxis: { ...axis, nticks: 5, type: this.log ? "log" : "linear", rangemode: this.spec.zero ? "tozero" : "normal", tickformat: this.log ? "~g" : "", hoverformat: ".4~g",
               exponentformat: "e", ...(this.log ? { dtick: "D2" } : {}) },
      ...(share ? { yaxis2: { ...axis, overlaying: "y", side: "right", range: [0, 1.02], tickvals: [0, 0.5, 1], tickformat: ".0%",
                              hoverformat: ".0%", showgrid: false, fixedrange: true } } : {}),
    };
  }
  shapes() { // a line over the whole height for a change, a tick at the foot for a pause or a checkpoint
    const { marks, x } = this.view.store, first = x[0], last = x[x.length - 1], ink = this.view.ink;
    return marks.filter(m => m[0] >= first - 1 && m[0] <= last + 1).map(([step, , kind]) => {
      const at = Math.min(Math.max(step, first), last), change = kind === "change";
      return { type: "line", xref: "x", yref: "paper", x0: at, x1: at, y0: 0, y1: change ? 1 : 0.04, layer: "below",
               line: { color: change ? CHANGE : faded(ink, 0.6), width: change ? 1 : 1.5, dash: change ? "3px,2px" : "solid" } };
    });
  }
  place() { // the flags: where the pointer finds out what a mark is
    const layout = this.plot._fullLayout, axis = layout?.xaxis, { marks, x } = this.view.store;
    if (!axis || this.plot.hidden) { this.flags.replaceChildren(); return; }
    const seen = marks.filter(m => m[0] >= x[0] - 1 && m[0] <= x[x.length - 1] + 1);
    while (this.flags.children.length > seen.length) this.flags.lastChild.remove();
    while (this.flags.children.length < seen.length) {
      const flag = make("div", "flag"); flag.tabIndex = 0; flag.append(make("span", "tip")); this.flags.append(flag);
    }
    seen.forEach(([step, text, kind], i) => {
      const flag = this.flags.children[i], at = Math.min(Math.max(step, x[0]), x[x.length - 1]), left = axis.l2p(at);
      flag.hidden = left < -1 || left > axis._length + 1;
      flag.style.left = `${layout._size.l + left}px`;
      flag.style.top = kind === "change" ? "0" : `${layout._size.t + layout._size.h - 8}px`;
      flag.dataset.kind = kind; flag.dataset.side = left > axis._length / 2 ? "left" : "right";
      flag.firstChild.textContent = `step ${step.toLocaleString()}: ${text}`; flag.setAttribute("aria-label", flag.firstChild.textContent);
    });
  }
  heading() {
    const { store } = this.view, main = this.spec.series.find(s => s.role === "main") ?? this.spec.series[0];
    this.title.textContent = this.spec.title;
    let last = NaN;
    if (main) for (let i = store.x.length - 1; i >= 0 && !Number.isFinite(last); i--) last = store.y[main.column][i];
    this.value.textContent = main && Number.isFinite(last) ? number(last) : "";
  }
  labels() {
    this.legend.replaceChildren();
    for (const s of [...this.spec.series].sort((a, b) => (b.role === "main") - (a.role === "main"))) {
      const item = make("span", "", undefined), swatch = make("i");
      swatch.style.borderTopColor = s.colour;
      if (s.role === "share") swatch.style.borderTopStyle = "dotted";
      item.append(swatch, document.createTextNode(s.label)); item.title = s.metric; this.legend.append(item);
      if (s.role === "main" && s.band >= 0) {
        const band = make("span"), patch = make("i", "band"); patch.style.background = s.colour;
        band.append(patch, document.createTextNode(s.band_label)); this.legend.append(band);
      }
    }
  }
  async draw(force) {
    const { store, Plotly } = this.view, rows = store.x.length;
    this.heading();
    const parts = this.traces(), any = parts.some(p => store.y[p.s.column].some(Number.isFinite));
    this.plot.hidden = !any; this.empty.hidden = any; this.legend.hidden = false;
    if (!any) { this.legend.replaceChildren(); this.flags.replaceChildren(); this.empty.textContent = rows ? this.spec.empty : "waiting for the first step"; this.generation = -1; return; }
    if (!this.plot.clientWidth || !this.plot.clientHeight) return; // not laid out yet: the resize observer calls again
    if (force || this.generation !== store.generation || this.points > LIMIT) {
      this.labels();
      const data = parts.map(p => {
        const kept = points(store, p.s.column, 0, this.log, LIMIT / 2);
        return { type: "scatter", ...p.style, x: kept.map(i => store.x[i]), y: kept.map(p.of) };
      });
      this.points = Math.max(...data.map(d => d.x.length)); this.generation = store.generation; this.drawn = rows;
      data.forEach(d => { if (d.x.length === 1 && d.hoverinfo !== "skip") { d.mode = "lines+markers"; d.marker = { size: 5, color: d.line.color }; } });
      await Plotly.react(this.plot, data, this.layout(parts), { displayModeBar: false, responsive: false, displaylogo: false, doubleClick: "reset" });
      if (!this.listening) {
        this.listening = true;
        this.plot.on("plotly_hover", event => this.view.hover(this, event));
        this.plot.on("plotly_unhover", () => this.view.hover(this, null));
        this.plot.on("plotly_afterplot", () => this.place()); // zoomed, resized or redrawn
      }
      this.marked = store.marks.length; this.place();
    } else if (rows > this.drawn) {
      if (this.drawn < 2) { this.generation = -1; return this.draw(true); } // a single point had a marker
      const x = [], y = [], which = [];
      parts.forEach((p, t) => {
        const fresh = points(store, p.s.column, this.drawn, this.log, LIMIT / 2);
        if (fresh.length) { x.push(fresh.map(i => store.x[i])); y.push(fresh.map(p.of)); which.push(t); }
      });
      this.points += Math.max(0, ...x.map(v => v.length)); this.drawn = rows;
      if (which.length) await Plotly.extendTraces(this.plot, { x, y }, which);
    }
    if (this.marked !== store.marks.length) { this.marked = store.marks.length; await Plotly.relayout(this.plot, { shapes: this.shapes() }); }
  }
  resize() {
    const size = `${this.plot.clientWidth}x${this.plot.clientHeight}`;
    if (size === this.size || this.plot.hidden || !this.plot.clientWidth || this.generation < 0) return;
    this.size = size; this.view.Plotly.Plots.resize(this.plot);
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
  const lines = [["step", ...store.meta.columns.map(quoted)].join(","), ...store.x.map((x, i) => [x, ...store.y.map(y => cell(y[i]))].join(","))];
  return new Blob([lines.join("\n") + "\n"], { type: "text/csv" });
}
async function toPng(view) {
  const { Plotly, cards, root } = view, box = root.getBoundingClientRect(), scale = 2, pad = 16;
  const canvas = document.createElement("canvas"), pen = canvas.getContext("2d"), top = view.grid.getBoundingClientRect().top;
  canvas.width = (box.width + 2 * pad) * scale; canvas.height = (box.bottom - top + 2 * pad) * scale;
  pen.scale(scale, scale); pen.fillStyle = view.paper; pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.translate(pad - box.left, pad - top); pen.textBaseline = "middle";
  for (const card of cards) {
    for (const el of card.el.querySelectorAll(".grpo-nb-head span, .grpo-nb-legend i, .grpo-nb-legend span, .grpo-nb-empty")) {
      if (el.hidden) continue;
      const at = el.getBoundingClientRect(), style = getComputedStyle(el), middle = at.top + at.height / 2, empty = el === card.empty;
      if (el.tagName === "I") { // a swatch
        pen.globalAlpha = Number(style.opacity);
        pen.fillStyle = pen.strokeStyle = el.classList.contains("grpo-nb-band") ? style.backgroundColor : style.borderTopColor;
        if (el.classList.contains("grpo-nb-band")) pen.fillRect(at.left, at.top, at.width, at.height);
        else { pen.lineWidth = 2; pen.setLineDash(style.borderTopStyle === "dotted" ? [2, 2] : []); pen.beginPath(); pen.moveTo(at.left, middle); pen.lineTo(at.right, middle); pen.stroke(); }
        pen.globalAlpha = 1; pen.setLineDash([]); continue;
      }
      pen.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`; pen.fillStyle = view.ink; pen.textAlign = empty ? "center" : "left";
      const swatch = el.querySelector("i")?.getBoundingClientRect();
      pen.fillText(el.textContent, empty ? at.left + at.width / 2 : swatch ? swatch.right + 5 : at.left, middle);
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
  const { store, model } = view, width = store.y.length + 1, rows = new Float32Array(store.x.length * width);
  store.x.forEach((x, i) => { rows[i * width] = x; store.y.forEach((y, c) => { rows[i * width + 1 + c] = y[i]; }); });
  const base64 = bytes => { let text = ""; for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192)); return btoa(text); };
  const data = { meta: { ...store.meta, marks: store.marks }, at: store.at, rows: base64(new Uint8Array(rows.buffer)), plotly: base64(bytesOf(model.get("_plotly"))) };
  const parts = { title: "Training run", css: model.get("_css"), js: model.get("_esm"), data: JSON.stringify(data).replaceAll("<", "\\u003c"), static: "These charts need JavaScript." };
  return new Blob([template.split(/\$(title|css|js|data|static)\b/).map((part, i) => i % 2 ? parts[part] : part).join("")], { type: "text/html" });
}

// ---- the view ----------------------------------------------------------------------------------------------------------
class View {
  constructor(el, model, store) {
    this.store = store; this.model = model; this.cards = []; this.options = { smooth: true, log: false };
    this.root = make("div"); this.root.className = "grpo-nb";
    const bar = make("div", "bar"); this.step = make("span", "step");
    bar.append(this.step, this.toggle("smooth", "smooth"), this.toggle("log", "log scale"), this.files());
    this.grid = make("div", "grid"); this.root.append(bar, this.grid); el.append(this.root);
    this.listener = () => this.later(); store.listeners.add(this.listener);
    this.sizes = new ResizeObserver(() => this.arrange()); this.sizes.observe(this.root);
    this.themes = new MutationObserver(() => { if (this.theme()) this.later(true); });
    for (const node of [document.documentElement, document.body])
      this.themes.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind", "theme", "data-bs-theme"] });
    plotly(model).then(Plotly => { this.Plotly = Plotly; this.theme(); this.arrange(); this.later(true); })
      .catch(error => { this.step.textContent = `The charts could not be drawn: ${error}`; });
  }
  toggle(name, text) {
    const label = make("label"), box = document.createElement("input");
    box.type = "checkbox"; box.checked = this.options[name];
    box.addEventListener("change", () => { this.options[name] = box.checked; this.later(true); });
    label.append(box, document.createTextNode(text));
    return label;
  }
  files() {
    const group = make("span", "files");
    const page = this.model.get("_page");
    const kinds = [["PNG", "the charts as a picture", () => toPng(this)], ["CSV", "the numbers that these charts show", () => toCsv(this.store)],
                   ...(page ? [["HTML", "the charts as a page that needs nothing else", () => toPage(this, page)]] : [])];
    for (const [name, hint, make_] of kinds) {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = name; button.title = `Save ${hint}`;
      button.addEventListener("click", async () => {
        button.disabled = true;
        try { save(await make_(), `charts-step-${this.store.x.at(-1) ?? 0}.${name.toLowerCase()}`); }
        catch (error) { this.step.textContent = `${name} could not be saved: ${error}`; }
        button.disabled = false;
      });
      group.append(button);
    }
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
    const ink = hex(getComputedStyle(this.root).color) ?? "#333333", old = this.ink + this.paper;
    this.ink = ink; this.paper = paper ?? "#ffffff";
    return old !== this.ink + this.paper;
  }
  arrange() {
    const width = this.root.clientWidth, n = this.store.meta.charts.length || 1;
    const columns = width >= 780 && n !== 4 ? Math.min(n, 3) : width >= 520 && n % 2 === 0 ? 2 : 1;
    this.root.style.setProperty("--grpo-nb-columns", columns);
    if (!this.Plotly || !width) return;
    if (this.theme()) this.later(true); // made outside the page, as in a tab, it had no colours to read
    this.cards.forEach(card => card.resize());
    if (this.cards.some(card => card.generation < 0)) this.later();
  }
  later(force) { // at most eight redraws a second, and a third of the time is left to the rest of the page
    this.force ||= force;
    if (this.timer || this.closed) return;
    const pause = Math.min(Math.max(1.5 * (this.took ?? 0), 120), 1000);
    const wait = force ? 0 : Math.max(0, (this.last ?? 0) + pause - performance.now());
    this.timer = setTimeout(() => requestAnimationFrame(() => this.draw()), wait);
  }
  async draw() {
    const force = this.force; this.force = false; this.last = performance.now();
    try {
      const { meta, x } = this.store;
      this.step.textContent = x.length ? `step ${x[x.length - 1].toLocaleString()}` : "";
      while (this.cards.length < meta.charts.length) {
        const card = new Card(this, this.cards.length); this.cards.push(card); this.grid.append(card.el);
      }
      while (this.cards.length > meta.charts.length) this.cards.pop().el.remove();
      if (this.Plotly) { this.arrangeOnce(); for (const card of this.cards) await card.draw(force); }
    } catch (error) { console.error("grpo_nb charts:", error); }
    this.timer = undefined; this.took = performance.now() - this.last;
    if (this.force || this.cards.some(card => card.generation >= 0 && (card.drawn < this.store.x.length || card.marked !== this.store.marks.length))) this.later(this.force);
  }
  arrangeOnce() { if (this.count !== this.cards.length) { this.count = this.cards.length; this.arrange(); } }
  hover(from, event) { // the same step in every chart
    if (this.hovering) return;
    this.hovering = true;
    for (const card of this.cards) {
      if (card === from || card.generation < 0) continue;
      try { if (event) this.Plotly.Fx.hover(card.plot, { xval: event.points[0].x }); else this.Plotly.Fx.unhover(card.plot); }
      catch (error) { console.debug("grpo_nb charts:", error); }
    }
    this.hovering = false;
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
      if (first?.meta) store.receive({ kind: "all", meta: first.meta, at: first.at }, first.rows);
      const heard = (message, buffers) => {
        if (store.receive(message, buffers?.[0])) return;
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

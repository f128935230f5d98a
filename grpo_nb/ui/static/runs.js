// The list of runs: search, sort and tick in the page, without asking the kernel. All text is set as text.
function element(name, attributes = {}, text = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

function compare(a, b, down) {
  const missing = (v) => v === null || v === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b); // what is not known comes last
  const order = a < b ? -1 : a > b ? 1 : 0;
  return down ? -order : order;
}

function render({ model, el }) {
  el.classList.add("gnb", "gnb-runs-list");
  const top = element("div", { class: "gnb-runs-top" });
  const search = element("input", { type: "search", placeholder: "find: words of name, state, tags, note, beta=0.04", "aria-label": "find runs" });
  const count = element("span", { class: "gnb-muted", role: "status" });
  top.append(search, count);
  const scroll = element("div", { class: "gnb-scroll gnb-runs-scroll", tabindex: "0", role: "region", "aria-label": "runs" });
  const table = element("table", { class: "gnb-table gnb-runs" });
  scroll.append(table);
  el.append(top, scroll);

  const tick = (ids) => { model.set("ticked", ids); model.save_changes(); };

  function head() {
    const [by, down] = model.get("sort");
    const line = element("tr");
    line.append(element("td"));
    model.get("heads").forEach((name, i) => {
      const cell = element("th", { scope: "col", "aria-sort": by === name ? (down ? "descending" : "ascending") : "none" });
      if (model.get("left").includes(name)) cell.className = "gnb-left";
      const button = element("button", { type: "button", title: model.get("hints")[name] || `sort by ${name}` }, name);
      if (by === name) button.append(element("span", { "aria-hidden": "true" }, down ? " ↓" : " ↑"));
      button.addEventListener("click", () => {
        const texts = model.get("left").includes(name);
        model.set("sort", [name, by === name ? !down : !texts]);
        model.save_changes();
        table.querySelectorAll("th button")[i]?.focus(); // the head was drawn anew
      });
      cell.append(button);
      line.append(cell);
    });
    return line;
  }

  function line(row) {
    const made = element("tr"), ticked = model.get("ticked"), on = ticked.includes(row.id);
    if (on) made.className = "gnb-on";
    const box = element("input", { type: "checkbox", "aria-label": `draw ${row.name}` });
    box.checked = on;
    box.addEventListener("change", () => {
      const now = model.get("ticked").filter((id) => id !== row.id);
      tick(box.checked ? [...now, row.id] : now);
    });
    const first = element("td");
    first.append(box);
    made.append(first);
    model.get("heads").forEach((name, i) => {
      const cell = element("td", { dir: "auto" });
      if (model.get("left").includes(name)) cell.className = "gnb-left";
      if (row.titles[name]) cell.title = row.titles[name];
      if (name === "name") {
        const dot = element("span", { class: "gnb-dot", "aria-hidden": "true" });
        dot.style.background = model.get("colours")[row.id] || "transparent";
        const button = element("button", { type: "button", title: "this run alone" }, row.cells[i]);
        button.addEventListener("click", () => tick([row.id]));
        cell.append(dot, button);
      } else if (name === "state") cell.append(element("span", { class: `gnb-run-state gnb-is-${row.state}` }, row.cells[i]));
      else cell.textContent = row.cells[i];
      made.append(cell);
    });
    return made;
  }

  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = model.get("rows").filter((row) => words.every((word) => row.words.includes(word)));
    const [by, down] = model.get("sort"), all = model.get("rows").length;
    rows.sort((a, b) => compare(a.keys[by], b.keys[by], down));
    const focus = document.activeElement, within = table.contains(focus), at = within ? [...table.querySelectorAll("button,input")].indexOf(focus) : -1;
    table.replaceChildren(head(), ...rows.map(line));
    if (within && at >= 0) table.querySelectorAll("button,input")[at]?.focus();
    count.textContent = rows.length === all ? `${all} run${all === 1 ? "" : "s"}` : `${rows.length} of ${all} runs`;
  }

  search.addEventListener("input", draw);
  const names = ["rows", "ticked", "sort", "colours"].map((name) => `change:${name}`);
  for (const name of names) model.on(name, draw);
  draw();
  const sign = () => { if (el.isConnected && !document.hidden) model.send({ here: true }); };
  const signs = setInterval(sign, 60000); // somebody looks: the kernel goes on looking too
  document.addEventListener("visibilitychange", sign);
  return () => { clearInterval(signs); document.removeEventListener("visibilitychange", sign); for (const name of names) model.off(name, draw); };
}
export default { render };

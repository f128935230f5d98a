// What a page of widgets needs from the browser: whether its kernel is there, tabs for keyboard and screen reader, and announcements.
const TICK = 5000, SILENT = 14 // milliseconds between two looks; looks without a beat after which the kernel counts as silent

const WORDS = {
  gone: "The kernel of this page is gone: it was restarted, or it ended. What stands here is the last that it said, and the buttons reach nobody. " +
    "Run the cell again for a page that lives.",
  silent: "Nothing has come from the kernel for more than a minute: it is busy in one long call, or gone. The page goes on as soon as it answers."}

function tabs(list, name, pages) {
  const buttons = [...list.querySelectorAll("button")]
  if (!buttons.length) return
  const holder = buttons[0].parentElement
  if (holder.getAttribute("role") !== "tablist") {
    holder.setAttribute("role", "tablist")
    holder.setAttribute("aria-label", name)
    holder.addEventListener("keydown", event => walk(event, holder))
  }
  for (const button of buttons) {
    const on = button.classList.contains("mod-active")
    set(button, "role", "tab")
    set(button, "aria-selected", String(on))
    set(button, "tabindex", on ? "0" : "-1")
    if (button.hasAttribute("aria-pressed")) button.removeAttribute("aria-pressed")
    if (!button.id) button.id = `gnb-tab-${Math.random().toString(36).slice(2)}`
  }
  const chosen = buttons.find(b => b.classList.contains("mod-active"))
  for (const page of pages) {
    set(page, "role", "tabpanel")
    if (chosen && page.offsetParent) set(page, "aria-labelledby", chosen.id)
  }
}

function set(element, name, value) { if (element.getAttribute(name) !== value) element.setAttribute(name, value) }

function walk(event, holder) {
  const buttons = [...holder.querySelectorAll("button")], at = buttons.indexOf(event.target.closest("button"))
  const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1}[event.key]
  if (at < 0 || to === undefined) return
  event.preventDefault()
  event.stopPropagation() // the notebook moves between its cells with the same keys
  const next = buttons[(to + buttons.length) % buttons.length]
  next.focus()
  next.click()
}

function named(root) {
  for (const label of root.querySelectorAll("label.widget-label, .widget-checkbox label, .widget-toggle-button, .jupyter-button")) {
    const text = label.textContent.trim()
    if (text && !label.title && label.scrollWidth > label.clientWidth + 1) label.title = text
  }
  for (const box of root.querySelectorAll("select, input, textarea")) {
    if (box.type === "hidden" || box.getAttribute("aria-label") || box.title || box.labels?.length && box.labels[0].textContent.trim()) continue
    const holder = box.closest(".jupyter-widgets")
    set(box, "aria-label", holder?.querySelector("label")?.textContent.trim() || holder?.title || box.placeholder || holder?.dataset.name || "choice")
  }
  for (const handle of root.querySelectorAll("[role=slider]:not([aria-label])")) {
    set(handle, "aria-label", handle.closest(".jupyter-widgets")?.querySelector("label")?.textContent.trim() || "step")
  }
  for (const scrolled of root.querySelectorAll(".gnb-notes, .gnb-trace")) {
    const notes = scrolled.classList.contains("gnb-notes")
    set(scrolled, "tabindex", scrolled.scrollHeight > scrolled.clientHeight + 1 ? "0" : "-1")
    set(scrolled, "role", "region")
    set(scrolled, "aria-label", notes ? "Notes of the run" : "Source or traceback")
  }
  for (const group of root.querySelectorAll(".widget-toggle-buttons")) {
    if (group.closest(".gnb-tabs, .gnb-nav")) continue
    for (const button of group.querySelectorAll("button")) set(button, "aria-pressed", String(button.classList.contains("mod-active")))
  }
}

function render({ model, el }) {
  el.classList.add("gnb-keeper")
  const notice = document.createElement("div"), polite = document.createElement("div"), alert = document.createElement("div")
  notice.className = "gnb-gone-notice"
  notice.hidden = true
  polite.className = alert.className = "gnb-unseen"
  polite.setAttribute("role", "status")
  polite.setAttribute("aria-live", "polite")
  alert.setAttribute("role", "alert")
  el.append(notice, polite, alert)
  let root = null, missed = 0, state = "", problem = "", due = 0, lost = ""

  const tell = why => {
    if (why === lost) return
    lost = why
    notice.hidden = !why
    notice.textContent = alert.textContent = WORDS[why] ?? ""
    root?.classList.toggle("gnb-gone", why === "gone")
    root?.classList.toggle("gnb-silent", why === "silent")
  }
  const beat = () => { missed = 0; tell("") }
  const announce = () => {
    const now = root.querySelector(".gnb-status .gnb-state")?.textContent ?? ""
    if (now && now !== state) {
      polite.textContent = `Run: ${now}`
      state = now
    }
    const wrong = [...root.querySelectorAll(".gnb-problem")].filter(e => e.offsetParent).map(e => e.textContent).join(" ").slice(0, 500)
    if (wrong !== problem) alert.textContent = wrong
    problem = wrong
  }
  const tend = () => {
    due = 0
    if (!root?.isConnected) return
    for (const nav of root.querySelectorAll(".gnb-nav")) tabs(nav, "Pages", root.querySelectorAll(".gnb-page"))
    for (const nav of root.querySelectorAll(".gnb-tabs")) tabs(nav, "Groups of settings", root.querySelectorAll(".gnb-group"))
    named(root)
    announce()
    if (root.querySelector(".jupyter-widgets-disconnected")) tell("gone")
  }
  const soon = () => { due ||= setTimeout(tend, 60) }
  const watcher = new MutationObserver(soon)
  const find = () => {
    root = el.closest(".gnb-view")
    if (!root) return
    watcher.observe(root, {subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ["class", "style", "disabled"]})
    soon()
  }
  const clock = setInterval(() => {
    if (!root?.isConnected) find()
    missed += 1
    if (missed >= SILENT && lost !== "gone") tell("silent")
    soon()
  }, TICK)
  model.on("msg:custom", beat)
  model.send({kind: "hello"})
  requestAnimationFrame(find)
  return () => { clearInterval(clock); watcher.disconnect() }
}
export default { render }

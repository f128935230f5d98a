function render({ model, el }) {
  el.classList.add("gnb", "gnb-save");
  const said = document.createElement("span");
  said.className = "gnb-muted"; said.setAttribute("role", "status");
  let asked = 0;
  for (const [name, label, title] of model.get("files")) {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = label; button.title = title;
    button.className = "jupyter-widgets jupyter-button widget-button";
    button.addEventListener("click", () => { asked += 1; said.textContent = "…"; model.send({ want: name }); });
    el.append(button);
  }
  el.append(said);
  model.on("msg:custom", (answer, buffers) => {
    if (!asked) return;
    asked -= 1; said.textContent = answer.said;
    if (!answer.file) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: answer.type })); link.download = answer.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
}
export default { render };

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const key = (body, column) => {
    const cell = body.rows[0].cells[column];
    return cell.dataset.key === undefined ? cell.textContent : Number(cell.dataset.key);
  };
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => typeof a === "number" ? a - b || 0 : a.localeCompare(b);
    const bodies = [...table.tBodies];
    bodies.sort((a, b) => order(key(a, column), key(b, column)) * (down ? -1 : 1));
    table.append(...bodies);
  }));
  for (const { rows: [row, more] } of table.tBodies) {
    if (!more) continue;
    const open = document.createElement("button");
    open.type = "button";
    open.className = "open";
    open.append(...row.cells[0].childNodes);
    open.setAttribute("aria-controls", more.id);
    row.cells[0].append(open);
    const show = shown => { more.hidden = !shown; open.setAttribute("aria-expanded", shown); };
    show(false);
    open.addEventListener("click", () => show(more.hidden));
    addEventListener("beforeprint", () => show(true));
    addEventListener("hashchange", () => {
      if (location.hash === `#${row.parentNode.id}`) show(true);
    });
  }
}

for (const code of document.querySelectorAll(".code")) {
  const copy = document.createElement("button");
  copy.type = "button";
  copy.className = "copy";
  copy.textContent = "Copy";
  copy.addEventListener("click", () => {
    const select = () => getSelection().selectAllChildren(code.firstElementChild);
    if (!navigator.clipboard) return select();
    navigator.clipboard.writeText(code.firstElementChild.textContent).then(() => {
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    }, select);
  });
  code.append(copy);
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
// A browser shows a <title> after a second and a finger never: its words go into `tip` at once.
for (const title of document.querySelectorAll("svg title")) {
  const parent = title.parentNode;
  title.remove();
  if (parent.localName === "svg") continue;  // it keeps its aria-label
  parent.addEventListener("pointerenter", event => {
    tip.textContent = title.textContent;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - width - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${event.clientY > height + 24 ? event.clientY - height - 12 : event.clientY + 18}px`;
  });
  parent.addEventListener("pointerleave", () => { tip.hidden = true; });
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

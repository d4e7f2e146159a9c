// What makes a report live: figures (plotly), crystals that turn (3Dmol), tables that sort. Data: the JSON in the page.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);

for (const [id, figure] of Object.entries(data.figures)) {
  const config = { displaylogo: false, responsive: true, toImageButtonOptions: { format: "svg", filename: id } };
  config.displayModeBar = matchMedia("(hover: hover)").matches && "hover"; // on a touch screen it would never go
  config.modeBarButtonsToRemove = ["select2d", "lasso2d", "autoScale2d"];
  Plotly.newPlot(id, figure.data, figure.layout, config);
}

function drawCrystal(element, scene) {
  const colors = $3Dmol.elementColors.Jmol;
  const hex = (symbol) => "#" + (colors[symbol] ?? 0x909090).toString(16).padStart(6, "0");
  const atoms = scene.atoms.map(([elem, x, y, z]) => ({ elem, x, y, z, bonds: [], bondOrder: [] }));
  for (const [i, j] of scene.bonds) {
    atoms[i].bonds.push(j);
    atoms[j].bonds.push(i);
    atoms[i].bondOrder.push(1);
    atoms[j].bondOrder.push(1);
  }
  for (const symbol of new Set(atoms.map((atom) => atom.elem))) {
    const entry = element.nextElementSibling.appendChild(document.createElement("span"));
    entry.appendChild(document.createElement("i")).style.background = hex(symbol);
    entry.append(symbol);
  }
  const viewer = $3Dmol.createViewer(element, { backgroundAlpha: 0, antialias: true, disableFog: true });
  const model = viewer.addModel();
  model.addAtoms(atoms);
  viewer.setStyle({}, { sphere: { scale: 0.3, colorscheme: "Jmol" }, stick: { radius: 0.1, colorscheme: "Jmol" } });
  for (const [start, end] of scene.box) {
    const [a, b] = [start, end].map(([x, y, z]) => ({ x, y, z }));
    viewer.addCylinder({ start: a, end: b, radius: 0.025, color: "#7b8794", fromCap: 1, toCap: 1 });
  }
  viewer.rotate(-90, "x"); // c upwards, seen a little from the side and from above
  viewer.rotate(-25, "y");
  viewer.rotate(10, "x");
  viewer.zoomTo();
  viewer.zoom(0.8); // 3Dmol fits the centres of the atoms, which have a size
  viewer.render();
}

// The wheel scrolls the page; with Ctrl it zooms the crystal. 3Dmol would take the wheel for itself.
const letPageScroll = (event) => event.ctrlKey || event.stopImmediatePropagation();

function show(view) {
  whenSeen.unobserve(view);
  if (view.childElementCount) return;
  try {
    drawCrystal(view, data.crystals[view.dataset.crystal]);
    view.addEventListener("wheel", letPageScroll, true);
  } catch (error) {
    const note = document.createElement("p"); // a browser without WebGL
    note.textContent = "This view needs WebGL: " + error.message;
    view.replaceChildren(note);
  }
}

const whenSeen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => show(entry.target)),
  { rootMargin: "200px" },
);
document.querySelectorAll(".view").forEach((view) => whenSeen.observe(view));

// On paper there is another width: figures become pictures that scale, and every crystal is drawn.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll(".view").forEach(show);
  for (const svg of document.querySelectorAll(".plot .main-svg")) {
    svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
  }
});
window.addEventListener("afterprint", () => {
  for (const svg of document.querySelectorAll(".plot .main-svg")) svg.removeAttribute("viewBox");
});

function sortBy(table, header) {
  const column = header.cellIndex;
  const numeric = header.classList.contains("number");
  // Numbers first from the largest, words from A; a second click turns it round.
  const first = numeric ? "descending" : "ascending";
  const second = numeric ? "ascending" : "descending";
  const order = header.getAttribute("aria-sort") === first ? second : first;
  const sign = order === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    if (!numeric) return sign * value(a).localeCompare(value(b), "en", { numeric: true });
    const [x, y] = [value(a), value(b)].map((text) => (text === "" ? NaN : Number(text)));
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // unknown last, either way
    return sign * (x - y);
  };
  table.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", order);
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

document.querySelectorAll("table.sortable").forEach((table) => {
  table.querySelectorAll("th").forEach((header) => {
    header.tabIndex = 0;
    header.addEventListener("click", () => sortBy(table, header));
    header.addEventListener("keydown", (event) => event.key === "Enter" && sortBy(table, header));
  });
});

document.querySelectorAll("input.filter").forEach((input) => {
  const rows = document.getElementById(input.dataset.table).tBodies[0].rows;
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
});

// What every page has: figures, colors for light and dark, the contents list, print. Sections have scripts of their own.
"use strict";

// Below this width of a figure, the names of lines stand in a legend below it instead of at their ends.
const NARROW = 560;

function sectionData(kind) {
  const element = document.getElementById("data-" + kind);
  return element ? JSON.parse(element.textContent) : null;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function pageColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

// Colors that are hard to see on a dark page, and what stands for them there; the last two are of the map of loads.
const ON_DARK = {
  "#0072B2": "#4fa9e3", "#D55E00": "#f08243", "#009E73": "#2bb98f", "#A6761D": "#c79a45", "#F1F1EF": "#2c323a", "#7A2800": "#fff0c9",
};

function themed(color) {
  if (typeof color !== "string") return color;
  const isDark = document.documentElement.dataset.theme === "dark";
  for (const [light, dark] of Object.entries(ON_DARK)) color = color.replaceAll(isDark ? light : dark, isDark ? dark : light);
  return color;
}

// A trace with the colors of the page's theme.
function recolored(trace) {
  const change = {};
  for (const part of ["line", "marker"]) {
    if (!trace[part]) continue;
    change[part] = { ...trace[part], color: themed(trace[part].color) };
    if (trace[part].line) change[part].line = { ...trace[part].line, color: themed(trace[part].line.color) };
  }
  if (Array.isArray(trace.colorscale)) change.colorscale = trace.colorscale.map(([place, color]) => [place, themed(color)]);
  return { ...trace, ...change };
}

// What a figure's layout takes from the page's colors and its own width.
function adapted(layout, width) {
  const ink = pageColor("ink");
  const change = { font: { ...layout.font, color: ink } };
  change.hoverlabel = { bgcolor: pageColor("card"), bordercolor: pageColor("line"), font: { color: ink } };
  if (layout.annotations && layout.annotations.length) {
    const isNarrow = width < NARROW;
    change.annotations = isNarrow ? [] : layout.annotations.map((label) => ({ ...label, text: themed(label.text) }));
    change.showlegend = isNarrow || Boolean(layout.showlegend);
    change.margin = { ...layout.margin, r: isNarrow ? 16 : layout.margin.r };
    if (isNarrow) {
      const names = layout.meta.names;
      change.height = layout.height + 21 * names;
      change.margin.b = layout.margin.b + 21 * names;
      change.legend = { ...layout.legend, title: { text: "" }, orientation: "v" };
    }
  }
  if (layout.xaxis && layout.xaxis.nticks) {
    const room = width - layout.margin.l - 90;
    change.xaxis = { ...layout.xaxis, nticks: Math.max(2, Math.min(layout.xaxis.nticks, Math.floor(room / 26))) };
  }
  return { ...layout, ...change };
}

const figures = new Map();

function drawFigure(source) {
  const element = document.getElementById(source.dataset.for);
  const { data, layout } = JSON.parse(source.textContent);
  figures.set(element, { layout, shown: data.map((trace) => trace.showlegend), width: 0 });
  const { traces, final, width } = fitted(element, data);
  element.style.height = "";
  Plotly.newPlot(element, traces, final, { responsive: false, displayModeBar: false });
  figures.get(element).width = width;
}

function fitted(element, data) {
  const { layout, shown } = figures.get(element);
  const width = element.clientWidth;
  const isNarrow = width < NARROW && layout.annotations && layout.annotations.length;
  const traces = data
    .map(recolored)
    .map((trace, i) => (shown[i] === false && layout.meta ? { ...trace, showlegend: Boolean(isNarrow) } : trace));
  const final = { ...adapted(layout, width), width, autosize: false };
  const { updatemenus, sliders, xaxis } = element.layout || {};
  if (updatemenus) {
    // What the reader has chosen with the figure's own controls.
    Object.assign(final, { updatemenus, sliders, xaxis: { ...final.xaxis, range: xaxis.range } });
  }
  return { traces, final, width };
}

function redrawFigure(element, width) {
  const stored = figures.get(element);
  if (!stored || !element.data) return;
  const { traces, final } = fitted(element, element.data);
  stored.width = width || element.clientWidth;
  // Heat maps keep the colors and the values that scripts gave them.
  Plotly.react(element, traces, { ...final, width: stored.width });
}

function resizeFigures(width) {
  for (const element of figures.keys()) {
    if (width || element.clientWidth !== figures.get(element).width) redrawFigure(element, width);
  }
}

async function drawFigures() {
  for (const source of document.querySelectorAll("script.plot-data")) {
    drawFigure(source);
    // Leaves the page time to react between two figures.
    await new Promise((next) => setTimeout(next));
  }
}

function followTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  function set(theme) {
    document.documentElement.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
    button.setAttribute("aria-label", "Switch to " + button.textContent.toLowerCase() + " colors");
    for (const element of figures.keys()) redrawFigure(element);
    window.dispatchEvent(new Event("themechange"));
  }
  button.addEventListener("click", () => set(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  system.addEventListener("change", () => set(system.matches ? "dark" : "light"));
  set(document.documentElement.dataset.theme);
}

// Marks the section in view in the contents list.
function followSections() {
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const visible = new Set();
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) entry.isIntersecting ? visible.add(entry.target.id) : visible.delete(entry.target.id);
      const first = [...links.keys()].find((id) => visible.has(id));
      for (const [id, link] of links) id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    },
    { rootMargin: "-10% 0px -60% 0px" },
  );
  document.querySelectorAll("section").forEach((section) => watcher.observe(section));
}

window.addEventListener("load", async () => {
  followTheme();
  followSections();
  await drawFigures();
  document.documentElement.dataset.drawn = "true";
  window.dispatchEvent(new Event("drawn"));
});
let resizing;
window.addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => resizeFigures(), 100);
});
// Paper is narrower than a window and white, and Plotly does not resize figures for print: 680 pixels fit on A4 and Letter.
let themeOnScreen;
window.addEventListener("beforeprint", () => {
  themeOnScreen = document.documentElement.dataset.theme;
  document.documentElement.dataset.theme = "light";
  window.dispatchEvent(new Event("themechange"));
  document.querySelectorAll("main details:not([open])").forEach((details) => (details.dataset.closed = details.open = true));
  resizeFigures(680);
});
window.addEventListener("afterprint", () => {
  document.documentElement.dataset.theme = themeOnScreen;
  window.dispatchEvent(new Event("themechange"));
  document.querySelectorAll("details[data-closed]").forEach((details) => {
    details.open = false;
    delete details.dataset.closed;
  });
  for (const element of figures.keys()) redrawFigure(element);
});

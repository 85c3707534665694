// Draws the figures in the theme's colours, sorts tables, copies recipes. Nothing is fetched.
"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = figures.map(() => new Set());
  const phone = matchMedia("(max-width: 640px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;

  // ---- Colours: "@c3/20" is 20 % of the style's --c3.
  const probe = document.createElement("i");
  probe.hidden = true;
  document.body.append(probe);
  let known = new Map();
  function colour(name) {
    if (!known.has(name)) {
      const [role, share] = name.slice(1).split("/");
      probe.style.color = `var(--${role})`;
      const parts = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3);
      known.set(name, `rgba(${parts.join(",")},${share ? share / 100 : 1})`);
    }
    return known.get(name);
  }
  // Only what stands under a key of colours is a colour; words from results are never looked at.
  function painted(value, key) {
    if (typeof value === "string") return /color(scale)?$/.test(key) && value[0] === "@" ? colour(value) : value;
    if (Array.isArray(value)) return /^(x|y|z|text|hovertext|ticktext)$/.test(key) ? value : value.map((v) => painted(v, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, k)]));
    }
    return value;
  }

  // ---- Figures
  const config = { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false, typesetMath: false,
    showTips: false, staticPlot: false };
  function set(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) target = target[key] ??= {};
    target[last] = value;
  }
  function draw(number) {
    const place = document.getElementById(`plot-${number}`);
    const spec = figures[number];
    const width = Math.floor(printing ? printWidth(place) : place.clientWidth);
    const data = painted(spec.data, "data");
    const layout = painted(spec.layout, "layout");
    data.forEach((trace, i) => { trace.visible = !hidden[number].has(i); });
    layout.width = width;
    layout.height = spec.height;
    if (spec.square) layout.height = Math.round(Math.min(width - spec.square[0], 560) * 0.86) + spec.square[1];
    if (phone.matches && !printing) {
      for (const [path, value] of Object.entries(spec.narrow)) {
        if (path.startsWith("data.")) data.forEach((trace) => set(trace, path.slice(5), value));
        else set(layout, path, value);
      }
    }
    if (printing) layout.height = Math.min(layout.height, 440);
    place.style.minHeight = `${layout.height}px`;
    return Plotly.react(place, data, layout, config);
  }
  // Paper: A4 across within its margins, whatever the window is.
  const printWidth = (place) => (place.closest(".half") ? 490 : 1030) - 46;
  function drawAll() {
    known = new Map();
    figures.forEach((_, number) => draw(number));
  }

  async function unpack() {
    const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }
  async function start() {
    if (figures.length) {
      try {
        await unpack();
        drawAll();
      } catch (error) {
        document.querySelectorAll(".plot").forEach((place) => place.classList.add("failed"));
        throw error;
      }
    }
    root.dataset.ready = "yes";
  }

  let waiting = 0, seen = innerWidth, closed = [];
  addEventListener("resize", () => {
    if (printing || innerWidth === seen) return;
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => { seen = innerWidth; if (window.Plotly) drawAll(); });
  });
  addEventListener("beforeprint", () => {
    if (!window.Plotly) return;
    printing = true;
    closed = document.querySelectorAll(".recipe:not([open])");
    root.dataset.before = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    closed.forEach((recipe) => { recipe.open = true; });
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (!printing) return;
    printing = false;
    if (root.dataset.before) root.dataset.theme = root.dataset.before; else delete root.dataset.theme;
    delete root.dataset.before;
    closed.forEach((recipe) => { recipe.open = false; });
    drawAll();
  });

  // ---- Theme
  document.getElementById("theme").addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    if (window.Plotly) drawAll();
  });
  dark.addEventListener("change", () => { if (window.Plotly) drawAll(); });

  // ---- Legends: press to hide or show, press twice for this one alone
  const traces = (key) => key.dataset.traces.split(",").map(Number);
  function show(key, on) {
    key.setAttribute("aria-pressed", on);
    for (const trace of traces(key)) hidden[key.dataset.plot][on ? "delete" : "add"](trace);
  }
  document.querySelectorAll(".key").forEach((key) => {
    key.addEventListener("click", (event) => {
      if (event.detail === 2) {
        const others = [...key.parentElement.children].filter((other) => other !== key);
        const alone = others.every((other) => other.getAttribute("aria-pressed") === "false");
        others.forEach((other) => show(other, alone));
        show(key, true);
      } else if (event.detail < 2) show(key, key.getAttribute("aria-pressed") === "false");
      if (window.Plotly) draw(Number(key.dataset.plot));
    });
  });

  // ---- Tables: experts, models and base stay apart; models are sorted
  const empty = "\u{10ffff}";
  function sort(header) {
    const table = header.closest("table");
    const column = [...header.parentElement.children].indexOf(header);
    const number = header.classList.contains("number");
    const was = header.getAttribute("aria-sort");
    const down = was ? was === "ascending" : number;
    table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    for (const body of table.tBodies) {
      const rows = [...body.rows].map((row) => [row.cells[column].dataset.v ?? empty, row]);
      rows.sort(([a], [b]) => {
        if (a === empty || b === empty) return (a === empty) - (b === empty);
        return (number ? a - b : a.localeCompare(b)) * (down ? -1 : 1);
      });
      body.append(...rows.map(([, row]) => row));
    }
  }
  document.querySelectorAll(".sort").forEach((button) => {
    button.addEventListener("click", () => sort(button.closest("th")));
  });
  document.querySelectorAll(".show-intervals").forEach((box) => {
    box.addEventListener("change", () => {
      box.closest("section").querySelector("table").classList.toggle("with-intervals", box.checked);
    });
  });

  // ---- Recipes
  document.querySelectorAll(".copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  });

  start();
})();
